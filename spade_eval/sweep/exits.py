"""What every threshold would have done, from the stored confidences and log-probabilities.

confidences at candidate layers (A, W), T -> exit layer of each decision (D,)
-> which reading each read takes, (N,); which tokens passed which layers, (B, T)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from spade_eval.departures import Departures
from spade_eval.exits import request_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from spade_eval.batching import Batch, Ints
    from spade_eval.decisions import Decisions
    from spade_eval.exits import ExitRule


@dataclass(frozen=True)
class Exits:
    """What an exit rule does to a batch.

    Attributes:
        layers: Exit layer of each decision, (D,).
        of_reads: The same for each read, (N,).
        checked: Positions measured for each decision, (D,).
        passed: Layers that each token went through, (B, T).
    """

    layers: Ints
    of_reads: Ints
    checked: Ints
    passed: Ints


def decided_values(who: Decisions, at: Ints, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Confidence of each decision at each candidate layer.

    Args:
        who: The decisions.
        at: The watched positions, ascending, (W,).
        values: What was measured there, (A, W).

    Returns:
        (A, D); NaN for decisions that nothing is measured for.
    """
    measured = torch.from_numpy(values[:, np.searchsorted(at, who.check_at)])  # (A, K)
    of = torch.from_numpy(who.check_of)
    means = [request_mean(row, of, who.count).numpy() for row in measured]
    return np.stack(means) if means else np.zeros((0, who.count), dtype=np.float32)


def exit_layers(
    values: NDArray[np.float32], candidates: Sequence[int], rule: ExitRule, n_layers: int
) -> Ints:
    """The first candidate layer at which each decision is confident (Algorithm 1).

    Args:
        values: (A, D).
        candidates: A layers, ascending.
        rule: Threshold and confidence.
        n_layers: L, for those that never are.

    Returns:
        (D,).
    """
    if rule.never or not len(candidates):
        return np.full(values.shape[1], n_layers)
    sure = rule.confident(torch.from_numpy(values)).numpy()
    first = np.asarray(candidates)[sure.argmax(0)]
    return np.where(sure.any(0), first, n_layers)


def follow(
    batch: Batch,
    who: Decisions,
    layers: Ints,
    candidates: Sequence[int],
    never: bool,
    n_layers: int,
) -> Exits:
    """Run the lane's bookkeeping with known decisions.

    Args:
        batch: The batch.
        who: Its decisions.
        layers: Where each exits, (D,).
        candidates: Layers at which the lane stops.
        never: Whether no check is made at all.
        n_layers: L.
    """
    lane = Departures(batch, who, n_layers)
    checks = np.bincount(who.check_of, minlength=who.count)
    asked = np.zeros(who.count, dtype=np.int64)
    for layer in (*(() if never else candidates), n_layers):
        if not lane.undecided.any():
            break
        lane.advance(layer)
        if layer == n_layers:
            break
        asked[lane.undecided] += checks[lane.undecided]
        leaving = lane.undecided & (layers == layer)
        if leaving.any():
            lane.leave(layer, leaving)
            lane.compact()
    passed = lane.passed.reshape(batch.ids.shape)
    if never:
        passed = np.full(batch.ids.shape, n_layers)
    of_reads = layers[who.member_of][who.read_from]
    return Exits(layers, of_reads, asked, passed)
