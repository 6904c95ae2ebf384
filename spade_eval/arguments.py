"""Command lines of our own sub-commands: the parser, and what several of them take."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from spade_eval.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

_ONCE = ("--resume", "--overwrite")  # about this run, not about what it makes


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `UserError` and names the nearest option."""

    def __init__(self, **kwargs: Any):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=layout, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse; words of a name may be joined by - or _, as lm-eval joins them."""
        given = list(sys.argv[1:] if args is None else args)
        end = given.index("--") if "--" in given else len(given)
        spelt = [self._spelt(word) for word in given[:end]]
        return super().parse_known_args(spelt + given[end:], namespace)

    def _spelt(self, word: str) -> str:
        """An option under the name that it was added by."""
        name, equals, value = word.partition("=")
        known = self._option_string_actions
        for other in (f"--{name[2:].replace('-', '_')}", f"--{name[2:].replace('_', '-')}"):
            if name.startswith("--") and name not in known and other in known:
                return other + equals + value
        return word

    def error(self, message: str) -> NoReturn:
        """Raise the message, with a hint."""
        hint = ""
        if choice := re.search(r"invalid choice: '(.+?)' \(choose from (.+)\)", message):
            hint = did_you_mean(choice[1], re.findall(r"[\w-]+", choice[2]))
        elif message.startswith("unrecognized arguments"):
            options = [option for action in self._actions for option in action.option_strings]
            words = [word for word in message.split() if word.startswith("--")]
            hint = next((h for word in words if (h := did_you_mean(word, options))), "")
        raise UserError(f"{message}.{hint} `{self.prog} --help` lists the arguments.")


def add_place(p: Parser) -> None:
    """Add where the model runs and where further tasks lie; see `model_arguments`."""
    p.add_argument("--device", help="as in lm_eval: cpu, cuda, cuda:0, mps")
    p.add_argument("--include_path", type=Path, help="folder of further lm-eval tasks")


def model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """`--model_args` and `--device` as lm-eval reads them; loading lm-eval takes seconds."""
    from lm_eval.utils import simple_parse_args_string

    given: dict[str, Any] = simple_parse_args_string(args.model_args)
    return given if args.device is None else {**given, "device": args.device}


def tasks_path() -> Path:
    """Return the folder of our task files, for lm-eval's `--include_path`."""
    package = Path(__file__).resolve().parent
    # Inside the package in a wheel, beside it in the repository (editable install).
    for folder in (package / "tasks", package.parent / "tasks"):
        if folder.is_dir():
            return folder
    raise UserError(f"the tasks are missing from this installation ({package}): install it again")


def include_paths(args: argparse.Namespace) -> list[Path]:
    """Our tasks' folder, and `--include_path` behind it."""
    return [tasks_path(), *([args.include_path] if args.include_path else [])]


def command_line(name: str, argv: Sequence[str]) -> str:
    """The command that makes the same again, for records."""
    return shlex.join(["spade-eval", name, *(a for a in argv if a not in _ONCE)])


def layer_numbers(text: str) -> list[int]:
    """Read FROM:TO:STEP, TO excluded, or a list a,b,c; in that order.

    Raises:
        UserError: Not of this form.
    """
    try:
        if ":" in text:
            return list(range(*(int(part) for part in text.split(":"))))
        return [int(part) for part in text.split(",")]
    except (ValueError, TypeError) as err:
        raise UserError(
            f"layers={text!r}: write FROM:TO:STEP (TO excluded), a list such as 4,8,12, or all."
        ) from err
