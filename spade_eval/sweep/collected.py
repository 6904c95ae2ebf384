"""What the pass over one task leaves: every cell's answers, and what each would have cost alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from spade_eval.cost import Account
    from spade_eval.sweep.store import Store


@dataclass
class Call:
    """The answers to one call of lm-eval, or to one of whole texts.

    Attributes:
        instances: lm-eval's instance behind each of R requests; a text has one for each window.
        logprobs: Sums over a request's reads, for each reading and then each exit, (C + E, R).
        greedy: Whether all of them are the most likely tokens, (C + E, R).
    """

    instances: Sequence[Any]
    logprobs: NDArray[np.float64]
    greedy: NDArray[np.bool_]


@dataclass
class Collected:
    """What a sweep collects on one task.

    Attributes:
        store: Where its batches are kept.
        calls: Answers.
        accounts: What a run of each cell alone would have computed, (C + E).
        seconds: What all batches took when they were computed.
        states: By document, where its context ends, (L+1, d); None if not asked for.
    """

    store: Store
    calls: list[Call] = field(default_factory=list)
    accounts: list[Account] = field(default_factory=list)
    seconds: float = 0.0
    states: dict[int, NDArray[np.float16]] | None = None

    def answers(self, cell: int) -> bytes:
        """What tells a cell's answers from another's."""
        parts = [(c.logprobs[cell].tobytes(), c.greedy[cell].tobytes()) for c in self.calls]
        return b"".join(part for pair in parts for part in pair)
