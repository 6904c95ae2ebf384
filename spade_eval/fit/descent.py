"""Train one map: from the ridge solution down the cross-entropy, epoch by epoch.

    whiten -> epoch 0: ridge -> Adam on eq. 8 -> ... -> the epoch that is best on held-out documents

Every epoch ends in a `Progress` that can be saved. The order of positions and the learning rate
depend on the recipe, the layer and the epoch alone, so a run that goes on from a file does, bit for
bit, what it would have done without the stop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

from spade_eval.backbone import LOGITS_BYTES
from spade_eval.errors import UserError
from spade_eval.fit.maps import (
    Affine,
    Moments,
    Pairs,
    Whitening,
    cross_entropy,
    soft_cross_entropy,
    whiten,
)
from spade_eval.fit.progress import Progress, weight_and_bias
from spade_eval.lens import affine, low_rank

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from spade_eval.backbone import Backbone


@dataclass(frozen=True)
class Recipe:
    """How maps are trained.

    Attributes:
        epochs: Passes over the training positions.
        batch: Positions per step.
        learning_rate: Adam's highest, in units of the teacher states' root mean square per unit of
            whitened input; it rises over the first tenth of the steps and falls to zero.
        penalties: Of the closed form, shares of each input's variance. A layer takes the one whose
            map is best on held-out documents. Few positions need a large one: of 800 answers, 0.1
            leaves half a nat less than 0.01.
        rank: Rank of A, None for a full matrix.
        seed: Of the order of positions.
        bf16: Whether the head's products are in bfloat16 while training.
    """

    epochs: int = 6
    batch: int = 512
    learning_rate: float = 6e-4
    penalties: tuple[float, ...] = (1e-2, 1e-1, 1.0)
    rank: int | None = None
    seed: int = 0
    bf16: bool = False


@dataclass(frozen=True)
class Ridge:
    """The closed-form map of one penalty.

    Attributes:
        penalty: A share of each input's variance.
        whitening: The inputs in which the map is written.
        parameters: A, or its factors, and b, fp32.
        loss: Held-out cross-entropy in nats per position.
    """

    penalty: float
    whitening: Whitening
    parameters: tuple[Tensor, ...]
    loss: float


class Descent:
    """Trains the map of one layer.

    Args:
        backbone: The model whose norm and head read the map.
        training: What to fit.
        held_out: Decides about the ridge penalty, and which epoch is kept.
        recipe: How.
        layer: The map's layer.
    """

    def __init__(
        self, backbone: Backbone, training: Pairs, held_out: Pairs, recipe: Recipe, layer: int
    ):
        self.backbone, self.recipe, self.layer = backbone, recipe, layer
        self.training, self.held_out = training, held_out
        self.device = training.h.device
        moments = Moments.of(training)
        best = self._ridge(moments, recipe.penalties[0])
        for penalty in recipe.penalties[1:]:
            other = self._ridge(moments, penalty)
            if other.loss < best.loss or math.isnan(best.loss):
                best = other
        self.ridge = best
        self.mean, self.forward = (
            x.float().to(self.device) for x in (best.whitening.mean, best.whitening.forward)
        )
        self.parameters = [p.contiguous().requires_grad_() for p in best.parameters]
        self.optimizer = torch.optim.Adam(self.parameters, betas=(0.9, 0.99))

    @property
    def map(self) -> Affine:
        """The map as it now is, of plain inputs."""
        return self._folded(self.ridge.whitening, self.parameters)

    def start(self) -> Progress:
        """The ridge solution; the identity where that is better, since few positions fit nothing.

        Raises:
            UserError: The states are not finite.
        """
        losses = {"ridge": self.ridge.loss, "identity": self._held_out_loss(lambda h: h)}
        if not all(map(math.isfinite, losses.values())):
            bad = int((~torch.isfinite(self.training.h + self.training.t).all(-1)).sum())
            raise UserError(
                f"layer {self.layer}: the loss is not finite before any training ({losses}); "
                f"{bad} of {len(self.training.h)} positions have states that are not. Load the "
                "model in float32 or bfloat16 (dtype=...)."
            )
        if losses["identity"] < losses["ridge"]:
            # Not all parts: the product of two zero factors has no gradient.
            with torch.no_grad():
                self.parameters[0].zero_()
                self.parameters[-1].zero_()
        done = self.recipe.epochs == 0
        ridge = self.ridge
        loss = min(losses.values())
        return self._with_state(
            Progress([loss], ridge.loss, ridge.penalty, self.map, finished=done)
        )

    def epochs(self, progress: Progress) -> Iterator[Progress]:
        """Go on behind `progress` to the last epoch.

        An epoch that is no better ends nothing: the learning rate is high until late, and only then
        does the loss fall below that of a good ridge map. One that is not finite ends the training,
        with the best map so far.
        """
        self._restore(progress)
        while not progress.finished:
            epoch = len(progress.losses)
            stopped = self._epoch(epoch)
            here = self.map
            loss = self._held_out_loss(here) if stopped is None else math.inf
            if stopped is None and not math.isfinite(loss):
                stopped = f"layer {self.layer}, epoch {epoch}: held-out loss {loss}"
            better = loss < min(progress.losses)
            progress = self._with_state(
                Progress(
                    losses=[*progress.losses, loss],
                    ridge=progress.ridge,
                    penalty=progress.penalty,
                    best=here if better else progress.best,
                    finished=stopped is not None or epoch >= self.recipe.epochs,
                    stopped=stopped,
                    seconds=progress.seconds,
                )
            )
            yield progress

    def _ridge(self, moments: Moments, penalty: float) -> Ridge:
        whitening, rank = whiten(moments, penalty), self.recipe.rank
        weight, bias = whitening.weight.float(), whitening.bias.float()
        parts = ((weight,) if rank is None else low_rank(weight, rank)) + (bias,)
        parameters = tuple(p.to(self.device) for p in parts)
        loss = self._held_out_loss(self._folded(whitening, parameters))
        return Ridge(penalty, whitening, parameters, loss)

    def _folded(self, whitening: Whitening, parameters: Sequence[Tensor]) -> Affine:
        return whitening.fold(*weight_and_bias(parameters)).to(self.device)

    def _epoch(self, epoch: int) -> str | None:
        """One pass over the training positions; says where it stopped if a loss is not finite."""
        recipe, n = self.recipe, len(self.training.h)
        generator = torch.Generator().manual_seed(
            (recipe.seed * 1_000_003 + self.layer) * 1_000_003 + epoch
        )
        batches = torch.randperm(n, generator=generator).split(recipe.batch)
        for step, batch in enumerate(batches):
            self.optimizer.zero_grad()
            loss = sum(self._backward(rows, len(batch)) for rows in batch.split(self._rows))
            if not math.isfinite(loss):
                return f"layer {self.layer}, epoch {epoch}, step {step}: loss {loss}"
            done = ((epoch - 1) * len(batches) + step) / (recipe.epochs * len(batches))
            for group in self.optimizer.param_groups:
                group["lr"] = recipe.learning_rate * one_cycle(done)
            self.optimizer.step()
        return None

    def _backward(self, rows: Tensor, positions: int) -> float:
        """Add the gradient of some rows' share of a batch's mean loss; return that share."""
        h, t = self.training.h[rows].float(), self.training.t[rows]
        x, dtype = linear(h - self.mean, self.forward), self.backbone.state_dtype
        mapped = h + self.ridge.whitening.scale * affine(x, *weight_and_bias(self.parameters))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16):
            with torch.no_grad():
                teacher = self.backbone.logits(t)
            logits = self.backbone.logits(mapped.to(dtype))
        with torch.no_grad():
            loss, gradient = soft_cross_entropy(logits, teacher)
        logits.backward((gradient / positions).to(logits.dtype))
        return float(loss) / positions

    @property
    def _rows(self) -> int:
        """Positions whose logits are held at once; larger blocks convert the head less often."""
        return max(1, LOGITS_BYTES // (4 * self.backbone.vocab_size))

    def _held_out_loss(self, read: Callable[[Tensor], Tensor]) -> float:
        return cross_entropy(self.backbone, read, self.held_out)

    # ------------------------------------------------------------------ state

    def _with_state(self, progress: Progress) -> Progress:
        """Put copies of the parameters and of Adam's moments into `progress`."""
        state = self.optimizer.state_dict()["state"]
        moments = [state[i][name] for i in state for name in ("exp_avg", "exp_avg_sq", "step")]
        progress.tensors = [t.detach().clone() for t in (*self.parameters, *moments)]
        return progress

    def _restore(self, progress: Progress) -> None:
        n = len(self.parameters)
        with torch.no_grad():
            for p, value in zip(self.parameters, progress.tensors[:n], strict=True):
                p.copy_(value)
        moments = progress.tensors[n:]
        state = {
            i: dict(zip(("exp_avg", "exp_avg_sq", "step"), moments[3 * i : 3 * i + 3], strict=True))
            for i in range(len(moments) // 3)
        }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def one_cycle(done: float) -> float:
    """The learning rate, as a share of its highest, after a share `done` of all steps."""
    rise = 0.1
    if done < rise:
        return (done + 0.01) / (rise + 0.01)
    return 0.5 * (1 + math.cos(math.pi * (done - rise) / (1 - rise)))
