"""What lm-eval's instances tell: their tasks, and where they come from."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from spade_eval.tally import Source

if TYPE_CHECKING:
    from collections.abc import Sequence

TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]
"""As HFLM has it: the texts of context and continuation, if known, and their token ids."""


def source_of(instances: Sequence[Any]) -> Source:
    """The tasks of lm-eval's instances.

    A rank with fewer instances than the others is given its last one again, beyond the number of
    its repeats, which does not count.
    """
    seen: Counter[int] = Counter()
    counted = np.zeros(len(instances), dtype=bool)
    for index, instance in enumerate(instances):
        counted[index] = seen[id(instance)] < (instance.repeats or 1)
        seen[id(instance)] += 1
    return Source([str(instance.task_name) for instance in instances], counted)


def place(request: Any) -> str:
    """Where a request comes from, for messages."""
    return f"task {request.task_name}, document {request.doc_id}"
