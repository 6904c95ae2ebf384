"""What fits into a device's memory: the batch size that is found, and the one that does not."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from accelerate.utils import find_executable_batch_size

from spade_eval.batching import Batch, collate, cut, footprint
from spade_eval.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from spade_eval.scoring import Row

    LayOut = Callable[[Sequence[int], int], list[Row]]
    """From the numbers of requests and a batch size to rows: those of a smaller one are shorter."""


def parts(rows: Sequence[Row], n: int) -> Iterator[Sequence[Row]]:
    """The rows in at most n parts of one size, from 1 up, and what is left."""
    each = max(1, -(-len(rows) // max(1, n)))
    return (rows[first : first + each] for first in range(0, len(rows), each))


def laid_out_again(
    rows: Sequence[Row], size: int, lay_out: LayOut
) -> Callable[[int], Sequence[Row]]:
    """The requests of some rows, laid out at `size`, at other sizes; the last layout is kept."""
    requests = sorted({request for row in rows for _, _, request in row.reads})

    @lru_cache(maxsize=1)
    def at(other: int) -> Sequence[Row]:
        return rows if other == size else lay_out(requests, other)

    return at


def largest_batch_size(
    laid_out: Callable[[int], Sequence[Row]],
    most: int,
    run: Callable[[Batch], object],
    most_tokens: int = sys.maxsize,
) -> int:
    """The largest size, up to `most`, at which the largest batch can be run.

    Args:
        laid_out: The rows at a size.
        most: The first size that is tried.
        run: Runs a batch.
        most_tokens: Batches are cut before they have more.
    """

    def attempt(batch_size: int) -> int:
        rows = laid_out(batch_size)
        run(collate(max(cut(rows, batch_size, most_tokens), key=footprint)))
        return batch_size

    # Shrinks the size whenever memory runs out.
    try:
        return int(find_executable_batch_size(attempt, most)())
    except RuntimeError as err:
        if "No executable batch size" not in str(err):
            raise
        return 1


@contextmanager
def fitting(batch_size: int | str, device: torch.device) -> Iterator[None]:
    """Name the batch size where the memory of a device runs out.

    Raises:
        UserError: It ran out inside.
    """
    try:
        yield
    except torch.OutOfMemoryError as err:
        raise UserError(
            f"batch_size={batch_size} is too large for the memory of {device}: "
            f"{str(err).split('. ')[0]}. Give a smaller one, or batch_size=auto, which tries."
        ) from err
