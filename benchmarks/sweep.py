"""Time one sweep against one `--model hf` run and against the separate runs that it replaces.

    python benchmarks/sweep.py [--limit 100] [--repeats 1]

The default model, stock arc_easy, fp32, batch 16, all in one process on one copy of the weights.
The grid: 31 layers of logit lens, SPADE and SPADE-NoS, the maps of the default lens and of a tuned
lens (`--tuned`), 20 thresholds. Seconds are those of the request phase, everything inside
`loglikelihood`. Separate runs: five of the grid's are timed, and their mean is multiplied by their
number, 31 x 3 + 14 x 2 + 20 = 141. Writes results/benchmarks/sweep.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from scoring import Case, evaluate, machine
from transformers import AutoModelForCausalLM, AutoTokenizer

from spade_eval.default_model import default_model_path
from spade_eval.fit.documents import load_tasks
from spade_eval.lenses import DEFAULT_LENS
from spade_eval.lm.exit import SpadeExitLM
from spade_eval.lm.layer import LogitLensLM, LSpadeLM, SpadeLayerLM
from spade_eval.memory import peak_memory
from spade_eval.sweep.grid import Ask, thresholds
from spade_eval.sweep.lm import SweepLM
from spade_eval.sweep.run import sweep
from spade_eval.sweep.settings import SweepSettings

SEPARATE: dict[str, tuple[Any, dict[str, Any]]] = {
    "logit_lens layer=15": (LogitLensLM, {"layer": 15}),
    "spade_layer layer=8": (SpadeLayerLM, {"layer": 8}),
    "spade_layer layer=22 start=none": (SpadeLayerLM, {"layer": 22, "start": "none"}),
    "l_spade layer=16": (LSpadeLM, {"layer": 16, "lens": DEFAULT_LENS}),
    "spade_exit threshold=3": (SpadeExitLM, {"threshold": 3.0, "lens": DEFAULT_LENS}),
}
RUNS = 31 * 3 + 14 * 2 + 20
BARS = {"hf": 9, "separate": 4}


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/sweep"))
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--tuned", help="folder of a tuned lens for the default model")
    args = parser.parse_args()
    folder = default_model_path()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    common = {"pretrained": model, "tokenizer": tokenizer, "batch_size": 16}
    case = Case("arc_easy", args.limit, 1.0)
    tasks = load_tasks(["arc_easy"], None)
    ask = Ask(thresholds=thresholds("0.2:4:0.2"), readouts=("spade",))
    maps = [("arc", str(DEFAULT_LENS)), *([("arc", args.tuned)] if args.tuned else [])]
    swept = SweepLM(ask=ask, maps=maps, **common)
    pairs = []
    whole = []
    for _ in range(args.repeats):
        _, one = evaluate(HFLM(**common), case)
        before = swept.account.seconds
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as place:
            settings = SweepSettings(Path(place) / "out", ("arc_easy",), ask, limit=args.limit)
            cells = sweep(swept, tasks, settings)
        whole.append(time.perf_counter() - begin)
        pairs.append((one, swept.account.seconds - before))
        sys.stderr.write(f"hf {one:.1f} s, sweep {pairs[-1][1]:.1f} s\n")
    peak = peak_memory()["peak_memory_mb"]
    apart = {
        name: evaluate(cls(**common, **arguments), case)[1]
        for name, (cls, arguments) in SEPARATE.items()
    }
    swept_seconds = statistics.median(b for _, b in pairs)
    report = {
        "machine": machine(),
        "items": args.limit,
        "cells": len(cells[cells["metric"] == "acc"]) if cells is not None else 0,
        "hf_seconds": [round(a, 1) for a, _ in pairs],
        "sweep_seconds": [round(b, 1) for _, b in pairs],
        "sweep_and_metrics_seconds": [round(w, 1) for w in whole],
        "against_hf": round(statistics.median(b / a for a, b in pairs), 2),
        "against_hf_bar": f"<= {BARS['hf']}",
        "separate_seconds": {name: round(s, 1) for name, s in apart.items()},
        "separate_extrapolated": round(statistics.mean(apart.values()) * RUNS, 0),
        "against_separate": round(statistics.mean(apart.values()) * RUNS / swept_seconds, 1),
        "against_separate_bar": f">= {BARS['separate']}",
        "peak_memory_mb": peak,
    }
    args.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [
        "# One sweep against the runs that it replaces", "",
        f"`python benchmarks/sweep.py --limit {args.limit} --repeats {args.repeats}"
        f"{' --tuned FOLDER' if args.tuned else ''}`", "",
        *(f"{k}: {v}  " for k, v in machine().items()), "",
        f"Stock arc_easy, {args.limit} items, request phase; the runs apart are extrapolated to "
        f"{RUNS} from five.", "",
        "| | |", "|---|---|",
        *(f"| {k} | {v} |" for k, v in report.items() if k != "machine"),
    ]  # fmt: skip
    args.output.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
