"""The command line of `spade-eval calibrate`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from spade_eval.arguments import Parser, add_place, command_line, include_paths, model_arguments
from spade_eval.atomic import write_json
from spade_eval.calibration import NAME, WORD
from spade_eval.errors import UserError
from spade_eval.exits import DEFAULTS, ExitRule
from spade_eval.splits import Split

if TYPE_CHECKING:
    import argparse

    import pandas as pd

    from spade_eval.calibration import Calibration
    from spade_eval.sweep.calibrate import CalibrateSettings

_EPILOG = """\
example:
  spade-eval calibrate --tasks spade_arc_easy --max-drop 0.03 \\
      --model_args peft=adapters/arc,lens=lenses/arc,confidence=choice_entropy
  spade-eval run --model spade_exit --tasks spade_arc_easy \\
      --model_args peft=adapters/arc,lens=lenses/arc,threshold=calibrated
"""


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    p = Parser(
        prog="spade-eval calibrate",
        description="Find the threshold that saves most while the share of documents that the full "
        "model answers right and the exit run wrong stays below --max-drop, with probability "
        "--confidence (Learn then Test).",
        epilog=_EPILOG,
    )
    p.add_argument("--tasks", required=True, help="lm-eval tasks with the metric acc, a,b,c")
    p.add_argument(
        "--split",
        default="validation",
        help="whose documents, or which of them as validation[500:] (default: %(default)s)",
    )
    p.add_argument("--max-drop", type=float, required=True, help="bound on the risk: 0.03, say")
    p.add_argument(
        "--confidence",
        type=float,
        default=0.95,
        help="probability of the guarantee (default: %(default)s); what an exit compares with its "
        "threshold goes into --model_args, as confidence=max_prob",
    )
    p.add_argument(
        "--model_args",
        default="",
        help="those of --model spade_exit, without the threshold; "
        "readout=lens makes them those of lens_exit",
    )
    p.add_argument("--output", type=Path, default=Path(NAME), help="file (default: %(default)s)")
    p.add_argument("--limit", type=float, help="documents per task, as in lm_eval")
    p.add_argument("--num_fewshot", type=int, help="examples in the prompt, as in lm_eval")
    p.add_argument("--apply_chat_template", action="store_true", help="as in lm_eval")
    p.add_argument("--batch_size", default="16", help="sequences at once (default: 16)")
    add_place(p)
    p.add_argument("--overwrite", action="store_true", help="replace the file that is there")
    return p


def main(argv: list[str]) -> int:
    """Run `spade-eval calibrate`.

    Args:
        argv: The arguments behind "calibrate".

    Returns:
        0; or 1 if no threshold meets the bound.
    """
    args = parser().parse_args(argv)
    args.output = args.output.expanduser()
    Split.parse(args.split)
    for name, value in (("--max-drop", args.max_drop), ("--confidence", args.confidence)):
        if not 0 < value < 1:
            raise UserError(f"{name} {value}: give a number between 0 and 1.")
    if args.limit is not None and args.limit <= 0:
        raise UserError(f"--limit {args.limit:g}: give a number of documents, or a share below 1.")
    if args.output.is_dir() or (args.output.exists() and not args.overwrite):
        raise UserError(f"{args.output} exists. Give another file as --output, or --overwrite.")
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise UserError(f"--output {args.output} cannot be written: {err.strerror}.") from err
    if not os.access(args.output.parent, os.W_OK):
        raise UserError(f"--output {args.output}: its folder cannot be written.")
    # Loading lm-eval takes seconds; bad arguments have been told by now.
    from lm_eval.utils import setup_logging

    from spade_eval.fit.documents import load_tasks
    from spade_eval.lens import LinearLens
    from spade_eval.sweep.calibrate import CalibrateSettings, calibrate, grid_of_thresholds
    from spade_eval.sweep.compute import require_scored
    from spade_eval.sweep.grid import Ask
    from spade_eval.sweep.lm import SweepLM

    model_args = model_arguments(args)
    if "threshold" in model_args:
        raise UserError("--model_args threshold=...: it is what will be found. Leave it out.")
    rule = DEFAULTS | {name: model_args.pop(name) for name in DEFAULTS if name in model_args}
    # The rule's own checks, and numbers as it writes them.
    checked = ExitRule(0.0, **{name: rule[name] for name in rule if name != "positions"})
    rule |= {"interval": checked.interval, "min_layer": checked.min_layer}
    lens = model_args.pop("lens", None)
    identity = lens == "identity"
    if lens is None and "pretrained" in model_args:
        raise UserError(
            "--model_args lens=FOLDER is missing: the maps that ship with the package are those of "
            "the default model. Fit some with `spade-eval fit`, or give lens=identity,readout=lens."
        )
    maps = [] if lens is None or identity else [("lens", LinearLens.from_pretrained(lens))]
    kind = "logit_lens" if identity else maps[0][1].config.decoder if maps else "l_spade"
    if kind != "l_spade" and rule["readout"] == "spade":
        raise UserError(
            f"lens={lens} goes with readout=lens: SPADE's exits are those of an L-SPADE lens."
        )
    setup_logging()
    names = tuple(args.tasks.split(","))
    tasks = load_tasks(names, include_paths(args))
    require_scored(tasks)
    ask = Ask(
        decoders=(kind, "spade") if rule["readout"] == "spade" else (kind,),
        layers=(),
        thresholds=grid_of_thresholds(rule["confidence"]),
        confidences=(rule["confidence"],),
        scopes=(rule["exit_scope"],),
        readouts=(rule["readout"],),
        interval=rule["interval"],
        min_layer=rule["min_layer"],
    )
    lm = SweepLM(
        ask=ask, maps=maps, positions=rule["positions"],
        **{"batch_size": args.batch_size, **model_args},
    )  # fmt: skip
    settings = CalibrateSettings(
        tasks=names,
        split=args.split,
        max_drop=args.max_drop,
        confidence=args.confidence,
        rule=rule,
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        apply_chat_template=args.apply_chat_template,
    )
    found, curve = calibrate(
        lm, tasks, settings, command_line("calibrate", argv), include_paths(args)
    )
    print(report(found, curve, settings))
    if found is None:
        return 1
    write_json(args.output, found.to_json())
    place = "" if args.output == Path(NAME) else f",calibration={args.output}"
    model = "lens_exit" if rule["readout"] == "lens" else "spade_exit"
    print(f"\nWritten to {args.output}; use it with --model {model}, threshold={WORD}{place}.")
    return 0


def report(found: Calibration | None, curve: pd.DataFrame, settings: CalibrateSettings) -> str:
    """The curve around the threshold, and what it means."""
    from spade_eval.sweep.certify import least_drop

    n = curve.attrs["documents"]
    # The last of rows that say the same: there the next threshold changes something.
    changed = curve.drop_duplicates(["harmed", "acc", "mean_exit_layer"], keep="last")
    step = max(1, -(-len(changed) // 20))
    kept = changed.index.isin(changed.index[::step])
    if found is not None:
        kept |= changed["threshold"] == found.threshold
    shown = changed[kept].to_string(index=False, float_format=lambda x: f"{x:.4f}")
    shown += (
        f"\n\n{n} documents; the smallest drop that so many can certify with a confidence of "
        f"{settings.confidence} is {least_drop(n, settings.confidence):.4f}."
    )
    if found is None:
        return (
            f"{shown}\nNo threshold meets the bound: already the most cautious one harms too many "
            f"documents to certify a drop of {settings.max_drop}. Allow a larger drop, or give "
            "more documents."
        )
    row = curve[curve["threshold"] == found.threshold].iloc[0]
    return (
        f"{shown}\nthreshold={found.threshold}: of {found.documents} documents, {found.harmed} are "
        f"answered right by the full model and wrong after an exit. With probability "
        f"{found.confidence}, at most a share of {found.max_drop} of such documents is. Net drop "
        f"in accuracy {found.net_drop:.4f} (no guarantee), mean exit layer "
        f"{row['mean_exit_layer']}, {row['token_layer_ratio']:.1%} of full depth computed."
    )
