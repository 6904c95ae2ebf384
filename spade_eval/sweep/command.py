"""The command line of `spade-eval sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spade_eval.arguments import (
    Parser,
    add_place,
    command_line,
    include_paths,
    layer_numbers,
    model_arguments,
)
from spade_eval.confidence import CONFIDENCES
from spade_eval.errors import UserError
from spade_eval.splits import Split
from spade_eval.sweep.grid import DECODERS, Ask, thresholds
from spade_eval.sweep.settings import SweepSettings, check_output

if TYPE_CHECKING:
    import argparse

    import pandas as pd

_EPILOG = """\
examples:
  spade-eval sweep --tasks arc_easy,boolq --limit 100 --output sweeps/smollm2
  spade-eval sweep --tasks arc_easy --decoders spade,logit_lens --layers 10,16,22 \\
      --thresholds none --output sweeps/few
  spade-eval sweep --tasks arc_easy,boolq,headqa_en --model_args pretrained=gpt2 \\
      --lens arc=lenses/arc,boolq=lenses/boolq --output sweeps/gpt2
  accelerate launch -m spade_eval sweep ...
"""


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    p = Parser(
        prog="spade-eval sweep",
        description="Every decoder at every layer, and every threshold, from one pass over each "
        "task; metrics are lm-eval's own.",
        epilog=_EPILOG,
    )
    p.add_argument("--tasks", required=True, help="lm-eval tasks that score, a,b,c")
    p.add_argument("--output", required=True, type=Path, help="folder of the table")
    p.add_argument("--decoders", help=f"{','.join(DECODERS)} (default: all that have their lens)")
    p.add_argument(
        "--layers",
        default="all",
        help="all, FROM:TO:STEP with TO excluded, or a list; 0 is the embedding (default: all)",
    )
    p.add_argument(
        "--thresholds",
        default="0.2:4:0.2",
        help="of exits: FROM:TO:STEP with TO included, a list, or none (default: %(default)s); "
        "probabilities need others than entropies, and a sweep of their own",
    )
    p.add_argument(
        "--confidence",
        default="entropy",
        help=f"of exits, one or more: {','.join(CONFIDENCES)} (default: entropy)",
    )
    p.add_argument(
        "--exit_scope", default="context", help="context,token,request (default: context)"
    )
    p.add_argument(
        "--readout",
        default="spade,lens",
        help="what answers after an exit: spade, lens, or spade,lens (default)",
    )
    p.add_argument("--interval", type=int, default=2, help="between candidates (default: 2)")
    p.add_argument("--min_layer", type=int, help="first candidate (default: half the layers)")
    p.add_argument(
        "--lens",
        help="NAME=FOLDER or hub id, several with commas (default: the default model's own)",
    )
    p.add_argument("--model_args", default="", help="as in lm_eval: pretrained=...,peft=...")
    p.add_argument(
        "--split",
        help="train, validation or test, or a part of their documents as validation[500:1000] "
        "(default: those that the task evaluates)",
    )
    p.add_argument("--limit", type=float, help="documents per task, as in lm_eval")
    p.add_argument("--num_fewshot", type=int, help="examples in the prompt, as in lm_eval")
    p.add_argument("--apply_chat_template", action="store_true", help="as in lm_eval")
    p.add_argument("--log_samples", action="store_true", help="also write every log-likelihood")
    p.add_argument(
        "--keep_states",
        action="store_true",
        help="also write the hidden states where the contexts of multiple-choice tasks end, at "
        "every layer, for the report's components and probes",
    )
    p.add_argument("--batch_size", default="16", help="sequences at once (default: 16)")
    add_place(p)
    p.add_argument("--seed", type=int, default=1234, help="of few-shot examples (default: 1234)")
    p.add_argument(
        "--bootstrap_iters",
        type=int,
        default=1000,
        help="for standard errors that have no formula (F1, LAMBADA's perplexity), of every cell; "
        "lm_eval's own default, 100,000, takes hours to days (default: %(default)s; 0: no standard "
        "error of any metric)",
    )
    p.add_argument("--resume", action="store_true", help="go on with a sweep that was stopped")
    p.add_argument("--overwrite", action="store_true", help="replace the table that is there")
    return p


def settings_of(args: argparse.Namespace) -> SweepSettings:
    """Parse once, at the edge.

    Raises:
        UserError: A value that cannot be meant.
    """
    if args.limit is not None and not args.limit > 0:
        raise UserError(f"--limit {args.limit}: give a number of documents, or a share below 1.")
    if args.split is not None:
        Split.parse(args.split)
    ask = Ask(
        decoders=_names(args.decoders) if args.decoders else None,
        layers=layers(args.layers),
        thresholds=thresholds(args.thresholds),
        confidences=_names(args.confidence),  # type: ignore[arg-type]  # Ask checks the names
        scopes=_names(args.exit_scope),  # type: ignore[arg-type]
        readouts=_names(args.readout),  # type: ignore[arg-type]
        interval=args.interval,
        min_layer=args.min_layer,
    )
    return SweepSettings(
        output=args.output.expanduser(),
        tasks=_names(args.tasks),
        ask=ask,
        model_args=args.model_args,
        lenses=named(args.lens),
        split=args.split,
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        apply_chat_template=args.apply_chat_template,
        log_samples=args.log_samples,
        keep_states=args.keep_states,
        batch_size=args.batch_size,
        seed=args.seed,
        bootstrap_iters=args.bootstrap_iters,
    )


def main(argv: list[str]) -> int:
    """Run `spade-eval sweep`.

    Args:
        argv: The arguments behind "sweep".
    """
    args = parser().parse_args(argv)
    settings = settings_of(args)
    check_output(settings, args.resume, args.overwrite)
    # Loading lm-eval takes seconds; bad arguments have been told by now.
    from lm_eval.utils import setup_logging

    from spade_eval.fit.documents import load_tasks
    from spade_eval.sweep.compute import require_scored
    from spade_eval.sweep.lm import SweepLM
    from spade_eval.sweep.run import sweep

    setup_logging()
    tasks = load_tasks(settings.tasks, include_paths(args))
    require_scored(tasks)
    lm = SweepLM(
        ask=settings.ask,
        maps=settings.lenses,
        **{"batch_size": settings.batch_size, **model_arguments(args)},
    )
    found = sweep(
        lm,
        tasks,
        settings,
        resume=args.resume,
        overwrite=args.overwrite,
        command=command_line("sweep", argv),
    )
    if found is not None:
        print(summary(found))
        print(f"\nTable: {settings.output}/sweep.csv and .parquet, {len(found)} lines")
    return 0


def summary(table: pd.DataFrame) -> str:
    """For each task's first metric: the whole model, and each decoder at some of its layers."""
    lines = []
    for task, own in table.groupby("task", sort=False):
        metric = own["metric"].iloc[0]
        fixed = own[(own["metric"] == metric) & own["threshold"].isna()]
        full = fixed[fixed["decoder"] == "full"].iloc[0]
        rest = fixed[fixed["decoder"] != "full"]
        names = rest["decoder"] + rest["lens_data"].map(lambda name: f" ({name})" if name else "")
        wide = rest.assign(decoder=names).pivot_table(
            index="decoder", columns="layer", values="value", sort=False
        )
        step = max(1, -(-wide.shape[1] // 10))  # what a terminal shows
        wide = wide[sorted(wide.columns)].iloc[:, ::-1].iloc[:, ::step].iloc[:, ::-1]
        lines.append(
            f"{task}, {metric}, {full['n']} documents: full model {full['value']:.4f}\n\n"
            + (wide.to_string(float_format=_short, na_rep="") if len(rest) else "")
        )
    return "\n\n".join(lines)


def _short(value: float) -> str:
    """Three digits behind the point; early lenses' perplexities have too many before it."""
    return f"{value:.3f}" if abs(value) < 1e6 else f"{value:.2e}"


def layers(text: str) -> tuple[int, ...] | None:
    """Read `--layers`: all, FROM:TO:STEP with TO excluded, or a list a,b,c.

    Raises:
        UserError: Not of this form.
    """
    if text == "all":
        return None
    found = tuple(layer_numbers(text))
    if not found:
        raise UserError(f"layers={text!r} names no layer.")
    return found


def named(text: str | None) -> tuple[tuple[str, str], ...]:
    """Read `--lens`: NAME=FOLDER pairs; a folder alone is called by its last part.

    Raises:
        UserError: An empty name or folder.
    """
    found = []
    for pair in _names(text) if text else ():
        name, equals, folder = pair.partition("=")
        if not equals:
            name, folder = Path(pair).name, pair
        if not name or not folder:
            raise UserError(f"--lens {pair}: write NAME=FOLDER, several with commas.")
        found.append((name, folder))
    return tuple(found)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
