"""What fits into a device's memory: the batch size that is found, and the one that does not."""

from __future__ import annotations

from contextlib import contextmanager
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


def largest_batch_size(
    laid_out: Callable[[int], Sequence[Row]], most: int, run: Callable[[Batch], object]
) -> int:
    """The largest size, up to `most`, at which the largest batch can be run.

    Args:
        laid_out: The rows at a size.
        most: The first size that is tried.
        run: Runs a batch.
    """

    def attempt(batch_size: int) -> int:
        run(collate(max(cut(laid_out(batch_size), batch_size), key=footprint)))
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
