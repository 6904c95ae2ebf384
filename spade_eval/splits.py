"""A split of a task, or a part of one: "validation[500:1000]".

Many data sets have labels in one split alone. Parts of it keep the documents on which something is
trained or chosen apart from those that are reported.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from spade_eval.errors import UserError

NAMES = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """Rows `start` to `stop`, the latter excluded, of a split; all of them by default.

    Attributes:
        name: "train", "validation" or "test".
        start: First row.
        stop: The row behind the last; None is the end.
    """

    name: str
    start: int = 0
    stop: int | None = None

    @classmethod
    def parse(cls, text: str) -> Split:
        """Read "validation", "validation[500:]" or "validation[500:1000]".

        Raises:
            UserError: Another form or name, or a part without rows.
        """
        found = re.fullmatch(r"(\w+)(?:\[(\d*):(\d*)\])?", text, re.ASCII)
        if found is None or found[1] not in NAMES:
            raise UserError(
                f"split={text!r} is not known; valid: {', '.join(NAMES)}, or a part of their rows, "
                "as validation[500:1000]."
            )
        start, stop = int(found[2] or 0), int(found[3]) if found[3] else None
        if stop is not None and stop <= start:
            raise UserError(f"split={text!r} has no rows: write [FROM:TO] with TO above FROM.")
        return cls(found[1], start, stop)

    def overlaps(self, other: Split) -> bool:
        """Whether the two may have rows in common."""
        ends = [math.inf if split.stop is None else split.stop for split in (self, other)]
        return self.name == other.name and self.start < ends[1] and other.start < ends[0]
