"""The command line of `spade-eval finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spade_eval.arguments import Parser, add_place, command_line, include_paths, model_arguments
from spade_eval.fit.lora_settings import LoraSettings, check_output

if TYPE_CHECKING:
    import argparse

    from spade_eval.adapter_files import Record

_EPILOG = """\
examples:
  spade-eval finetune --tasks spade_arc_easy,spade_arc_challenge --output adapters/arc
  spade-eval finetune --tasks spade_boolq --model_args pretrained=gpt2 --minutes 30 \\
      --output adapters/boolq
  spade-eval run --model spade_layer --model_args peft=adapters/arc,layer=-1 --tasks spade_arc_easy
  accelerate launch -m spade_eval finetune ...
"""


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    p = Parser(
        prog="spade-eval finetune",
        description="Train a LoRA adapter on the right answers of tasks, for peft= of all models.",
        epilog=_EPILOG,
    )
    d = LoraSettings
    p.add_argument(
        "--tasks", required=True, help="lm-eval tasks whose training documents are used, a,b,c"
    )
    p.add_argument("--output", required=True, type=Path, help="folder of the adapter")
    p.add_argument("--model_args", default="", help="as in lm_eval: pretrained=...,dtype=...")
    for name, kind, default, text in (
        ("--rank", int, d.rank, "r of the low-rank matrices"),
        ("--alpha", int, d.alpha, "their product is scaled by alpha / r"),
        ("--dropout", float, d.dropout, "on the input of the low-rank matrices"),
        ("--learning_rate", float, d.learning_rate, "after the warm-up"),
        ("--batch_size", int, d.batch_size, "documents per step"),
        ("--micro_batch_size", int, d.micro_batch_size, "documents at once; bounds memory"),
        ("--epochs", int, d.epochs, "passes over the documents, at most"),
        ("--validation_documents", int, d.validation_documents, "that choose the step, at most"),
        ("--seed", int, d.seed, "of order and first weights"),
    ):
        p.add_argument(name, type=kind, default=default, help=f"{text} (default: {default})")
    p.add_argument(
        "--validation_split",
        default=d.validation_split,
        help="split they come from, or a part of its rows as validation[:500] (default: "
        "%(default)s, or a tenth of the training documents where a task has none)",
    )
    p.add_argument("--max_steps", type=int, help="steps, at most")
    p.add_argument(
        "--minutes", type=float, help="of training, at most; the learning rate then stays constant"
    )
    p.add_argument(
        "--precision",
        default=d.precision,
        choices=["auto", "float32", "bfloat16"],
        help="of matrix products; auto takes bfloat16 where it is faster (default: auto)",
    )
    add_place(p)
    p.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    p.add_argument("--overwrite", action="store_true", help="replace the adapter that is there")
    return p


def main(argv: list[str]) -> int:
    """Run `spade-eval finetune`.

    Args:
        argv: The arguments behind "finetune".
    """
    args = parser().parse_args(argv)
    settings = LoraSettings(
        output=args.output.expanduser(),
        tasks=tuple(args.tasks.split(",")),
        **{
            name: getattr(args, name)
            for name in LoraSettings.__dataclass_fields__
            if name not in ("output", "tasks")
        },
    )
    check_output(settings, args.resume, args.overwrite)
    # Loading lm-eval takes seconds; bad arguments have been told by now.
    from accelerate import PartialState
    from lm_eval.utils import setup_logging

    from spade_eval.fit.lora_run import finetune
    from spade_eval.lm.layer import LogitLensLM

    setup_logging()
    lm = LogitLensLM(**{"batch_size": 16, **model_arguments(args), "layer": -1})
    record = finetune(
        lm,
        settings,
        resume=args.resume,
        overwrite=args.overwrite,
        include_path=include_paths(args),
        command=command_line("finetune", argv),
    )
    if PartialState().is_main_process:
        print(table(record))
        print(f"\nAdapter: {args.output}")
    return 0


def table(record: Record) -> str:
    """Accuracy before and after."""
    import pandas as pd

    from spade_eval.adapter_files import accuracies

    frame = pd.DataFrame(accuracies(record), columns=["task", "before", "after", "documents"])
    return frame.to_string(index=False)
