"""The `spade-eval` command: lm-eval's command line with our models and tasks always known."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spade_eval import __version__
from spade_eval.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

# Where lm-eval checks its input: an error raised there is about the command line, and its message
# is all the user needs. Raised anywhere else it may be a bug, and keeps its traceback.
_INPUT_CHECKS = (
    "lm_eval.config.", "lm_eval.evaluator", "lm_eval.api.registry", "lm_eval.api.model",
)  # fmt: skip
_SMALLER = "Give a smaller --batch_size, of finetune a smaller --micro_batch_size."


@dataclass(frozen=True)
class _Command:
    """One sub-command."""

    summary: str
    """Its line in the help text."""
    call: Callable[[list[str]], int]
    """Takes the arguments behind the command's name, returns the exit status."""


def main(argv: list[str] | None = None) -> int:
    """Run `spade-eval` and return its exit status: 0, or 2 for bad input."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"spade-eval {__version__}")
        return 0
    try:
        return _command(argv[0]).call(argv[1:])
    except KeyboardInterrupt:
        kept = "; with --resume it goes on" if argv[0] in ("fit", "finetune", "sweep") else ""
        print(f"\nspade-eval {argv[0]} was stopped{kept}.", file=sys.stderr)
        return 130
    except Exception as err:
        if _is_out_of_memory(err):
            print(f"error: {str(err).split('. ')[0]}. {_SMALLER}", file=sys.stderr)
            return 2
        if not _is_bad_input(err):
            raise
        print(f"error: {err}", file=sys.stderr)
        return 2


def tasks_path() -> Path:
    """Return the folder of our task files, for lm-eval's `--include_path`."""
    package = Path(__file__).resolve().parent
    # Inside the package in a wheel, beside it in the repository (editable install).
    for folder in (package / "tasks", package.parent / "tasks"):
        if folder.is_dir():
            return folder
    raise UserError(f"the tasks are missing from this installation ({package}): install it again")


def _command(name: str) -> _Command:
    """Look up a sub-command."""
    if name in _COMMANDS:
        return _COMMANDS[name]
    if name.startswith("-"):
        raise UserError(f"{name} stands before a command; to evaluate: spade-eval run {name} ...")
    known = ", ".join(_COMMANDS)
    raise UserError(f"unknown command {name!r}.{did_you_mean(name, _COMMANDS)} Commands: {known}")


def _help() -> str:
    """Write the help text."""
    from spade_eval.plugin import MODELS

    commands = "\n".join(f"  {name:<12}{command.summary}" for name, command in _COMMANDS.items())
    return f"""\
usage: spade-eval COMMAND [arguments]

Evaluate early-exit decoders (SPADE, logit lens) with lm-evaluation-harness.

commands:
{commands}

models, for `spade-eval run --model` and `lm_eval --model`:
  {", ".join(MODELS)}

options:
  -h, --help      show this text
  -V, --version   show the version

examples:
  spade-eval run --model spade_layer --model_args layer=24 --tasks spade_mini_science
  spade-eval run --model logit_lens --model_args pretrained=gpt2,layer=8 --tasks arc_easy
  lm_eval --include_path "$(spade-eval tasks-path)" --tasks spade_arc_easy ...

`spade-eval run` alone lists the arguments of lm-eval."""


def _run(argv: list[str]) -> int:
    """Hand everything to lm-eval's own command line, which then knows our models and tasks."""
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    from spade_eval.plugin import register

    register()
    setup_logging()
    lm_eval_cli = HarnessCLI()
    with _command_line("lm-eval", "run", *argv):
        args = lm_eval_cli.parse_args()
    args.include_path = _include_path(args)
    lm_eval_cli.execute(args)
    return 0


@contextmanager
def _command_line(*argv: str) -> Iterator[None]:
    """Let lm-eval's parser, which reads nothing else, see these arguments."""
    before = sys.argv
    sys.argv = list(argv)
    try:
        yield
    finally:
        sys.argv = before


def _include_path(args: argparse.Namespace) -> list[str]:
    """Put our tasks before the user's own folders: the later one wins where two share a name.

    lm-eval takes one folder on the command line and in its YAML file, but a list works behind both.
    """
    given = args.include_path
    if given is None and args.config is not None:
        from lm_eval.config.evaluate_config import EvaluatorConfig

        given = EvaluatorConfig.load_yaml_config(args.config).get("include_path")
    folders = [given] if isinstance(given, str) else list(given or ())
    ours = tasks_path()
    return [str(ours), *(folder for folder in folders if Path(folder).resolve() != ours)]


def _is_out_of_memory(err: Exception) -> bool:
    """Whether a GPU's memory ran out; loading torch to ask takes seconds where it was not used."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(err, torch.OutOfMemoryError)


def _is_bad_input(err: Exception) -> bool:
    """Whether the message of `err` is all that the user needs."""
    if isinstance(err, UserError):
        return True
    if not isinstance(err, (ValueError, TypeError, FileNotFoundError)):
        return False
    frame = err.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    return module.startswith(_INPUT_CHECKS)


def _fit(argv: list[str]) -> int:
    """Fit a lens."""
    from spade_eval.fit.command import main as fit_main

    return fit_main(argv, tasks_path())


def _finetune(argv: list[str]) -> int:
    """Train an adapter."""
    from spade_eval.fit.lora_command import main as finetune_main

    return finetune_main(argv, tasks_path())


def _sweep(argv: list[str]) -> int:
    """Sweep layers, decoders and thresholds."""
    from spade_eval.sweep.command import main as sweep_main

    return sweep_main(argv, tasks_path())


def _calibrate(argv: list[str]) -> int:
    """Certify a threshold."""
    from spade_eval.sweep.calibrate_command import main as calibrate_main

    return calibrate_main(argv, tasks_path())


def _report(argv: list[str]) -> int:
    """Make tables and figures."""
    from spade_eval.report.command import report_main

    return report_main(argv)


def _compare(argv: list[str]) -> int:
    """Compare two runs."""
    from spade_eval.report.command import compare_main

    return compare_main(argv)


def _check(argv: list[str]) -> int:
    """Compare a run with its baseline."""
    from spade_eval.report.command import check_main

    return check_main(argv)


def _tasks_path(argv: list[str]) -> int:
    """Print the folder of our task files."""
    if argv and argv[0] in ("-h", "--help"):
        print(f"usage: spade-eval tasks-path\n\n{_COMMANDS['tasks-path'].summary}")
        return 0
    if argv:
        raise UserError(f"tasks-path takes no arguments, got {' '.join(argv)}")
    print(tasks_path())
    return 0


_COMMANDS = {
    "run": _Command("evaluate: lm_eval's own command line, with our models and tasks", _run),
    "fit": _Command("fit a lens: the linear maps of l_spade, tuned_lens and spade_exit", _fit),
    "finetune": _Command("train a LoRA adapter on tasks, for peft= of all models", _finetune),
    "sweep": _Command("every decoder, layer and threshold from one pass over each task", _sweep),
    "calibrate": _Command(
        "find a threshold with a guarantee, for threshold=calibrated", _calibrate
    ),
    "report": _Command("tables, figures and a page of sweeps and results", _report),
    "compare": _Command("compare two runs, with paired tests where samples were logged", _compare),
    "check": _Command("exit with status 1 if a run is worse than its baseline", _check),
    "tasks-path": _Command(
        "print the folder of our task files, for lm_eval --include_path", _tasks_path
    ),
}
