"""LoRA training on right answers, by the Trainer of transformers.

    documents -> (token ids, labels), in the order of training -> Trainer -> whole checkpoints

The loss is the cross-entropy of the answer tokens (the context is read, not learned), and only the
positions that predict them reach the head.
"""

from __future__ import annotations

import inspect
import shutil
import time
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerControl
from transformers.trainer_pt_utils import LengthGroupedSampler

from spade_eval import scoring
from spade_eval.hollow import unwrap_peft

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel


IGNORED = -100  # the label of a token that is not learned; also what the Trainer does not count
WARM_UP = 10  # steps
EVALUATIONS = 4  # per epoch, at least
MOST_STEPS = 50  # between two evaluations, each with a checkpoint
PATIENCE = 6  # evaluations without a better one, then training stops
WHOLE = "whole"  # marks a checkpoint that was written to its end

Example = dict[str, list[int]]  # input_ids (T), labels (T + 1)


def example(request: scoring.Request, layout: scoring.Layout) -> Example:
    """What the model is fed for a request, and the tokens that it is to predict.

    Returns:
        `input_ids`, (T), the request without its last token; `labels`, (T + 1), the tokens of the
        continuation where they stand in the whole request, and `IGNORED` before them. Position t
        predicts label t + 1.
    """
    ids, _ = scoring.feed(request, layout)
    answer = request.continuation
    return {
        "input_ids": list(ids),
        "labels": [IGNORED] * (len(ids) + 1 - len(answer)) + list(answer),
    }


def in_training_order(
    examples: Sequence[Example], epochs: int, batch_size: int, seed: int
) -> list[Example]:
    """All epochs one after the other, each shuffled, examples of about equal length together.

    The order is made once, so that a run that resumes finds its place by counting.
    """
    lengths = [len(one["input_ids"]) for one in examples]
    ordered: list[Example] = []
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(seed + epoch)
        sampler = LengthGroupedSampler(batch_size, lengths=lengths, generator=generator)
        ordered += [examples[index] for index in sampler]
    return ordered


class Collator:
    """Right-padded batches of examples; causal attention needs no mask for what stands behind."""

    def __init__(self, model: PreTrainedModel):
        # Remote code may know nothing of it: such a model computes all logits.
        parameters = inspect.signature(unwrap_peft(model).forward).parameters
        self._narrows = "logits_to_keep" in parameters

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Make `input_ids` (B, T), `labels` (B, T + 1) and the positions to read (B, T)."""
        ids = _padded([one["input_ids"] for one in examples], 0)  # (B, T)
        labels = _padded([one["labels"] for one in examples], IGNORED)  # (B, T + 1)
        batch = {"input_ids": ids, "labels": labels}
        return batch | ({"logits_to_keep": labels[:, 1:] != IGNORED} if self._narrows else {})


def answer_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    """Cross-entropy of the answer tokens, in nats per token.

    Args:
        outputs: With `logits`, (P, V) for the answer positions alone, or (B, T, V).
        labels: (B, T + 1), see `example`.
        num_items_in_batch: Answer tokens of the whole step, over all its micro-batches and
            processes; those of this batch if absent.
    """
    targets = labels[:, 1:]  # (B, T)
    kept = targets != IGNORED
    logits = outputs.logits if outputs.logits.ndim == 2 else outputs.logits[kept]  # (P, V)
    loss = torch.nn.functional.cross_entropy(logits.float(), targets[kept], reduction="sum")
    return loss / (kept.sum() if num_items_in_batch is None else num_items_in_batch)


class AnswerTrainer(Trainer):
    """A Trainer that validates by accuracy.

    Args:
        validate: Returns the metrics of a validation; must be the same on all processes.
        **kwargs: The Trainer's.
    """

    def __init__(self, validate: Callable[[], dict[str, float]], **kwargs: Any):
        super().__init__(**kwargs)
        self._validate = validate

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validate, and tell log and callbacks as the Trainer does."""
        metrics = {f"eval_{name}": value for name, value in self._validate().items()}
        self.log(metrics)
        told = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.control: TrainerControl = told
        return metrics


class Budget(TrainerCallback, ExportableState):
    """Ends training after a time, counted over all processes of a run that was resumed."""

    def __init__(self, minutes: float):
        self.minutes = minutes
        self.seconds = 0.0
        self._last = time.monotonic()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._last = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Stop with an evaluation and a checkpoint when the time is over."""
        now = time.monotonic()
        self.seconds, self._last = self.seconds + now - self._last, now
        if self.seconds >= 60 * self.minutes:
            control.should_training_stop = control.should_evaluate = control.should_save = True
        return control

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {"minutes": self.minutes}, "attributes": {"seconds": self.seconds}}


class KeepWhole(TrainerCallback):
    """Marks a checkpoint as whole once all its files are written, then drops older ones.

    The best one and the last one stay. The Trainer's own limit would drop an old one before the new
    one is known to be whole.
    """

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called when all files of this process are written."""
        processes = PartialState()
        processes.wait_for_everyone()
        if not processes.is_main_process:
            return
        last = checkpoint(args.output_dir, state.global_step)
        (last / WHOLE).touch()
        kept = {last, checkpoint(args.output_dir, state.best_global_step)}
        for folder in last.parent.glob("checkpoint-*"):
            if folder not in kept:
                shutil.rmtree(folder)


def checkpoint(work: str | Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    from pathlib import Path

    return Path(work) / f"checkpoint-{step}"


def last_whole(work: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    whole = [mark.parent for mark in work.glob(f"checkpoint-*/{WHOLE}")]
    return max(whole, key=lambda folder: int(folder.name.partition("-")[2]), default=None)


def _padded(rows: Sequence[list[int]], filler: int) -> Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=filler)
