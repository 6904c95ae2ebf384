"""Time SPADE-EXIT against our own full depth, and trace accuracy against cost.

    python benchmarks/exits.py [--repeats 3] [--limit 300] [--part speed|curves] [--tasks ...]

The default model with its own lens, fp32, batch 16, real benchmarks, all in one process on one copy
of the weights. "Full depth" is `spade_layer` with `layer=30`. Speed: pairs of runs in turn, medians
of the pairs' ratios of request-phase seconds, beside the ratio that the account's token-layers
imply. Curves: thresholds are fixed beforehand, the same for all tasks; nothing is tuned. Writes
results/exits/speed.{json,md} and results/exits/curves.{csv,md}.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lm_eval.tasks import TaskManager
from scoring import Case, evaluate, machine
from transformers import AutoModelForCausalLM, AutoTokenizer

from spade_eval.arguments import tasks_path
from spade_eval.cost import Account
from spade_eval.default_model import default_model_path
from spade_eval.lenses import DEFAULT_LENS
from spade_eval.lm.exit import SpadeExitLM
from spade_eval.lm.layer import SpadeLayerLM

NEVER, ALL = -1.0, 1e9
SPEED = {  # name: (arguments, bar by task)
    "threshold=-1": ({"threshold": NEVER}, {"arc_easy": 0.97, "boolq": 0.97}),
    "threshold=0": ({"threshold": 0.0}, {"arc_easy": 0.91, "boolq": 0.97}),
    "threshold=1e9,min_layer=20": (
        {"threshold": ALL, "min_layer": 20},
        {"arc_easy": 1.12, "boolq": 1.35},
    ),
    "threshold=2": ({"threshold": 2.0}, {}),
    "threshold=3": ({"threshold": 3.0}, {}),
    "threshold=3.5": ({"threshold": 3.5}, {}),
    "threshold=4": ({"threshold": 4.0}, {}),
    "threshold=5": ({"threshold": 5.0}, {}),
}
ITEMS = {"arc_easy": 100, "boolq": 60}
ENTROPY, CHOICE = (2.0, 3.0, 4.0), (0.5, 0.9, 1.2)
CURVES: list[tuple[dict[str, str], tuple[float, ...]]] = [
    ({"confidence": confidence, "readout": readout, "exit_scope": scope}, thresholds)
    for confidence, scope, thresholds in (
        ("entropy", "context", ENTROPY),
        ("choice_entropy", "context", CHOICE),
        ("entropy", "token", ENTROPY),
    )
    for readout in ("spade", "lens")
]

ONE_TOKEN = ("spade_arc_easy", "boolq")  # their answers are one decision: token is context there


@cache
def manager() -> TaskManager:
    """Lm-eval's tasks and ours."""
    return TaskManager(include_path=str(tasks_path()))


def run(lm: Any, case: Case) -> tuple[dict[str, Any], float, dict[str, Any]]:
    """Results, seconds of the request phase, and the account of this run alone."""
    lm.account = Account()
    results, seconds = evaluate(lm, case, manager())
    return results, seconds, lm.account.report()


def speed(build: Any, repeats: int, tasks: list[str]) -> list[dict[str, Any]]:
    """Every setting of `SPEED` in turn with full depth."""
    rows = []
    for task in tasks:
        case = Case(task, ITEMS[task], 1.0)
        full = build(None)
        run(full, case)
        for name, (arguments, bars) in SPEED.items():
            exits = build(arguments)
            account = run(exits, case)[2]
            pairs = [(run(full, case)[1], run(exits, case)[1]) for _ in range(repeats)]
            ratios = [a / b for a, b in pairs]
            realised = statistics.median(ratios)
            rows.append(
                {
                    "task": task,
                    "items": case.limit,
                    "setting": name,
                    "full depth, s": round(statistics.median(a for a, _ in pairs), 2),
                    "exits, s": round(statistics.median(b for _, b in pairs), 2),
                    "realised": round(realised, 3),
                    "implied": account["implied_speedup"],
                    "realised / implied": round(realised / account["implied_speedup"], 3),
                    "mean exit layer": account["mean_exit_layer"],
                    "bar": bars.get(task, ""),
                    "pairs": " ".join(f"{ratio:.2f}" for ratio in ratios),
                }
            )
            sys.stderr.write(f"{rows[-1]}\n")
    return rows


