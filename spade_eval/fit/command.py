"""The command line of `spade-eval fit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spade_eval.arguments import Parser, add_place, command_line, include_paths, model_arguments
from spade_eval.errors import UserError
from spade_eval.fit.settings import FitSettings, check_output
from spade_eval.splits import Split

if TYPE_CHECKING:
    import argparse

    from spade_eval.lens import LinearLens

_EPILOG = """\
examples:
  spade-eval fit --decoder l_spade --tasks arc_easy --output lenses/arc
  spade-eval fit --decoder tuned_lens --tasks arc_easy,boolq --model_args pretrained=gpt2 \\
      --output lenses/gpt2
  spade-eval fit --decoder l_spade --text corpus.jsonl --layers 8:30:2 --rank 64 --output lenses/c
  accelerate launch -m spade_eval fit ...
"""


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    p = Parser(
        prog="spade-eval fit",
        description="Fit a lens: one linear map per layer, for --model l_spade, tuned_lens and "
        "spade_exit.",
        epilog=_EPILOG,
    )
    p.add_argument(
        "--decoder",
        required=True,
        choices=["l_spade", "tuned_lens"],
        help="taught by SPADE, or by the full model",
    )
    p.add_argument("--output", required=True, type=Path, help="folder of the lens")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--tasks", help="lm-eval tasks whose training documents are used, a,b,c")
    source.add_argument("--text", type=Path, help='.jsonl with a "text" per line, or plain text')
    p.add_argument(
        "--split",
        default=FitSettings.split,
        help="split of the tasks, or a part of its rows as train[:5000] (default: %(default)s)",
    )
    p.add_argument("--model_args", default="", help="as in lm_eval: pretrained=...,dtype=...")
    p.add_argument(
        "--layers",
        help="FROM:TO:STEP with TO excluded, a list a,b,c, or all (default: the even ones)",
    )
    p.add_argument("--rank", type=int, help="rank of the maps (default: full)")
    p.add_argument(
        "--positions",
        default=FitSettings.positions,
        choices=["all", "answer"],
        help="train on all positions after the first, or on those that score the answer",
    )
    for name, text in (
        ("max_positions", "positions to train on, at most"),
        ("epochs", "passes over them; 0 is ridge alone"),
        ("seed", "of the documents' order"),
    ):
        default = getattr(FitSettings, name)
        p.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    p.add_argument(
        "--dtype",
        default=FitSettings.dtype,
        choices=["float32", "bfloat16"],
        help="of the saved maps (default: %(default)s)",
    )
    p.add_argument("--batch_size", default="16", help="sequences at once (default: 16)")
    add_place(p)
    p.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    p.add_argument("--overwrite", action="store_true", help="replace the lens that is there")
    return p


def main(argv: list[str]) -> int:
    """Run `spade-eval fit`.

    Args:
        argv: The arguments behind "fit".
    """
    args = parser().parse_args(argv)
    for name, least in (("max_positions", 10), ("epochs", 0), ("rank", 1), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: give a whole number from {least} up.")
    Split.parse(args.split)
    if args.text is not None and not args.text.is_file():
        raise UserError(f"--text {args.text}: there is no such file.")
    settings = FitSettings(
        decoder=args.decoder,
        output=args.output.expanduser(),
        tasks=tuple(args.tasks.split(",")) if args.tasks else (),
        text=args.text,
        split=args.split,
        layers=args.layers,
        positions=args.positions,
        max_positions=args.max_positions,
        rank=args.rank,
        epochs=args.epochs,
        seed=args.seed,
        dtype=args.dtype,
    )
    check_output(settings, args.resume, args.overwrite)
    # Loading lm-eval takes seconds; bad arguments have been told by now.
    from lm_eval.utils import setup_logging

    from spade_eval.fit.run import fit
    from spade_eval.lm.base import SpadeLM

    setup_logging()
    lm = SpadeLM(**{"batch_size": args.batch_size, **model_arguments(args)})
    lens = fit(
        lm,
        settings,
        resume=args.resume,
        overwrite=args.overwrite,
        include_path=include_paths(args),
        command=command_line("fit", argv),
    )
    if lm.rank == 0:
        print(table(lens))
        print(f"\nLens: {args.output}")
    return 0


def table(lens: LinearLens) -> str:
    """What each map reaches on held-out positions beside the logit lens, and the bill."""
    import pandas as pd

    names = {
        "ce": "CE",
        "kl": "KL",
        "ce_ridge": "CE ridge",
        "penalty": "its penalty",
        "logit_lens_ce": "CE logit lens",
        "agree_teacher": "= teacher",
        "logit_lens_agree_teacher": "logit lens = teacher",
        "agree_full": "= full model",
        "logit_lens_agree_full": "logit lens = full model",
        "entropy": "entropy",
    }
    frame = pd.DataFrame.from_dict(lens.config.metrics, orient="index")[list(names)]
    frame = frame.rename(columns=names).rename_axis("layer")
    config, bill = lens.config, lens.config.bill
    return (
        f"{frame.to_string(float_format=lambda x: f'{x:.3f}')}\n\n"
        f"Held-out positions; CE, KL and entropy in nats. Training: {config.documents} documents, "
        f"{config.n_positions} positions, {config.tokens} model tokens; "
        f"{bill['seconds_states']:.0f} s for states, {bill['seconds_training']:.0f} s for maps, "
        f"peak memory {bill['peak_memory_mb']} MB"
        + (f", {gpu} MB on the GPU." if (gpu := bill.get("peak_gpu_memory_mb")) else ".")
    )
