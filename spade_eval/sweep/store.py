"""Batches on disk, so that a sweep that was killed goes on where it was.

One safetensors file per batch, written under a temporary name and renamed. A file that is damaged,
or of another batch, counts as missing.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from spade_eval.atomic import replacing_file
from spade_eval.sweep.batch import Found

if TYPE_CHECKING:
    from pathlib import Path

    from spade_eval.batching import Batch

_SEPARATOR = "|"  # between a lens's key and a confidence


def digest(batch: Batch) -> str:
    """A hash of what is fed and what is read."""
    found = hashlib.sha256()
    for array in (batch.ids, batch.scored, batch.read_at, batch.targets, batch.requests):
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


class Store:
    """The batches of one task on one process.

    Args:
        folder: Where they lie; made when the first is kept.
        process: Number of this process and of all, as part of the names.
    """

    def __init__(self, folder: Path, process: tuple[int, int]):
        self._folder, self._process = folder, process
        self._n = 0

    def next(self) -> Path:
        """The place of the next batch."""
        rank, world = self._process
        self._n += 1
        return self._folder / f"{rank}of{world}-{self._n:06d}.safetensors"

    def load(self, path: Path, batch: Batch) -> tuple[Found, float] | None:
        """What was found in a batch and the seconds it took, if it is there."""
        try:
            with safe_open(path, framework="numpy") as file:
                about = file.metadata() or {}
                if about.get("batch") != digest(batch):
                    return None
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None
        logprobs, greedy = arrays.pop("logprobs"), arrays.pop("greedy")
        states = arrays.pop("states", None)
        confidences = {tuple(name.rsplit(_SEPARATOR, 1)): a for name, a in arrays.items()}
        return Found(logprobs, greedy, confidences, states), float(about["seconds"])

    def keep(self, path: Path, batch: Batch, found: Found, seconds: float) -> None:
        """Write what was found in a batch."""
        arrays = {"logprobs": found.logprobs, "greedy": found.greedy}
        arrays |= {_SEPARATOR.join(name): a for name, a in found.confidences.items()}
        if found.states is not None:
            arrays["states"] = found.states
        with replacing_file(path) as new:
            save_file(arrays, new, metadata={"batch": digest(batch), "seconds": str(seconds)})
