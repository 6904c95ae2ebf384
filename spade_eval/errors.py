"""The error for bad input, and what its messages say: what was meant, and what differs."""

from __future__ import annotations

import difflib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class UserError(ValueError):
    """Bad input: the message says what is wrong and what to do next.

    `spade-eval` prints the message alone, without a traceback, and exits with status 2.
    """


class UnsupportedModelError(UserError):
    """The model cannot be decoded from its middle; names its class and the check that it failed."""


def raised_by(err: BaseException, packages: Iterable[str]) -> bool:
    """Whether one of the packages raised an error, by itself or through the standard library."""
    raiser, frame = "", err.__traceback__
    while frame is not None:
        package = str(frame.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        raiser = raiser if package in sys.stdlib_module_names else package
        frame = frame.tb_next
    return raiser in packages


def require_known(setting: str, value: object, valid: Iterable[str]) -> None:
    """Make sure that a setting has one of its values.

    Raises:
        UserError: Names the setting, what was given, what is valid and what was probably meant.
    """
    names = list(valid)
    if value not in names:
        raise UserError(
            f"{setting}={value!r} is not known; valid: {', '.join(names)}."
            + did_you_mean(str(value), names)
        )


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Name the nearest valid spelling, ready to be appended to an error message.

    Args:
        name: What the user wrote.
        valid: The names that would have been accepted.

    Returns:
        `" Did you mean 'x'?"` with its leading space, or the empty string if nothing is near.
    """
    # Case is folded for the comparison only: the hint shows the name as it has to be written.
    by_folded = {candidate.casefold(): candidate for candidate in valid}
    near = difflib.get_close_matches(name.casefold(), by_folded, n=1)
    return f" Did you mean {by_folded[near[0]]!r}?" if near else ""


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two settings, for a message; empty if nothing does."""
    names = sorted(name for name in {*was, *now} if was.get(name) != now.get(name))
    return "; ".join(f"{n} was {was.get(n)!r}, is {now.get(n)!r}" for n in names)
