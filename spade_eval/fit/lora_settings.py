"""What `spade-eval finetune` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

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
        micro_batch_size: Documents that go through the model at once in one process; bounds memory.
        epochs: Passes over the documents, at most.
        max_steps: Steps, at most.
        minutes: Of training, at most.
        validation_documents: Documents that decide which adapter is kept, at most.
        precision: Of matrix products; "auto" takes bfloat16 where it is faster.
        seed: Of the documents' order, of what is held out, and of the first weights.
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
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0

    @property
    def work(self) -> Path:
        """The folder of a run that has not ended."""
        output = self.output.absolute()  # "." has no name
        return output.parent / f".{output.name}.finetune"
