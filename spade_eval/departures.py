"""Who has exited and which tokens are still in the main lane, layer by layer.

The bookkeeping of Algorithm 1 for a batch, without a model: the climb drives it with the decisions
it takes, a sweep with those that a threshold would have taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spade_eval.compaction import Rows, compact

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from spade_eval.batching import Batch, Ints
    from spade_eval.decisions import Decisions


def rows_of(batch: Batch) -> Rows:
    """A batch's rows before anything has left."""
    origin = np.arange(batch.ids.size).reshape(batch.ids.shape)
    return Rows(batch.ids, batch.real, batch.positions, batch.ends, origin)


class Departures:
    """One batch on its way up.

    Args:
        batch: The batch.
        who: Its decisions.
        n_layers: L.

    Attributes:
        rows: The tokens that are still in the lane.
        exit_layers: Of each decision, (D,); L where none was taken yet.
        undecided: Which decisions are open, (D,).
        passed: How many layers each token of the batch's rows went through, (B * T,).
    """

    def __init__(self, batch: Batch, who: Decisions, n_layers: int):
        self.batch, self.who = batch, who
        self.rows = rows_of(batch)
        self.exit_layers = np.full(who.count, n_layers)
        self.passed = np.zeros(batch.ids.size, dtype=np.int64)
        # A start token answers with its own stored state: it alone keeps nothing in the lane.
        self._later = batch.scored_positions[who.member_at] > 0
        self.undecided = np.zeros(who.count, dtype=bool)
        self.undecided[who.member_of[self._later]] = True

    def advance(self, layer: int) -> None:
        """What is left of the lane goes up to `layer`."""
        self.passed[self.rows.origin[self.rows.real]] = layer

    def leave(self, layer: int, leaving: NDArray[np.bool_]) -> Ints:
        """Decisions (D,) exit; returns the members whose states go with them, (M',)."""
        self.exit_layers[leaving] = layer
        self.undecided = self.undecided & ~leaving
        return np.flatnonzero(leaving[self.who.member_of] & self._later)

    def compact(self) -> Ints | None:
        """Drop tokens that no open decision needs.

        Returns:
            For each place of the new rows, (B', T'), where its token stood in the old ones; None if
            they stay as they are.
        """
        still = self.undecided[self.who.member_of] & self._later
        if not still.any():
            return None
        open_at = self.batch.scored[np.unique(self.who.member_at[still])]
        if (found := compact(self.rows, open_at)) is None:
            return None
        self.rows, source = found
        return source
