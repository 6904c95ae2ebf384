"""Where subtrees end says who sees whom: against a walk from parent to parent."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from spade_eval.forests import roots, sees, within

# How far each token stands from its root: at most one further than the token before it.
steps = st.lists(st.integers(0, 5), min_size=1, max_size=12)
depths = steps.map(lambda up: [*accumulate(up[1:], lambda d, n: min(d + 1, n), initial=0)])


def paths(depths: list[int]) -> list[list[int]]:
    """Of each token the tokens from its root down to itself."""
    path: list[int] = []
    found = []
    for t, depth in enumerate(depths):
        path = [*path[:depth], t]
        found.append(path)
    return found


def ends_of(depths: list[int], width: int) -> np.ndarray:
    """By the definition: behind the last token on whose path a token is."""
    of = paths(depths)
    ends = [max(t for t, path in enumerate(of) if s in path) + 1 for s in range(len(depths))]
    return np.array([*ends, *range(len(depths) + 1, width + 1)])[None]


@given(depths, st.integers(0, 2))
def test_tokens_see_their_path_and_padding_itself(depths: list[int], padding: int) -> None:
    ends = ends_of(depths, len(depths) + padding)
    mask = sees(torch.from_numpy(ends))[0].numpy()
    expected = [*paths(depths), *([len(depths) + i] for i in range(padding))]
    assert [np.flatnonzero(row).tolist() for row in mask] == expected


@given(st.lists(depths, min_size=1, max_size=3), st.integers(0, 2), st.integers(0, 99))
def test_roots_and_counts_are_those_of_the_paths(
    rows: list[list[int]], padding: int, seed: int
) -> None:
    width = max(map(len, rows)) + padding
    ends = np.concatenate([ends_of(row, width) for row in rows])
    chosen = np.random.default_rng(seed).random((len(rows), width)) < 0.5
    counts, root = within(ends, chosen), roots(ends)
    for b, row in enumerate(rows):
        of = [*paths(row), *([t] for t in range(len(row), width))]
        assert root[b].tolist() == [path[0] for path in of]
        assert counts[b].tolist() == [
            sum(bool(chosen[b, t]) for t, path in enumerate(of) if s in path) for s in range(width)
        ]
