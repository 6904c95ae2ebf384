"""Run a batch of rows through the layers and read the scored positions.

    Batch -> main lane, layers 1..l -> states at the scored positions (P, d)
          -> decoder (P, d) -> head, log-softmax, gather -> log-probabilities (N,)

Only scored positions reach a decoder and the head, and the main lane stops at layer l.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from spade_eval.decoders import Decoder, States

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from spade_eval.backbone import Backbone
    from spade_eval.batching import Batch


@dataclass(frozen=True)
class Answers:
    """What N reads found.

    Attributes:
        logprobs: The log-probability of each target, in nats.
        greedy: Whether it is the most likely token.
    """

    logprobs: list[float]
    greedy: list[bool]


def climb(backbone: Backbone, batch: Batch, layers: Sequence[int]) -> Iterator[States]:
    """Run the main lane upwards and stop at each of `layers`, ascending, for the scored positions.

    The lane runs only as far as the caller asks for states.
    """
    device = backbone.device
    positions = mask = None
    if batch.positions is not None and batch.sees is not None:
        positions = torch.from_numpy(batch.positions).to(device)
        mask = backbone.additive_mask(torch.from_numpy(batch.sees))
    lane = backbone.embed(torch.from_numpy(batch.ids).to(device), positions, mask)
    scored = torch.from_numpy(batch.scored)
    token_ids = torch.from_numpy(batch.token_ids).to(device)
    start_ids = torch.from_numpy(batch.start_ids).to(device)
    scored_positions = torch.from_numpy(batch.scored_positions).to(device)
    for layer in layers:
        h = backbone.advance(lane, layer).h.flatten(0, 1)  # (B * T, d)
        h = h[scored.to(h.device)].to(device)  # (P, d)
        yield States(h, layer, token_ids, start_ids, scored_positions)


def score(
    backbone: Backbone,
    batch: Batch,
    decoder: Decoder,
    layer: int,
    softmax_dtype: torch.dtype = torch.float32,
) -> Answers:
    """Score a batch with a decoder at a fixed layer."""
    states = next(climb(backbone, batch, [layer]))
    return read(backbone, decoder.align(backbone, states), batch, softmax_dtype)


def read(backbone: Backbone, h: Tensor, batch: Batch, softmax_dtype: torch.dtype) -> Answers:
    """Head, log-softmax and gather, over a bounded number of positions at a time.

    Args:
        backbone: The model whose head is used.
        h: States of the scored positions in the last layer's space, (P, d).
        batch: Says which positions and targets belong together.
        softmax_dtype: The log-softmax is computed in this type.
    """
    read_at = torch.from_numpy(batch.read_at).to(h.device)
    targets = torch.from_numpy(batch.targets).to(h.device)
    logprobs = torch.empty(len(read_at), dtype=softmax_dtype, device=h.device)  # (N,)
    greedy = torch.empty(len(read_at), dtype=torch.bool, device=h.device)
    rows = backbone.logits_rows(softmax_dtype)
    for first in range(0, len(h), rows):
        logits = backbone.logits(h[first : first + rows]).to(h.device)  # (P', V)
        here = slice(*np.searchsorted(batch.read_at, (first, first + rows)))
        at, target = read_at[here] - first, targets[here]
        # The same operation as HFLM's, so that its rounding cancels in a comparison.
        logprobs[here] = logits.log_softmax(-1, dtype=softmax_dtype)[at, target]
        greedy[here] = _is_argmax(logits, at, target)
    return Answers(logprobs.tolist(), greedy.tolist())


def _is_argmax(logits: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """Whether `targets` (N,) are the arg max of `rows` (N,) of the logits (P, V).

    A maximum is several times cheaper than an arg max, which is needed only to break ties.
    """
    found = logits[rows, targets] == logits.amax(-1)[rows]
    tied = rows[found]
    found[found.clone()] = logits[tied].argmax(-1) == targets[found]
    return found
