"""Ask a lens how sure it is: confidences, and the answers that lie in the very same logits.

states in the last layer's space (U, d) -> head, a block at a time (U', V) -> values (U,)
                                                                           -> reads (R,)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from spade_eval.answers import pick
from spade_eval.transfer import put

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spade_eval.backbone import Backbone
    from spade_eval.batching import Ints
    from spade_eval.exits import ExitRule


def measure(
    backbone: Backbone,
    aligned: Tensor,
    rule: ExitRule,
    read_at: Ints,
    targets: Ints,
    softmax_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The confidence at some positions, and what their reads find if the lens itself answers.

    The logits of a block are gone with it, so the reads are answered before all decisions are
    known. Those of positions that cannot exit cost no log-softmax.

    Args:
        backbone: The model whose head is used.
        aligned: States of the positions in the last layer's space, (U, d).
        rule: What is measured, and what it is compared with.
        read_at: For each of R reads the position it reads, ascending, (R,); none if something else
            answers.
        targets: The token whose log-probability it asks for, (R,).
        softmax_dtype: The log-softmax is computed in this type.

    Returns:
        Values (U,); log-probabilities (R,), NaN where the position does not exit, and whether each
        target is the most likely token, (R,).
    """
    values = []
    logprobs = torch.full((len(read_at),), torch.nan, dtype=softmax_dtype)
    greedy = torch.zeros(len(read_at), dtype=torch.bool)
    rows = backbone.logits_rows(torch.promote_types(softmax_dtype, torch.float32))
    for first in range(0, len(aligned), rows):
        logits = backbone.logits(aligned[first : first + rows])  # (U', V)
        values.append(rule.measure(logits))
        here = np.arange(*np.searchsorted(read_at, (first, first + rows)))
        if len(here) and rule.exit_scope != "request":  # where no position decides alone
            here = here[rule.confident(values[-1]).cpu().numpy()[read_at[here] - first]]
        if len(here):
            distinct, of = np.unique(read_at[here] - first, return_inverse=True)
            asked, at, tokens = (put(x, logits.device) for x in (distinct, of, targets[here]))
            found = pick(logits[asked], at, tokens, softmax_dtype)
            logprobs[here], greedy[here] = (x.cpu() for x in found)
    return torch.cat(values), logprobs, greedy


def measure_choices(
    backbone: Backbone, aligned: Tensor, rule: ExitRule, choices: Sequence[Sequence[int]]
) -> Tensor:
    """The entropy over choices, (U,), of states in the last layer's space, (U, d)."""
    tokens = sorted({token for some in choices for token in some})
    column = {token: i for i, token in enumerate(tokens)}
    exists = torch.zeros(len(choices), len(tokens), dtype=torch.bool)
    for row, some in enumerate(choices):
        exists[row, [column[token] for token in some]] = True
    asked = torch.tensor(tokens, device=aligned.device)
    # A few columns of all positions take no room, the whole head would.
    rows = len(aligned) if backbone.narrows else backbone.logits_rows(torch.float32)
    values = []
    for h, those in zip(aligned.split(rows), exists.split(rows), strict=True):
        logits = backbone.logits(h, asked)  # (U', C)
        values.append(rule.measure(logits, those.to(logits.device)))
    return torch.cat(values)
