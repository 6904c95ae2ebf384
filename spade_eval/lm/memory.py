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


def largest_batch_size(rows: Sequence[Row], most: int, run: Callable[[Batch], object]) -> int:
    """The largest size, up to `most`, at which the largest batch of these rows can be run."""

    def attempt(batch_size: int) -> int:
        run(collate(max(cut(rows, batch_size), key=footprint)))
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
