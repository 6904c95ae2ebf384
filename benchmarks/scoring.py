"""Time the scoring engine against `--model hf`, and layer 22 against all layers.

    python benchmarks/scoring.py --output results/benchmarks/scoring [--repeats 3] [--cases boolq]

The default model, real benchmarks. The two sides of a case run in turn in one process, on one copy
of the weights, after one run each that is not counted. What is timed is the request phase:
everything inside `loglikelihood` or `loglikelihood_rolling`, tokenisation included. The ratio is
the median over the pairs. Peak memory is that of a process of its own per side. Writes OUTPUT.json
and OUTPUT.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lm_eval
import torch
import transformers
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from spade_eval import __version__
from spade_eval.default_model import default_model_path
from spade_eval.lm.layer import SpadeLayerLM
from spade_eval.machine import machine as hardware

SIDES = {
    "hf": (HFLM, {}),
    "layer=30": (SpadeLayerLM, {"layer": 30}),
    "layer=22": (SpadeLayerLM, {"layer": 22}),
}


@dataclass(frozen=True)
class Case:
    """One comparison: `slow` over `fast`, hoped to be at least `bar`."""

    task: str
    limit: int
    bar: float
    slow: str = "hf"
    fast: str = "layer=30"
    few_shot: int | None = None
    settings: dict[str, Any] = field(default_factory=lambda: {"batch_size": 16})


CASES = {
    "arc_easy": Case("arc_easy", 200, 2.9),
    "headqa_en": Case("headqa_en", 200, 2.0),
    "boolq": Case("boolq", 100, 1.2),
    "wikitext": Case("wikitext", 4, 1.1, settings={"batch_size": 4, "max_length": 2048}),
    "arc_easy 5-shot": Case("arc_easy", 50, 2.5, few_shot=5),
    "arc_easy layers": Case("arc_easy", 200, 1.12, slow="layer=30", fast="layer=22"),
    "boolq layers": Case("boolq", 100, 1.25, slow="layer=30", fast="layer=22"),
}


def build(side: str, case: Case, model: Any, tokenizer: Any) -> Any:
    """The LM object of one side, on a model that is loaded already."""
    cls, arguments = SIDES[side]
    return cls(pretrained=model, tokenizer=tokenizer, **arguments, **case.settings)


def evaluate(lm: Any, case: Case, manager: Any = None) -> tuple[dict[str, Any], float]:
    """Run a case; returns the results and the seconds spent on its requests.

    `manager` is lm-eval's `TaskManager`; making one takes seconds.
    """
    seconds = 0.0
    for name in ("loglikelihood", "loglikelihood_rolling"):
        method = getattr(type(lm), name)

        def timed(*args: Any, method: Any = method, **kwargs: Any) -> Any:
            nonlocal seconds
            begin = time.perf_counter()
            try:
                return method(lm, *args, **kwargs)
            finally:
                seconds += time.perf_counter() - begin

        setattr(lm, name, timed)
    results = simple_evaluate(
        model=lm,
        tasks=[case.task],
        limit=case.limit,
        num_fewshot=case.few_shot,
        bootstrap_iters=0,
        task_manager=manager,
    )
    return results, seconds


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Largest difference of two runs' log-likelihoods."""
    worst = 0.0
    for task, samples in theirs["samples"].items():
        for a, b in zip(ours["samples"][task], samples, strict=True):
            for x, y in zip(a["filtered_resps"], b["filtered_resps"], strict=True):
                x, y = (v[0] if isinstance(v, tuple | list) else v for v in (x, y))
                worst = max(worst, abs(float(x) - float(y)))
    return worst


