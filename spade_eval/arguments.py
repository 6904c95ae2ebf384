"""The argument parser of our own sub-commands: its errors are sentences."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NoReturn

from spade_eval.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `UserError` and names the nearest option."""

    def error(self, message: str) -> NoReturn:
        """Raise the message, with a hint."""
        options = [option for action in self._actions for option in action.option_strings]
        words = message.split()
        hint = next((h for w in words if w.startswith("--") if (h := _near(w, options))), "")
        raise UserError(f"{message}.{hint} `{self.prog} --help` lists the arguments.")


def _near(word: str, options: Sequence[str]) -> str:
    return "" if word in options else did_you_mean(word, options)
