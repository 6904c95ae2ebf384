"""Let tokens leave the main lane that no open position needs any more.

A token is needed by the positions that see it. What remains are trees (a context with its
branches), which are packed anew into rows of about equal length, so that the lane shrinks in fact
and not only in the account; chains keep their own rows and lose their end.

    ids (B, T), open positions -> ids (B', T'), and for every token where it stood: (B', T')
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapreplace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spade_eval.forests import roots, within

if TYPE_CHECKING:
    from spade_eval.batching import Ints

WORTH = 1 / 16  # a lane is packed anew when it shrinks by this share: less does not pay for it


@dataclass(frozen=True)
class Rows:
    """The tokens of a lane.

    Attributes:
        ids: Token ids, right-padded with 0, (B, T).
        real: Which of them are no padding, (B, T).
        positions: Position ids, if the rows are packed, (B, T).
        ends: Where each token's subtree ends, if packed, (B, T); see `forests`.
        origin: Flat index of each token in the batch's first rows, (B, T).
    """

    ids: Ints
    real: NDArray[np.bool_]
    positions: Ints | None
    ends: Ints | None
    origin: Ints

    def where(self, origins: Ints) -> Ints:
        """Where tokens, given by their origin, now stand: flat indices; they must be there."""
        at = np.full(int(self.origin.max()) + 1, -1, dtype=np.int64)
        at[self.origin[self.real]] = np.flatnonzero(self.real)
        return at[origins]


def compact(rows: Rows, open_at: Ints) -> tuple[Rows, Ints] | None:
    """Drop what no open position sees.

    Args:
        rows: The lane's rows.
        open_at: Origins of the positions that are still open; at least one.

    Returns:
        New rows, and the flat index in `rows` of every token of them, padding included, (B', T');
        None if that would not make the lane smaller by `WORTH`.
    """
    flat = rows.where(open_at)
    b, t = np.divmod(flat, rows.ids.shape[1])
    found = _chains(rows, b, t) if rows.ends is None else _forests(rows, rows.ends, b, t)
    source, real, ends = found
    if source.size > rows.ids.size * (1 - WORTH):
        return None
    pick = np.where(real, source, 0)
    return Rows(
        ids=np.where(real, rows.ids.reshape(-1)[pick], 0),
        real=real,
        positions=None
        if rows.positions is None
        else np.where(real, rows.positions.reshape(-1)[pick], 0),
        ends=ends,
        origin=np.where(real, rows.origin.reshape(-1)[pick], 0),
    ), pick


_Found = tuple["Ints", NDArray[np.bool_], "Ints | None"]


def _chains(rows: Rows, b: Ints, t: Ints) -> _Found:
    """Rows with an open position, up to the last one."""
    kept, row = np.unique(b, return_inverse=True)
    last = np.zeros(len(kept), dtype=np.int64)
    np.maximum.at(last, row, t)
    columns = np.arange(last.max() + 1)
    return kept[:, None] * rows.ids.shape[1] + columns, columns <= last[:, None], None


def _forests(rows: Rows, ends: Ints, b: Ints, t: Ints) -> _Found:
    """Trees with an open position, without the branches that have none."""
    open_ = np.zeros_like(rows.real)
    open_[b, t] = True
    needed = within(ends, open_) > 0
    kept = within(ends, needed)[needed]  # tokens of each one's new subtree, (N,)
    # A tree's tokens stand together, and so do those of them that are needed.
    root = np.flatnonzero(needed) - (np.arange(ends.shape[1]) - roots(ends))[needed]
    _, tree, sizes = np.unique(root, return_inverse=True, return_counts=True)
    bins = _pack(sizes, ends.shape[1])
    bin_of, begin_of = np.empty_like(sizes), np.empty_like(sizes)
    for new, held in enumerate(bins):
        bin_of[held] = new
        begin_of[held] = np.cumsum([0, *sizes[held[:-1]]])
    rank = np.arange(len(tree)) - (np.cumsum(sizes) - sizes)[tree]
    at = bin_of[tree], begin_of[tree] + rank
    shape = len(bins), max(sizes[held].sum() for held in bins)
    source = np.zeros(shape, dtype=np.int64)
    real = np.zeros(shape, dtype=bool)
    new_ends = np.tile(np.arange(1, shape[1] + 1), (shape[0], 1))  # padding sees itself
    source[at], real[at], new_ends[at] = np.flatnonzero(needed), True, at[1] + kept
    return source, real, new_ends


def _pack(sizes: Ints, most: int) -> list[list[int]]:
    """Share out trees, longest first, over as few rows as hold them, each to the emptiest."""
    bins: list[list[int]] = [[] for _ in range(max(1, -(-int(sizes.sum()) // most)))]
    filled = [(0, i) for i in range(len(bins))]  # a heap
    for tree in np.argsort(-sizes, kind="stable").tolist():
        tokens, i = filled[0]
        bins[i].append(tree)
        heapreplace(filled, (tokens + int(sizes[tree]), i))
    return bins
