"""The `spade-eval` command: lm-eval's command line with our models and tasks always known."""

from __future__ import annotations

import pkgutil
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from spade_eval import __version__
from spade_eval.arguments import tasks_path
from spade_eval.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

# Where lm-eval checks its input: an error raised there is about the command line, and its message
# is all the user needs. Raised anywhere else it may be a bug, and keeps its traceback.
_INPUT_CHECKS = (
    "lm_eval.config.", "lm_eval.evaluator", "lm_eval.api.registry", "lm_eval.api.model",
)  # fmt: skip
_SMALLER = "Give a smaller --batch_size, of finetune a smaller --micro_batch_size."


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
        return _call(argv[0], argv[1:])
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


def _call(name: str, argv: list[str]) -> int:
    """Run a sub-command."""
    if name in _COMMANDS:
        return pkgutil.resolve_name(_COMMANDS[name][1])(argv)
    if name.startswith("-"):
        raise UserError(f"{name} stands before a command; to evaluate: spade-eval run {name} ...")
    known = ", ".join(_COMMANDS)
    raise UserError(f"unknown command {name!r}.{did_you_mean(name, _COMMANDS)} Commands: {known}")


def _help() -> str:
    """Write the help text."""
    from spade_eval.plugin import MODELS

    commands = "\n".join(f"  {name:<12}{summary}" for name, (summary, _) in _COMMANDS.items())
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


def _tasks_path(argv: list[str]) -> int:
    """Print the folder of our task files."""
    if argv and argv[0] in ("-h", "--help"):
        print(f"usage: spade-eval tasks-path\n\n{_COMMANDS['tasks-path'][0]}")
        return 0
    if argv:
        raise UserError(f"tasks-path takes no arguments, got {' '.join(argv)}")
    print(tasks_path())
    return 0


# Each with its line in the help text, and the function that takes the arguments behind its name and
# returns the exit status; it is imported when the command is given.
_COMMANDS = {
    "run": (
        "evaluate: lm_eval's own command line, with our models and tasks",
        "spade_eval.cli:_run",
    ),
    "fit": (
        "fit a lens: the linear maps of l_spade, tuned_lens and spade_exit",
        "spade_eval.fit.command:main",
    ),
    "finetune": (
        "train a LoRA adapter on tasks, for peft= of all models",
        "spade_eval.fit.lora_command:main",
    ),
    "sweep": (
        "every decoder, layer and threshold from one pass over each task",
        "spade_eval.sweep.command:main",
    ),
    "calibrate": (
        "find a threshold with a guarantee, for threshold=calibrated",
        "spade_eval.sweep.calibrate_command:main",
    ),
    "report": (
        "tables, figures and a page of sweeps and results",
        "spade_eval.report.command:report_main",
    ),
    "compare": (
        "compare two runs, with paired tests where samples were logged",
        "spade_eval.report.command:compare_main",
    ),
    "check": (
        "exit with status 1 if a run is worse than its baseline",
        "spade_eval.report.command:check_main",
    ),
    "tasks-path": (
        "print the folder of our task files, for lm_eval --include_path",
        "spade_eval.cli:_tasks_path",
    ),
}
