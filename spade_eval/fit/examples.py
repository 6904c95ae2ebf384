"""Training examples of right answers, their batches and their loss.

Only the positions that predict an answer token reach the head; the context is read, not learned.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.trainer_pt_utils import LengthGroupedSampler

from spade_eval import scoring
from spade_eval.hollow import unwrap_peft

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import PeftModel

IGNORED = -100  # the label of a token that is not learned; also what the Trainer does not count

Example = dict[str, list[int]]  # input_ids (T), labels (T + 1)


def example(request: scoring.Request, layout: scoring.Layout) -> Example:
    """What the model is fed for a request, and the tokens that it is to predict.

    Returns:
        `input_ids`, (T): the request without its last token. `labels`, (T + 1): the tokens of the
        continuation where they stand in the whole request, `IGNORED` before them. Position t of the
        first predicts position t + 1 of the second.
    """
    ids, _ = scoring.feed(request, layout)
    answer = request.continuation
    labels = [IGNORED] * (len(ids) + 1 - len(answer)) + list(answer)
    return {"input_ids": list(ids), "labels": labels}


def in_training_order(
    examples: Sequence[Example], epochs: int, batch_size: int, seed: int
) -> list[Example]:
    """All epochs one after the other, each in batches of about equal length, which are shuffled.

    The Trainer's sampler alone would begin with the longest examples, and a short training see no
    others. The order is made once, so that a run that resumes finds its place by counting.
    """
    lengths = [len(one["input_ids"]) for one in examples]
    ordered: list[Example] = []
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(seed + epoch)
        grouped = [*LengthGroupedSampler(batch_size, lengths=lengths, generator=generator)]
        order = torch.randperm(len(grouped) // batch_size, generator=generator).tolist()
        # What fills no batch stays last, or it would shift all batches behind it.
        for batch in (*order, len(order)):
            some = grouped[batch * batch_size : (batch + 1) * batch_size]
            ordered += [examples[index] for index in some]
    return ordered


class Collator:
    """Makes right-padded batches; under causal attention nothing sees what stands behind it."""

    def __init__(self, model: PeftModel):
        # A model with code of its own may not know the argument; it computes all logits.
        parameters = inspect.signature(unwrap_peft(model).forward).parameters
        self._narrows = "logits_to_keep" in parameters

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Make `input_ids` (B, T), `labels` (B, T + 1), and what the head is to read, (B, T)."""
        ids = _padded([one["input_ids"] for one in examples], 0)  # (B, T)
        labels = _padded([one["labels"] for one in examples], IGNORED)  # (B, T + 1)
        batch = {"input_ids": ids, "labels": labels}
        return batch | ({"logits_to_keep": labels[:, 1:] != IGNORED} if self._narrows else {})


def answer_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    """Cross-entropy of the answer tokens, in nats per token.

    Args:
        outputs: With `logits`, (P, V) of the answer positions alone, or (B, T, V).
        labels: (B, T + 1), see `example`.
        num_items_in_batch: Answer tokens of the whole step, over all its micro-batches and
            processes; those of this batch if absent.
    """
    targets = labels[:, 1:]  # (B, T)
    kept = targets != IGNORED
    logits = outputs.logits if outputs.logits.ndim == 2 else outputs.logits[kept]  # (P, V)
    loss = torch.nn.functional.cross_entropy(logits.float(), targets[kept], reduction="sum")
    return loss / (kept.sum() if num_items_in_batch is None else num_items_in_batch)


def _padded(rows: Sequence[list[int]], filler: int) -> Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=filler)
