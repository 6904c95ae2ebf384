"""What `spade-eval finetune` is asked for, and the checks that need no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from spade_eval import adapter_files
from spade_eval.atomic import require_replaceable
from spade_eval.errors import UserError
from spade_eval.fit import work
from spade_eval.splits import Split

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class LoraSettings:
    """How to train an adapter (LoRA: Hu et al., 2021, arXiv 2106.09685).

    Attributes:
        output: Folder of the adapter.
        tasks: lm-eval tasks that give the documents.
        rank: r of the low-rank matrices.
        alpha: Their product is scaled by alpha / r.
        dropout: On the input of the low-rank matrices.
        learning_rate: After the warm-up.
        batch_size: Documents per step, over all processes.
        micro_batch_size: Documents that go through the model at once in one process; their
            activations are what training adds to the memory of the model.
        epochs: Passes over the documents, at most.
        max_steps: Steps, at most.
        minutes: Of training, at most.
        validation_documents: Documents that decide which adapter is kept, at most.
        validation_split: Whose these are, see `spade_eval.splits.Split`; a task that has no
            validation split gives a tenth of its training documents.
        precision: Of matrix products; "auto" takes bfloat16 where it is faster.
        seed: Of the documents' order, of what is held out, and of the first weights.

    Raises:
        UserError: A number out of its range.
    """

    output: Path
    tasks: tuple[str, ...]
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    learning_rate: float = 2e-4
    batch_size: int = 16
    micro_batch_size: int = 4
    epochs: int = 3
    max_steps: int | None = None
    minutes: float | None = None
    validation_documents: int = 200
    validation_split: str = "validation"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"validation_documents": 2, "seed": 0}
        whole = ("rank", "alpha", "batch_size", "micro_batch_size", "epochs", "max_steps", *least)
        for name in whole:
            value, smallest = getattr(self, name), least.get(name, 1)
            if value is not None and value < smallest:
                raise UserError(f"{name}={value}: give a whole number from {smallest} up.")
        for name in ("learning_rate", "minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name}={value}: give a number above 0.")
        Split.parse(self.validation_split)
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout}: give a number from 0 to below 1.")

    @property
    def work(self) -> Path:
        """The folder of a run that has not ended."""
        output = self.output.absolute()  # "." has no name
        return output.parent / f".{output.name}.finetune"

    def micro_batches(self, processes: int) -> int:
        """Micro-batches of a step in each process.

        Raises:
            UserError: A step's documents cannot be shared out like that.
        """
        at_once = self.micro_batch_size * processes
        if self.batch_size % at_once:
            raise UserError(
                f"batch_size={self.batch_size} is no multiple of micro_batch_size="
                f"{self.micro_batch_size} times {processes} processes. Change one of them."
            )
        return self.batch_size // at_once


def check_output(settings: LoraSettings, resume: bool, overwrite: bool) -> None:
    """Refuse to overwrite an adapter or half of one, before anything is loaded.

    Raises:
        UserError: Says what is there and what to do.
    """
    work.require_free(settings.output, settings.work, resume, overwrite)
    require_replaceable(settings.output, "adapter", adapter_files.FILES.__contains__)