def compare(case: Case, repeats: int, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Run both sides of a case in turn."""
    slow, fast = build(case.slow, case, model, tokenizer), build(case.fast, case, model, tokenizer)
    first, second = evaluate(slow, case)[0], evaluate(fast, case)[0]  # warm-up
    pairs = [(evaluate(slow, case)[1], evaluate(fast, case)[1]) for _ in range(repeats)]
    report: dict[str, Any] = {
        "slow": case.slow,
        "fast": case.fast,
        "limit": case.limit,
        "seconds": pairs,
        "ratio": round(statistics.median(a / b for a, b in pairs), 3),
        "ratios": [round(a / b, 3) for a, b in pairs],
        "bar": case.bar,
    }
    if case.slow == "hf":
        report["max_difference"] = difference(second, first)
    return report


def peak_flops(dtype: torch.dtype) -> float:
    """The machine's best matrix product: operations per second, sustained, over square sizes."""
    best = 0.0
    for n in (1024, 2048, 4096):
        a, b = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
        a @ b
        done, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < 2.0:  # long enough to be sustained
            a @ b
            done += 2 * n**3
        best = max(best, done / (time.perf_counter() - begin))
    return best


def share_of_peak(case: Case, repeats: int, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Matrix-product operations per second of our full depth, against the machine's peak.

    The counter sees linear layers, not attention; attention's operations are left out. Runs and
    products take turns, as a machine's speed drifts.
    """
    lm = build("layer=30", case, model, tokenizer)
    evaluate(lm, case)
    with FlopCounterMode(display=False) as counter:
        evaluate(lm, case)
    pairs = []
    for _ in range(repeats):
        reached = counter.get_total_flops() / evaluate(lm, case)[1]
        pairs.append((reached / 1e9, peak_flops(model.dtype) / 1e9))
    reached, peak = (statistics.median(side) for side in zip(*pairs, strict=True))
    return {
        "dtype": str(model.dtype),
        "gflops": round(reached, 1),
        "peak_gflops": round(peak, 1),
        "share": round(statistics.median(a / b for a, b in pairs), 3),
        "shares": [round(a / b, 3) for a, b in pairs],
    }


def peak_memory(side: str, case: Case) -> dict[str, int]:
    """Resident memory, in MB, of a process that runs one side: with the model loaded, and peak."""
    command = [sys.executable, __file__, "--memory-of", side, "--cases", case.task]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def resident() -> int:
    """Peak resident memory of this process, in MB (Linux; `getrusage` inherits the parent's)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def machine() -> dict[str, str]:
    """What the numbers depend on."""
    return {
        **hardware("cuda" if torch.cuda.is_available() else "cpu"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lm_eval": lm_eval.__version__,
        "spade_eval": __version__,
    }


def markdown(report: dict[str, Any], command: str) -> str:
    """The report as a page."""
    lines = ["# Scoring engine", "", f"`{command}`", ""]
    lines += [f"{k}: {v}  " for k, v in report["machine"].items()]
    lines += [
        "",
        "Request phase, fp32, default model, pairs of runs in turn, median of the pairs' ratios.",
        "",
    ]
    heads = "case, items, slow / fast, seconds (medians), ratio, pairs, bar, largest difference"
    lines += [f"| {heads.replace(', ', ' | ')} |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name, case in report["cases"].items():
        slow, fast = (statistics.median(s) for s in zip(*case["seconds"], strict=True))
        gap = f"{case['max_difference']:.1e}" if "max_difference" in case else ""
        lines.append(
            f"| {name} | {case['limit']} | {case['slow']} / {case['fast']} "
            f"| {slow:.2f} / {fast:.2f} | "
            f"**{case['ratio']:.2f}** | {', '.join(f'{r:.2f}' for r in case['ratios'])} | "
            f"{case['bar']} | {gap} |"
        )
    if peak := report.get("peak"):
        lines += [
            "",
            "| dtype | linear layers, GFLOP/s | best square product | share | pairs |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {p['dtype']} | {p['gflops']} | {p['peak_gflops']} | {p['share']:.0%} "
            f"| {', '.join(f'{share:.0%}' for share in p['shares'])} |"
            for p in peak
        ]
    if memory := report.get("memory"):
        lines += ["", "| arc_easy, batch 16 | model loaded, MB | peak, MB |", "|---|---|---|"]
        lines += [f"| {side} | {m['loaded']} | {m['peak']} |" for side, m in memory.items()]
        ratio = memory["layer=30"]["peak"] / memory["hf"]["peak"]
        lines += ["", f"Peak memory, ours over hf: {ratio:.2f}"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/scoring"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = default_model_path()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = args.cases.split(",")
    if args.memory_of:
        loaded = resident()
        with contextlib.redirect_stdout(sys.stderr):
            evaluate(build(args.memory_of, CASES[names[0]], model, tokenizer), CASES[names[0]])
        sys.stdout.write(json.dumps({"loaded": loaded, "peak": resident()}))
        return
    report: dict[str, Any] = {"machine": machine(), "cases": {}}
    for name in names:
        report["cases"][name] = compare(CASES[name], args.repeats, model, tokenizer)
        sys.stderr.write(f"{name}: {report['cases'][name]['ratio']}\n")
    if "arc_easy" in names:
        case = CASES["arc_easy"]
        report["memory"] = {side: peak_memory(side, case) for side in ("hf", "layer=30")}
        report["peak"] = [
            share_of_peak(case, args.repeats, model.to(dtype), tokenizer)
            for dtype in (torch.float32, torch.bfloat16)
        ]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    command = f"python benchmarks/scoring.py --repeats {args.repeats} --cases '{args.cases}'"
    args.output.with_suffix(".md").write_text(markdown(report, command))


if __name__ == "__main__":
    main()
