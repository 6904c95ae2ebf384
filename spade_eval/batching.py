"""From rows to batches: which rows run together, and their arrays.

rows, longest first -> cut: groups of rows -> collate: padded arrays
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from spade_eval.scoring import Row

Ints = NDArray[np.int64]
MOST_PADDING = 1 / 8  # a batch is cut before more padding than this, once it has enough tokens
ENOUGH_TOKENS = 512  # matrix products gain little from more on a CPU


@dataclass(frozen=True)
class Batch:
    """Some rows side by side, right-padded, as arrays.

    Attributes:
        ids: (B, T), padded with 0.
        positions: (B, T) if the rows are packed, else None: the model counts by itself.
        ends: Where each token's subtree ends, (B, T), if the rows are packed, else None: every
            token sees those before it. See `forests`.
        scored: Flat index b * T + t of the P tokens at which something is read.
        token_ids: The tokens at the scored positions, (P,).
        start_ids: The first token of each one's sequence, (P,).
        scored_positions: Position of each in its sequence, (P,).
        read_at: For each of N reads, which of the P positions it reads, ascending.
        targets: For each read the token whose log-probability is asked for, (N,).
        requests: For each read the request it belongs to, (N,).
        lengths: Tokens of each row that are not padding, (B,).
        tokens_hf: Tokens that `--model hf` would feed for the same requests.
    """

    ids: Ints
    positions: Ints | None
    ends: Ints | None
    scored: Ints
    token_ids: Ints
    start_ids: Ints
    scored_positions: Ints
    read_at: Ints
    targets: Ints
    requests: Ints
    lengths: Ints
    tokens_hf: int

    @property
    def real(self) -> NDArray[np.bool_]:
        """Which entries are tokens and not padding, (B, T)."""
        return np.arange(self.ids.shape[1]) < self.lengths[:, None]

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.lengths.sum())


def cut(
    rows: Iterable[Row], batch_size: int, most_tokens: int = sys.maxsize
) -> Iterator[list[Row]]:
    """Cut rows into batches as large as `--model hf` makes them, but of at least one row.

    There, `batch_size` sequences are padded to the longest; a batch here holds as many tokens,
    padding included. Counting packed rows by their sequences would shrink batches by what sharing
    saves, and with them the efficiency of matrix products.

    `most_tokens` bounds a batch where more tokens make it slower.

    Chains and forests do not share a batch, since chains need no mask.
    """
    held: list[Row] = []
    for row in rows:
        width, longest = max(map(len, [*held, row])), max(r.longest for r in [*held, row])
        padded = (len(held) + 1) * width
        real = sum(map(len, held))
        full = padded > min(batch_size * longest, most_tokens)
        wasteful = real >= ENOUGH_TOKENS and padded > (real + len(row)) * (1 + MOST_PADDING)
        if held and (full or wasteful or row.is_chain != held[0].is_chain):
            yield held
            held = []
        held.append(row)
    if held:
        yield held


def footprint(rows: Sequence[Row]) -> int:
    """What a batch of these rows takes in memory, roughly: its tokens, and its mask if packed."""
    width = max(map(len, rows))
    tokens = len(rows) * width
    return tokens if rows[0].is_chain else tokens + tokens * width // 1024


def collate(rows: Sequence[Row]) -> Batch:
    """Put rows side by side."""
    width = max(len(row) for row in rows)
    packed = not all(row.is_chain for row in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    positions = np.zeros_like(ids) if packed else None
    ends = np.tile(np.arange(1, width + 1), (len(rows), 1)) if packed else None
    scored: dict[int, int] = {}
    reads: list[tuple[int, int, int]] = []
    for b, row in enumerate(rows):
        ids[b, : len(row)] = row.ids
        if positions is not None and ends is not None:
            positions[b, : len(row)] = row.positions
            ends[b, : len(row)] = row.ends
        for t, target, request in row.reads:
            reads.append((scored.setdefault(b * width + t, len(scored)), target, request))
    at = np.fromiter(scored, dtype=np.int64, count=len(scored))
    where = [(rows[i // width], i % width) for i in scored]
    read_at, targets, requests = np.array(sorted(reads), dtype=np.int64).reshape(-1, 3).T
    return Batch(
        ids=ids,
        positions=positions,
        ends=ends,
        scored=at,
        token_ids=ids.reshape(-1)[at],
        start_ids=np.array([row.ids[row.starts[t]] for row, t in where], dtype=np.int64),
        scored_positions=np.array([row.positions[t] for row, t in where], dtype=np.int64),
        read_at=read_at,
        targets=targets,
        requests=requests,
        lengths=np.array([len(row) for row in rows], dtype=np.int64),
        tokens_hf=sum(row.tokens_apart for row in rows),
    )
