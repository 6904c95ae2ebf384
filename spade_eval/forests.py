"""Trees of tokens side by side in a row, told by where each token's subtree ends.

Tokens stand in depth-first order: a token's descendants stand right behind it, up to its end. So
token t sees token s, its ancestor or itself, exactly where s <= t < ends[s]. One number per token
says what a mask of (T, T) says; the mask is made where it is needed, on the model's device.

Padding is a tree of one token each: nothing else sees it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from spade_eval.batching import Ints


def sees(ends: Tensor) -> Tensor:
    """Which tokens see which.

    Args:
        ends: (B, T).

    Returns:
        (B, T, T) bool, true where token t sees token s.
    """
    at = torch.arange(ends.shape[1], device=ends.device)
    return (at <= at[:, None]) & (at[:, None] < ends[:, None])  # (B, T, T)


def roots(ends: Ints) -> Ints:
    """The root of each token's tree, (B, T), of ends (B, T)."""
    at = np.arange(ends.shape[1])
    open_until = np.maximum.accumulate(ends, axis=1)
    begins = np.ones(ends.shape, dtype=bool)
    begins[:, 1:] = open_until[:, :-1] <= at[1:]
    return np.maximum.accumulate(np.where(begins, at, 0), axis=1)


def within(ends: Ints, chosen: NDArray[np.bool_]) -> Ints:
    """How many of some tokens each token's subtree holds, itself included.

    Args:
        ends: (B, T).
        chosen: Which tokens are counted, (B, T).

    Returns:
        (B, T); where it is not 0, one of them sees the token.
    """
    before = np.zeros((len(ends), ends.shape[1] + 1), dtype=np.int64)
    np.cumsum(chosen, axis=1, out=before[:, 1:])
    return np.take_along_axis(before, ends, 1) - before[:, :-1]