def hits(results: dict[str, Any], task: str) -> list[float]:
    """Accuracy of each document."""
    return [float(sample["acc"]) for sample in results["samples"][task]]


def paired(found: list[float], base: list[float]) -> dict[str, float]:
    """Two runs' accuracies on the same documents, and their difference with its standard error."""
    gaps = [a - b for a, b in zip(found, base, strict=True)]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0
    return {
        "acc_full": round(statistics.mean(base), 4),
        "acc": round(statistics.mean(found), 4),
        "difference": round(statistics.mean(gaps), 4),
        "paired_stderr": round(error, 4),
    }


def curves(build: Any, limit: int, tasks: list[str], path: Path) -> list[dict[str, Any]]:
    """Every curve of `CURVES` on every task, beside full depth; rows are written at once."""
    rows: list[dict[str, Any]] = []
    for task in tasks:
        case = Case(task, limit, 1.0)
        run(build(None), Case(task, 16, 1.0))  # the first run of a process is slower
        for setting, thresholds in CURVES:
            if setting["exit_scope"] == "token" and task in ONE_TOKEN:
                continue
            results, full_seconds, _ = run(build(None), case)
            base = hits(results, task)
            for threshold in thresholds:
                results, seconds, account = run(build({**setting, "threshold": threshold}), case)
                found = hits(results, task)
                rows.append(
                    {
                        "task": task,
                        "items": len(found),
                        **setting,
                        "threshold": threshold,
                        **paired(found, base),
                        "mean_exit_layer": account["mean_exit_layer"],
                        "mean_row_exit_layer": account["mean_row_exit_layer"],
                        "token_layer_ratio": account["token_layer_ratio"],
                        "wall_clock_ratio": round(seconds / full_seconds, 3),
                    }
                )
                pd.DataFrame(rows).to_csv(path, index=False)
                sys.stderr.write(f"{rows[-1]}\n")
    return rows


def page(title: str, command: str, about: str, rows: list[dict[str, Any]]) -> str:
    """A table as a page."""
    heads = list(rows[0])
    lines = [f"# {title}", "", f"`{command}`", ""]
    lines += [f"{k}: {v}  " for k, v in machine().items()]
    lines += ["", about, "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    lines += [f"| {' | '.join(str(row[head]) for head in heads)} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("results/exits"))
    parser.add_argument("--part", choices=["speed", "curves"], default="speed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--tasks")
    parser.add_argument("--lens", default=str(DEFAULT_LENS))
    args = parser.parse_args()
    folder = default_model_path()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def build(arguments: dict[str, Any] | None) -> Any:
        common = {"pretrained": model, "tokenizer": tokenizer, "batch_size": 16}
        if arguments is None:
            return SpadeLayerLM(layer=-1, **common)
        return SpadeExitLM(lens=args.lens, **common, **arguments)

    args.output.mkdir(parents=True, exist_ok=True)
    known = (
        list(ITEMS)
        if args.part == "speed"
        else ["arc_easy", "headqa_en", "spade_arc_easy", "boolq"]
    )
    tasks = args.tasks.split(",") if args.tasks else known
    if args.part == "speed":
        rows = speed(build, args.repeats, tasks)
        text = json.dumps({"machine": machine(), "rows": rows}, indent=1)
        (args.output / "speed.json").write_text(text + "\n")
        about = (
            "Seconds of the request phase; full depth over exits, pairs of runs in turn, medians. "
            "`implied` is what the account's token-layers promise, checks, heads and tails counted."
        )
        command = f"python benchmarks/exits.py --part speed --repeats {args.repeats}"
        (args.output / "speed.md").write_text(page("SPADE-EXIT: speed", command, about, rows))
    else:
        rows = curves(build, args.limit, tasks, args.output / "curves.csv")
        about = (
            "First items of each task's evaluation split, zero-shot. `difference` is the accuracy "
            "less that of full depth on the same items. Wall-clock: single runs, three thresholds "
            "against the run at full depth before them. Where answers are one token, deciding by "
            "token is deciding by context."
        )
        command = f"python benchmarks/exits.py --part curves --limit {args.limit}"
        (args.output / "curves.md").write_text(page("SPADE-EXIT: curves", command, about, rows))


if __name__ == "__main__":
    main()
