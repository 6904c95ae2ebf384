"""Time generation with exits against the model's own `generate`.

    python benchmarks/generation.py [--repeats 3] [--part one|overhead|thresholds]

The default model with its own lens, fp32, greedy, EOS ignored, prompts cut from the articles under
tasks/data; all in one process on one copy of the weights, pairs of runs in turn, medians of the
pairs' ratios.

- one: the first token after 300-token prompts, everything at layer 20 of 30;
- overhead: 64 tokens with a threshold that nothing can meet;
- thresholds: 64 tokens at thresholds that were fixed beforehand, with all candidate layers (16, 18,
  ... 28) and with layer 20 alone, since every check reads the whole head. Agreement is the share of
  tokens that the full model would have chosen after the same text.

Writes results/generation/PART.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from exits import page
from scoring import machine
from transformers import AutoTokenizer

from spade_eval.arguments import tasks_path
from spade_eval.causal_lm import SpadeExitForCausalLM
from spade_eval.default_model import default_model_path
from spade_eval.lenses import DEFAULT_LENS

if TYPE_CHECKING:
    from collections.abc import Callable

NEVER, ALL = -1.0, 1e9
THRESHOLDS = (0.5, 1.5, 2.5, 3.5, 5.0)


def prompts(tokenizer: Any, rows: int, tokens: int) -> dict[str, Any]:
    """Beginnings of different articles, all of one length."""
    found = []
    for line in (tasks_path() / "data" / "articles.train.jsonl").read_text().splitlines():
        ids = tokenizer.encode(json.loads(line)["page"])
        found += [ids[i : i + tokens] for i in range(0, len(ids) - tokens + 1, tokens)]
    ids = torch.tensor(found[:rows])
    if len(ids) < rows:
        raise SystemExit(f"the articles give {len(ids)} prompts of {tokens} tokens, not {rows}")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def seconds(run: Callable[[], Any]) -> float:
    """Wall-clock of a run."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def pair(model: SpadeExitForCausalLM, asked: dict[str, Any], repeats: int) -> dict[str, Any]:
    """The model's own `generate` and ours, in turn."""

    def theirs() -> Any:
        return model.model.generate(**asked)

    def ours() -> Any:
        return model.generate(**asked)

    seconds(theirs), seconds(ours)
    pairs = [(seconds(theirs), seconds(ours)) for _ in range(repeats)]
    ratios = [a / b for a, b in pairs]
    return {
        "generate, s": round(statistics.median(a for a, _ in pairs), 3),
        "exits, s": round(statistics.median(b for _, b in pairs), 3),
        "ratio": round(statistics.median(ratios), 3),
        "pairs": " ".join(f"{ratio:.2f}" for ratio in ratios),
    }


@torch.no_grad()
def agreement(model: SpadeExitForCausalLM, ids: torch.Tensor, width: int) -> float:
    """Share of the new tokens that the full model would have chosen after the same text."""
    chosen = model.model(ids, use_cache=False).logits[:, width - 1 : -1].argmax(-1)
    return float((chosen == ids[:, width:]).float().mean())


def account(model: SpadeExitForCausalLM) -> dict[str, Any]:
    """Mean exit layer of the last run, and the shares of what it computed."""
    run = model.last_run
    assert run is not None
    layers = [layer for row in run.exit_layers for layer in row]
    work = run.work
    done = sum(int(part.sum()) for part in (work.prompt, work.decode, work.backfilled, work.tail))
    return {
        "mean exit layer": round(statistics.mean(layers), 2),
        "back-filled share": round(int(work.backfilled.sum()) / done, 3),
        "checks per token": round(int(work.checks.sum()) / len(layers), 2),
    }


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("results/generation"))
    parser.add_argument("--part", choices=["one", "overhead", "thresholds"], default="one")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(default_model_path())
    never = SpadeExitForCausalLM.from_pretrained(threshold=NEVER, dtype=torch.float32)

    def build(threshold: float, **settings: Any) -> SpadeExitForCausalLM:
        return SpadeExitForCausalLM(never.model, threshold=threshold, lens=DEFAULT_LENS, **settings)

    def ask(rows: int, tokens: int, new: int) -> dict[str, Any]:
        fixed = {"do_sample": False, "max_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}
        return prompts(tokenizer, rows, tokens) | fixed

    rows: list[dict[str, Any]] = []

    def add(model: SpadeExitForCausalLM, setting: str, batch: int, tokens: int, new: int) -> None:
        asked = ask(batch, tokens, new)
        found = pair(model, asked, args.repeats)
        ids = model.generate(**asked)
        rows.append(
            {
                "setting": setting,
                "batch": batch,
                "prompt": tokens,
                "new": new,
                **found,
                "tokens/s": round(batch * new / found["exits, s"], 1),
                **account(model),
                "agreement": round(agreement(model, ids, tokens), 3),
            }
        )
        sys.stderr.write(f"{rows[-1]}\n")

    if args.part == "one":
        for batch in (1, 4):
            add(build(ALL, min_layer=20), "threshold=1e9,min_layer=20", batch, 300, 1)
    if args.part == "overhead":
        for batch in (1, 8):
            add(never, "threshold=-1", batch, 32, 64)
    if args.part == "thresholds":
        for threshold in THRESHOLDS:
            add(build(threshold), f"threshold={threshold}", 8, 32, 64)
        for threshold in THRESHOLDS:  # layer 20 is the only candidate
            add(build(threshold, interval=10), f"threshold={threshold},interval=10", 8, 32, 64)
    args.output.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    report = {"machine": machine(), "threads": threads, "rows": rows}
    (args.output / f"{args.part}.json").write_text(json.dumps(report, indent=1) + "\n")
    command = (
        f"OMP_NUM_THREADS={threads} python benchmarks/generation.py --repeats {args.repeats} "
        f"--part {args.part}"
    )
    about = (
        "Seconds of `generate`, the model's own over ours, pairs of runs in turn, medians. A ratio "
        "above 1 is faster than the model itself. Back-filled: the share of token-layers that "
        "exits had left out and a later, deeper token needed. Agreement: the share of tokens that "
        "the full model would have chosen after the same text."
    )
    text = page("Generation with exits: speed", command, about, rows)
    (args.output / f"{args.part}.md").write_text(text)


if __name__ == "__main__":
    main()
