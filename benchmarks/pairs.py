r"""Time exits of any model against its own full depth and against `--model hf`, run after run.

    python benchmarks/pairs.py --model_args pretrained=...,dtype=bfloat16,peft=DIR --lens DIR \
        --tasks spade_arc_easy --limit 500 --batch_size 64 --output results/benchmarks/NAME \
        --exits threshold=1.0 threshold=1.2,confidence=choice_entropy

Every round runs full depth (`spade_layer`, `layer=-1`), every setting of `spade_exit` and, with
`--hf`, `--model hf`, in turn and on one copy of the weights; one round before them is not counted.
What is timed is the request phase, tokenisation included. Ratios are full depth over the setting in
the same round, medians over the rounds. With `--random` the weights are random and only the shape
is the model's: what stops where is then up to `threshold=1e9,min_layer=N`. Writes OUTPUT.json and
OUTPUT.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from exits import page
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import simple_parse_args_string
from peft import PeftModel
from scoring import machine
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from spade_eval.arguments import tasks_path
from spade_eval.cost import Account
from spade_eval.lm.exit import SpadeExitLM
from spade_eval.lm.layer import SpadeLayerLM

HF, FULL = "hf", "full depth"


def load(arguments: dict[str, Any], device: str, random: bool) -> tuple[Any, Any]:
    """A model on its device, and its tokenizer."""
    source, dtype = arguments["pretrained"], getattr(torch, arguments.get("dtype", "float32"))
    tokenizer = AutoTokenizer.from_pretrained(arguments.get("tokenizer", source))
    if random:
        with torch.device(device):
            config = AutoConfig.from_pretrained(source)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(device)
    if "peft" in arguments:
        model = PeftModel.from_pretrained(model, arguments["peft"])
    return model.eval(), tokenizer


def first_run(lm: Any, task: str, limit: int | None, manager: Any) -> tuple[list[Any], float]:
    """The requests of a task, and the accuracy on them."""
    requests: list[Any] = []
    ask = lm.loglikelihood

    def keep(asked: list[Any], **kwargs: Any) -> Any:
        requests.extend(asked)
        return ask(asked, **kwargs)

    lm.loglikelihood = keep
    results = simple_evaluate(
        model=lm, tasks=[task], limit=limit, bootstrap_iters=0, task_manager=manager
    )
    del lm.loglikelihood
    return requests, results["results"][task]["acc,none"]


def timed(lm: Any, requests: list[Any]) -> float:
    """Seconds of the request phase."""
    if isinstance(lm, SpadeLayerLM | SpadeExitLM):
        lm.account = Account()
    begin = time.perf_counter()
    lm.loglikelihood(requests, disable_tqdm=True)
    return time.perf_counter() - begin


def compare(
    sides: dict[str, Any], task: str, args: argparse.Namespace, manager: Any
) -> list[dict[str, Any]]:
    """One task: every side once uncounted, then rounds of all sides in turn."""
    accuracy, memory = {}, {}
    for name, lm in sides.items():
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        requests, accuracy[name] = first_run(lm, task, args.limit, manager)
        if torch.cuda.is_available():
            memory[name] = torch.cuda.max_memory_allocated() // 2**20
    rounds = [{name: timed(lm, requests) for name, lm in sides.items()} for _ in range(args.rounds)]
    rows = []
    for name, lm in sides.items():
        account = {} if name == HF else lm.account.report()
        ratios = [each[FULL] / each[name] for each in rounds]
        rows.append(
            {
                "task": task,
                "requests": len(requests),
                "side": name,
                "seconds": round(statistics.median(each[name] for each in rounds), 3),
                "full depth / it": round(statistics.median(ratios), 3),
                "token-layers": account.get("implied_speedup", ""),
                "mean exit layer": account.get("mean_exit_layer") or "",
                "acc": round(accuracy[name], 4),
                "peak MiB": memory.get(name, ""),
                "rounds": " ".join(f"{ratio:.2f}" for ratio in ratios),
            }
        )
        sys.stderr.write(f"{rows[-1]}\n")
    return rows


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model_args", required=True)
    parser.add_argument("--random", action="store_true", help="random weights")
    parser.add_argument("--lens", required=True)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--exits", nargs="+", required=True, help="arguments of spade_exit")
    parser.add_argument("--hf", action="store_true", help="time --model hf too")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    arguments = simple_parse_args_string(args.model_args)
    model, tokenizer = load(arguments, args.device, args.random)
    common = {"pretrained": model, "tokenizer": tokenizer, "batch_size": args.batch_size}
    sides: dict[str, Any] = {HF: HFLM(**common)} if args.hf else {}
    sides[FULL] = SpadeLayerLM(layer=-1, **common)
    for setting in args.exits:
        given = simple_parse_args_string(setting)
        sides[setting] = SpadeExitLM(lens=args.lens, **common, **given)
    manager = TaskManager(include_path=str(tasks_path()))
    rows = [row for task in args.tasks.split(",") for row in compare(sides, task, args, manager)]
    command = shlex.join(["python", "benchmarks/pairs.py", *sys.argv[1:]])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"command": command, "machine": machine(), "rows": rows}, indent=1)
    args.output.with_suffix(".json").write_text(text + "\n")
    about = (
        "Seconds of the request phase; full depth over each side in the same round, medians of "
        f"{args.rounds} rounds on {args.device}, after one that is not counted. Weights: "
        f"{'random' if args.random else 'those of the model'}."
    )
    args.output.with_suffix(".md").write_text(page("Exits on the clock", command, about, rows))


if __name__ == "__main__":
    main()
