"""Read answers: final norm, head, log-softmax, and the log-probabilities of the asked tokens.

states in the last layer's space (P, d) -> logits (P, V), a block at a time -> (N,)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from spade_eval.transfer import put

if TYPE_CHECKING:
    from collections.abc import Callable

    from spade_eval.backbone import Backbone
    from spade_eval.batching import Ints


@dataclass(frozen=True)
class Answers:
    """What N reads found.

    Attributes:
        logprobs: The log-probability of each target, in nats.
        greedy: Whether it is the most likely token.
    """

    logprobs: list[float]
    greedy: list[bool]


def read(
    backbone: Backbone,
    h: Tensor,
    read_at: Ints,
    targets: Ints,
    softmax_dtype: torch.dtype,
    watch: Callable[[int, Tensor], None] | None = None,
) -> Answers:
    """Head, log-softmax and gather, over a bounded number of positions at a time.

    Args:
        backbone: The model whose head is used.
        h: States of the scored positions in the last layer's space, (P, d).
        read_at: For each of N reads the position it reads, ascending, (N,).
        targets: The token whose log-probability it asks for, (N,).
        softmax_dtype: The log-softmax is computed in this type.
        watch: Is shown each block of logits, (P', V), and the position that it begins with.
    """
    rows_at = put(read_at, h.device)
    tokens = put(targets, h.device)
    logprobs = torch.empty(len(read_at), dtype=softmax_dtype, device=h.device)  # (N,)
    greedy = torch.empty(len(read_at), dtype=torch.bool, device=h.device)
    rows = backbone.logits_rows(softmax_dtype)
    for first in range(0, len(h), rows):
        logits = backbone.logits(h[first : first + rows]).to(h.device)  # (P', V)
        if watch is not None:
            watch(first, logits)
        here = slice(*np.searchsorted(read_at, (first, first + rows)))
        at, target = rows_at[here] - first, tokens[here]
        logprobs[here], greedy[here] = pick(logits, at, target, softmax_dtype)
    return Answers(logprobs.tolist(), greedy.tolist())


def pick(
    logits: Tensor, at: Tensor, targets: Tensor, softmax_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What reads find in a block of logits.

    Args:
        logits: (P, V).
        at: The row that each of N reads looks at, (N,).
        targets: The token whose log-probability it asks for, (N,).
        softmax_dtype: The log-softmax is computed in this type.

    Returns:
        Log-probabilities (N,), and whether each target is the most likely token, (N,).
    """
    # The same operation as HFLM's, so that its rounding cancels in a comparison.
    logprobs = logits.log_softmax(-1, dtype=softmax_dtype)[at, targets]
    return logprobs, _is_argmax(logits, at, targets)


def _is_argmax(logits: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """Whether `targets` (N,) are the arg max of `rows` (N,) of the logits (P, V).

    A maximum is several times cheaper than an arg max, which is needed only to break ties.
    """
    found = logits[rows, targets] == logits.amax(-1)[rows]
    tied = rows[found]
    found[found.clone()] = logits[tied].argmax(-1) == targets[found]
    return found
