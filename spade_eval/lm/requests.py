"""What lm-eval's instances tell: their tasks, and where they come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from spade_eval.cost import Source

if TYPE_CHECKING:
    from collections.abc import Sequence


def source_of(instances: Sequence[Any]) -> Source:
    """The tasks of lm-eval's instances.

    A rank with fewer instances than the others is given its last one again, which does not count.
    """
    seen: set[int] = set()
    counted = np.zeros(len(instances), dtype=bool)
    for index, instance in enumerate(instances):
        counted[index] = id(instance) not in seen
        seen.add(id(instance))
    return Source([str(instance.task_name) for instance in instances], counted)


def place(request: Any) -> str:
    """Where a request comes from, for messages."""
    return f"task {request.task_name}, document {request.doc_id}"
