"""The command lines of `spade-eval report`, `spade-eval compare` and `spade-eval check`."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from spade_eval.arguments import Parser
from spade_eval.errors import UserError, require_known

if TYPE_CHECKING:
    from spade_eval.report.runs import Run

_REPORT = """\
Make tables (CSV, Markdown, LaTeX), figures (PNG, PDF, and their numbers as CSV) and one page,
report.html, that needs no network. Several folders go into one report."""

_COMPARE = """\
Compare two runs metric by metric. A run is a results file of lm-eval, the folder that it was
written to, or a baseline. With samples in both (--log_samples) documents are paired: McNemar's
exact test for outcomes of 0 and 1, a permutation test for others, bootstrap intervals. Without
samples averages are compared by their standard errors. Holm's correction covers the p values of
all metrics; the intervals are not corrected."""

_CHECK = """\
Exit with status 1 if a run is worse than its baseline, by more than the tolerance and more than
chance: a corrected two-sided p below alpha; with 2 if they cannot be compared. The tolerance is in
the metric's own unit where higher is better (0.01 of accuracy is one point) and a share of the
baseline's value where lower is better (0.01 of a perplexity is one per cent)."""

_CHECK_EXAMPLES = """\
examples:
  spade-eval check runs/today --write-baseline baselines/smollm2.json
  spade-eval check runs/today --baseline baselines/smollm2.json
"""


def report_main(argv: list[str]) -> int:
    """Run `spade-eval report`.

    Args:
        argv: The arguments behind "report".
    """
    p = Parser(prog="spade-eval report", description=_REPORT)
    p.add_argument(
        "inputs",
        type=Path,
        nargs="+",
        metavar="INPUT",
        help="folder of `spade-eval sweep`, or results of lm-eval (file or folder)",
    )
    p.add_argument("--output", required=True, type=Path, help="folder of the report")
    p.add_argument(
        "--chosen-on",
        type=Path,
        nargs="+",
        default=(),
        metavar="SWEEP",
        help="choose thresholds and layers on these sweeps of other documents (spade-eval sweep "
        "--split validation), and report what they save and lose on the inputs' (default: on the "
        "inputs themselves, which gives upper bounds)",
    )
    args = p.parse_args(argv)
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output {args.output} is a file; a report is a folder.")

    from spade_eval.report.build import make_report

    made = make_report(args.inputs, args.output.expanduser(), args.chosen_on)
    for remark in made.remarks:
        print(f"note: {remark}", file=sys.stderr)
    print(f"Report: {args.output / 'report.html'} ({made.tables} tables, {made.figures} figures)")
    return 0


def compare_main(argv: list[str]) -> int:
    """Run `spade-eval compare`.

    Args:
        argv: The arguments behind "compare".
    """
    p = Parser(prog="spade-eval compare", description=_COMPARE)
    p.add_argument("a", type=Path, metavar="RUN_A", help="results file, folder, or baseline")
    p.add_argument("b", type=Path, metavar="RUN_B", help="the other one")
    args = p.parse_args(argv)

    from spade_eval.report.check import compare
    from spade_eval.report.summary import comparison_text

    print(comparison_text(compare(_read(args.a), _read(args.b))))
    return 0


def check_main(argv: list[str]) -> int:
    """Run `spade-eval check`.

    Args:
        argv: The arguments behind "check".

    Returns:
        1 if the run has regressed, else 0.
    """
    p = Parser(prog="spade-eval check", description=_CHECK, epilog=_CHECK_EXAMPLES)
    p.add_argument("run", type=Path, metavar="RUN", help="results file, or folder")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--baseline", type=Path, help="a baseline, or another run")
    what.add_argument("--write-baseline", type=Path, metavar="FILE", help="make a baseline of RUN")
    p.add_argument(
        "--tolerance", type=float, default=0.01, help="loss that is let pass (default: %(default)s)"
    )
    p.add_argument("--alpha", type=float, default=0.05, help="of the tests (default: %(default)s)")
    p.add_argument(
        "--allow",
        default="",
        help="compare although these differ, a list: versions (of tasks), limit (documents), "
        "fewshot, missing (tasks or metrics of the baseline); or untested (changes of metrics that "
        "have neither samples nor a standard error)",
    )
    args = p.parse_args(argv)
    if not 0 <= args.tolerance < math.inf:
        raise UserError(f"--tolerance {args.tolerance}: give a number from 0 up, such as 0.01.")
    if not 0 < args.alpha < 1:
        raise UserError(f"--alpha {args.alpha}: give a number between 0 and 1, such as 0.05.")

    from spade_eval.report.baseline import write_baseline
    from spade_eval.report.check import Conflict, compare, refuse
    from spade_eval.report.summary import check_text

    allowed = [kind for part in args.allow.split(",") if (kind := part.strip())]
    for kind in allowed:
        require_known("--allow", kind, get_args(Conflict))
    if args.baseline is not None and not args.baseline.expanduser().exists():
        raise UserError(
            f"There is no baseline {args.baseline}. Write it from a run that is as it should be: "
            f"spade-eval check RUN --write-baseline {args.baseline}"
        )
    run = _read(args.run)
    if args.write_baseline is not None:
        place = args.write_baseline.expanduser()
        write_baseline(run, place)
        print(_written(run, place))
        return 0
    found = compare(_read(args.baseline), run)
    refuse(found, allowed, args.tolerance, args.alpha)
    print(check_text(found, args.tolerance, args.alpha))
    return int(bool(found.regressions(args.tolerance, args.alpha)))


def _read(path: Path) -> Run:
    """Read a run; a remark on which file was taken goes to standard error."""
    from spade_eval.report.baseline import read_run

    run, remark = read_run(path)
    if remark:
        print(f"note: {remark}", file=sys.stderr)
    return run


def _written(run: Run, path: Path) -> str:
    """What a new baseline holds."""
    scores = [score for task in run.tasks.values() for score in task.scores.values()]
    alone = sum(score.outcomes is None for score in scores)
    lines = [f"Baseline: {path}: {len(scores)} metrics of {', '.join(run.tasks)}"]
    if alone:
        lines.append(
            f"note: {alone} of the metrics come without outcomes of documents, and checks of them "
            "will be blunt; evaluate with --log_samples."
        )
    return "\n".join(lines)
