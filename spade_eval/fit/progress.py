"""Where the training of one map stands, and the file that keeps it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from spade_eval.atomic import replacing_file
from spade_eval.errors import UserError
from spade_eval.fit.maps import Affine

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from spade_eval.lens import Weight


@dataclass
class Progress:
    """Where the training of one map stands.

    Attributes:
        losses: Held-out cross-entropy in nats per position: at the start, and after each epoch.
        ridge: That of the ridge solution.
        penalty: The ridge solution's.
        best: The map with the lowest of `losses`.
        finished: Whether training has ended.
        stopped: Where a loss was not finite; None if all were.
        seconds: Time spent.
        metrics: What `spade_eval.fit.maps.measure` found at the end.
        tensors: Parameters and Adam's moments, in order.
    """

    losses: list[float]
    ridge: float
    penalty: float
    best: Affine
    finished: bool = False
    stopped: str | None = None
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list, repr=False)

    def save(self, path: Path) -> None:
        """Write all of it to one file, which appears whole or not at all."""
        parts = [self.best.weight] if isinstance(self.best.weight, Tensor) else [*self.best.weight]
        tensors = {f"best.{i}": t for i, t in enumerate([*parts, self.best.bias])}
        tensors |= {f"state.{i}": t for i, t in enumerate(self.tensors)}
        about = {
            "losses": self.losses,
            "ridge": self.ridge,
            "penalty": self.penalty,
            "finished": self.finished,
            "stopped": self.stopped,
            "seconds": self.seconds,
            "metrics": self.metrics,
        }
        plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        with replacing_file(path) as new:
            save_file(plain, new, metadata={"progress": json.dumps(about)})

    @classmethod
    def load(cls, path: Path) -> Progress:
        """Read what `save` wrote.

        Raises:
            UserError: The file is damaged.
        """
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["progress"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as err:  # safetensors raises errors of its own making
            raise UserError(
                f"{path} is damaged ({err}): delete it, and --resume fits this layer again."
            ) from err
        best, state = (
            [tensors[f"{kind}.{i}"] for i in range(sum(name.startswith(kind) for name in tensors))]
            for kind in ("best", "state")
        )
        return cls(best=Affine(*weight_and_bias(best)), tensors=state, **about)


def weight_and_bias(tensors: Sequence[Tensor]) -> tuple[Weight, Tensor]:
    """A, one matrix or two factors, and b, as they lie in a list."""
    *parts, bias = tensors
    return (parts[0] if len(parts) == 1 else (parts[0], parts[1])), bias
