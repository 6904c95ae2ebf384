"""Let tokens leave the main lane that no open position needs any more.

A token is needed by the positions that see it. What remains are trees (a context with its
branches), which are packed anew into rows of about equal length, so that the lane shrinks in fact
and not only in the account; chains keep their own rows and lose their end.

    ids (B, T), open positions -> ids (B', T'), and for every token where it stood: (B', T')
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

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
        sees: (B, T, T), true where a token sees another, if packed.
        origin: Flat index of each token in the batch's first rows, (B, T).
    """

    ids: Ints
    real: NDArray[np.bool_]
    positions: Ints | None
    sees: NDArray[np.bool_] | None
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
    found = _chains(rows, b, t) if rows.sees is None else _forests(rows, rows.sees, b, t)
    source, real, sees = found
    if source.size > rows.ids.size * (1 - WORTH):
        return None
    pick = np.where(real, source, 0)
    return Rows(
        ids=np.where(real, rows.ids.reshape(-1)[pick], 0),
        real=real,
        positions=None
        if rows.positions is None
        else np.where(real, rows.positions.reshape(-1)[pick], 0),
        sees=sees,
        origin=np.where(real, rows.origin.reshape(-1)[pick], 0),
    ), pick


_Found = tuple["Ints", NDArray[np.bool_], "NDArray[np.bool_] | None"]


def _chains(rows: Rows, b: Ints, t: Ints) -> _Found:
    """Rows with an open position, up to the last one."""
    kept, row = np.unique(b, return_inverse=True)
    last = np.zeros(len(kept), dtype=np.int64)
    np.maximum.at(last, row, t)
    columns = np.arange(last.max() + 1)
    return kept[:, None] * rows.ids.shape[1] + columns, columns <= last[:, None], None


def _forests(rows: Rows, sees: NDArray[np.bool_], b: Ints, t: Ints) -> _Found:
    """Trees with an open position, without the branches that have none."""
    width = rows.ids.shape[1]
    needed = np.zeros_like(rows.real)
    np.logical_or.at(needed, b, sees[b, t])
    at_b, at_t = np.nonzero(needed)
    root = sees[at_b, at_t].argmax(-1)  # a token's first ancestor
    _, first, counts = np.unique(at_b * width + root, return_index=True, return_counts=True)
    # Depth-first order keeps a tree together: its tokens are consecutive among the needed ones.
    trees = [(at_b[i], at_t[i : i + n]) for i, n in zip(first, counts, strict=True)]
    trees.sort(key=lambda tree: -len(tree[1]))
    bins = _pack([len(tokens) for _, tokens in trees], width)
    wide = max(sum(len(trees[i][1]) for i in held) for held in bins)
    source = np.zeros((len(bins), wide), dtype=np.int64)
    real = np.zeros((len(bins), wide), dtype=bool)
    seen = np.zeros((len(bins), wide, wide), dtype=bool)
    seen[:, np.arange(wide), np.arange(wide)] = True  # padding sees itself
    for new, held in enumerate(bins):
        begin = 0
        for i in held:
            row, tokens = trees[i]
            end = begin + len(tokens)
            source[new, begin:end] = row * width + tokens
            real[new, begin:end] = True
            seen[new, begin:end, begin:end] = sees[row][np.ix_(tokens, tokens)]
            begin = end
    return source, real, seen


def _pack(sizes: list[int], most: int) -> list[list[int]]:
    """Share out trees, longest first, over as few rows as hold them, each to the emptiest."""
    n = max(1, -(-sum(sizes) // most))
    bins: list[list[int]] = [[] for _ in range(n)]
    filled = [0] * n
    for i, size in enumerate(sizes):
        at = int(np.argmin(filled))
        bins[at].append(i)
        filled[at] += size
    return [held for held in bins if held]
