"""The optional packages that reports and comparisons are made with."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from spade_eval.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def needs_report_extra() -> Iterator[None]:
    """Import optional packages inside.

    Raises:
        UserError: One is missing; says how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as err:
        package = (err.name or "").partition(".")[0]
        raise UserError(
            f"The package {package} is not installed, and reports and comparisons need it: "
            'pip install "spade-eval[report]"'
        ) from err
