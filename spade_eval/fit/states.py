"""Hidden states and teacher states of the training positions, each computed once.

    documents -> rows -> batches -> main lane: h^l of the drawn positions, for each layer with a map
                                 -> teacher:   SPADE's states, all layers in one tail; or h^L

They lie in memory-mapped files: as long as they fit, the operating system keeps them in memory, and
a run that was killed goes on behind the last whole batch. Positions 0 are left out, there is no
pair [start, token] at the start token itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from spade_eval import scoring
from spade_eval.batching import Batch, Ints, collate, cut
from spade_eval.errors import UserError
from spade_eval.trace import climb

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from spade_eval.backbone import Backbone


@dataclass(frozen=True)
class Job:
    """One batch, which of its scored positions are kept, and where their states go.

    Attributes:
        batch: The batch.
        kept: Indices into its P scored positions, ascending.
        offset: Row of the first in the files.
    """

    batch: Batch
    kept: Ints
    offset: int


@dataclass(frozen=True)
class TeacherStates:
    """States of P positions for n maps, each an array (P, d).

    Attributes:
        hidden: For each map h^l, the map's input.
        teacher: For each map the states in the last layer's space that it should reach.
        full: h^L of the whole sequence: what the full model says.
    """

    hidden: list[Tensor]
    teacher: list[Tensor]
    full: Tensor


def jobs(
    requests: Sequence[scoring.Request],
    layout: scoring.Layout,
    most_tokens: int,
    positions: int,
    seed: int,
) -> list[Job]:
    """Plan the batches and draw at most `positions` of their scored positions, all equally likely.

    Positions that documents have in common are scored once.
    """
    rows = scoring.plan(requests, layout).rows
    batches = [collate(part) for part in cut(rows, layout.batch_size, most_tokens)]
    paired = [np.flatnonzero(batch.scored_positions > 0) for batch in batches]
    total = sum(map(len, paired))
    drawn = np.zeros(total, dtype=bool)
    drawn[np.random.default_rng(seed).permutation(total)[:positions]] = True
    found, offset, seen = [], 0, 0
    for batch, here in zip(batches, paired, strict=True):
        kept = here[drawn[seen : seen + len(here)]]
        seen += len(here)
        if len(kept):
            found.append(Job(batch, kept, offset))
            offset += len(kept)
    return found


def count(todo: Sequence[Job]) -> int:
    """Number of positions."""
    return sum(len(job.kept) for job in todo)


def moved(job: Job, rows: int) -> Job:
    """The job with its states `rows` rows further down."""
    return replace(job, offset=job.offset + rows)


def digest(requests: Sequence[scoring.Request]) -> str:
    """A hash of all token ids."""
    text = json.dumps([(r.context, r.continuation) for r in requests])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def collect(
    backbone: Backbone,
    todo: Sequence[Job],
    layers: Sequence[int],
    spade: bool,
    folder: Path,
    rank: int = 0,
    world_size: int = 1,
) -> TeacherStates:
    """Compute the states of all jobs into files in `folder`, leaving out those that are there.

    Args:
        backbone: The model.
        todo: The jobs; rank r of w does every w-th.
        layers: The maps' layers, ascending, below L.
        spade: Whether SPADE teaches, or the full model.
        folder: Holds the files of this very run or none.
        rank: This process.
        world_size: Processes that share the folder.

    Raises:
        UserError: The disk is full.
    """
    shape = (count(todo), backbone.width)
    dtype = backbone.state_dtype
    states = TeacherStates(
        hidden=[_mapped(folder / f"hidden-{layer}.bin", shape, dtype) for layer in layers],
        teacher=[_mapped(folder / f"teacher-{layer}.bin", shape, dtype) for layer in layers]
        if spade
        else [],
        full=_mapped(folder / "full.bin", shape, dtype),
    )
    done = _mapped(folder / "done.bin", (len(todo),), torch.uint8)
    mine = range(rank, len(todo), world_size)
    bar = tqdm(total=len(mine), desc="States", unit="batch", disable=rank != 0)
    for index in mine:
        if not done[index]:
            _compute(backbone, todo[index], layers, states)
            done[index] = 1
        bar.update()
    bar.close()
    return (
        states if spade else TeacherStates(states.hidden, [states.full] * len(layers), states.full)
    )


@torch.no_grad()
def _compute(backbone: Backbone, job: Job, layers: Sequence[int], states: TeacherStates) -> None:
    # Start tokens that are new are computed together, and the last bits depend on how many: those
    # of this batch alone, wherever the work was resumed and whoever shares it.
    backbone.starts.clear()
    kept = torch.from_numpy(job.kept)
    rows = slice(job.offset, job.offset + len(kept))
    hidden: list[Tensor] = []
    for at in climb(backbone, job.batch, [*layers, backbone.n_layers]):
        keep = kept.to(at.h.device)
        hidden.append(at.h[keep])
    full = hidden.pop()
    states.full[rows] = full.cpu()
    for held, h in zip(states.hidden, hidden, strict=True):
        held[rows] = h.cpu()
    if states.teacher:
        n = len(layers)
        token_ids, start_ids = at.token_ids[keep].repeat(n), at.start_ids[keep].repeat(n)
        depths = torch.tensor(layers).repeat_interleave(len(kept))
        taught = backbone.tail(
            torch.cat(hidden), depths, token_ids, torch.ones_like(token_ids), start_ids
        )
        for held, t in zip(states.teacher, taught.split(len(kept)), strict=True):
            held[rows] = t.cpu()


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in a file, zeros where nothing was written."""
    numel = int(np.prod(shape))
    size = numel * dtype.itemsize
    try:
        with path.open("ab") as file:
            if file.tell() < size:
                # Now, since a write into a mapped file on a full disk kills the process.
                if hasattr(os, "posix_fallocate"):  # not on macOS
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
    except OSError as err:
        raise UserError(
            f"The states need {size / 1e6:.0f} MB more in {path.parent}: {err.strerror}. Make "
            "room and go on with --resume, or take fewer positions (--max_positions) or layers."
        ) from err
    return torch.from_file(str(path), shared=True, size=numel, dtype=dtype).view(shape)
