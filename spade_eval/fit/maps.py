"""The maths of one map: its ridge solution, its loss, and how good it is.

    hidden states h, teacher states t (P, d) -> Moments -> whiten -> A, b: the ridge map of t - h
    logits (P, V) of both -> soft_cross_entropy (arXiv 2507.17618, eq. 8)

Hidden states have a few directions that are a thousand times larger than the others. Descent
therefore happens on whitened inputs, where one learning rate fits all, and is folded back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spade_eval.lens import affine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from spade_eval.backbone import Backbone
    from spade_eval.lens import Weight

MAPPED_ROWS = 4096  # positions of a moment's sum at once, in float64


@dataclass(frozen=True)
class Affine:
    """h -> h + A h + b.

    Attributes:
        weight: A, (d, d), or its factors, (d, r) and (r, d).
        bias: b, (d,).
    """

    weight: Weight
    bias: Tensor

    def __call__(self, h: Tensor) -> Tensor:
        """(P, d) to (P, d)."""
        return h + affine(h, self.weight, self.bias)

    def to(self, device: torch.device) -> Affine:
        """The same map on a device."""
        if isinstance(self.weight, Tensor):
            return Affine(self.weight.to(device), self.bias.to(device))
        up, down = self.weight
        return Affine((up.to(device), down.to(device)), self.bias.to(device))


@dataclass(frozen=True)
class Pairs:
    """Inputs of one map and the states it should reach.

    Attributes:
        h: Hidden states after the map's layer, (P, d).
        t: The teacher's states in the last layer's space, (P, d).
    """

    h: Tensor
    t: Tensor


@dataclass(frozen=True)
class Whitening:
    """The ridge solution, and inputs in which its problem is round.

    Attributes:
        mean: Of the inputs, (d,).
        forward: C^-1/2 of their penalised covariance, (d, d), symmetric.
        weight: A in whitened inputs, divided by `scale`: (d, d).
        bias: b at the mean, divided by `scale`: (d,).
        scale: Root mean square of the teacher states.
    """

    mean: Tensor
    forward: Tensor
    weight: Tensor
    bias: Tensor
    scale: float

    def fold(self, weight: Weight, bias: Tensor) -> Affine:
        """The map of plain inputs, fp32, of one of whitened inputs."""
        parts = [weight] if isinstance(weight, Tensor) else [*weight]
        first, *rest, b = (p.detach().to(self.mean.device).double() for p in (*parts, bias))
        first, b = first * self.scale, b * self.scale
        if not rest:
            a = first @ self.forward
            return Affine(a.float(), (b - a @ self.mean).float())
        down = rest[0] @ self.forward
        b = b - first @ (down @ self.mean)
        return Affine((first.float(), down.float()), b.float())


@dataclass(frozen=True)
class Moments:
    """What the ridge regression of t - h on h takes from the positions, in float64.

    Attributes:
        mean: Of the inputs, (d,).
        target: Mean of t - h, (d,).
        xx: Covariance of the inputs, (d, d).
        xy: Covariance of the inputs with t - h, (d, d).
        scale: Root mean square of the teacher states.
    """

    mean: Tensor
    target: Tensor
    xx: Tensor
    xy: Tensor
    scale: float

    @classmethod
    def of(cls, pairs: Pairs) -> Moments:
        """Sums over all positions, a block at a time."""
        d, device = pairs.h.shape[1], pairs.h.device
        # Apple's GPUs have no float64.
        device = torch.device("cpu") if device.type == "mps" else device
        total = torch.zeros(2 * d, dtype=torch.float64, device=device)
        square = torch.zeros(d, 2 * d, dtype=torch.float64, device=device)
        power = 0.0
        for h, t in zip(pairs.h.split(MAPPED_ROWS), pairs.t.split(MAPPED_ROWS), strict=True):
            x, y = h.to(device).double(), t.to(device).double()
            both = torch.cat([x, y - x], 1)  # (P', 2 d)
            total += both.sum(0)
            square += x.T @ both
            power += float(y.square().sum())
        mean = total / len(pairs.h)
        covariance = square / len(pairs.h) - mean[:d, None] * mean
        scale = math.sqrt(power / pairs.t.numel()) or 1.0
        xx, xy = covariance.split(d, 1)
        return cls(mean[:d], mean[d:], xx, xy, scale)


def whiten(moments: Moments, penalty: float) -> Whitening:
    """Solve the ridge regression of t - h on h.

    The penalty is a share of each input's own variance, so that units do not matter; directions
    without any variance get none of the map.
    """
    variance = moments.xx.diag()
    xx = moments.xx + torch.diag(penalty * variance + 1e-8 * variance.mean() + 1e-30)
    values, vectors = torch.linalg.eigh(xx)
    forward = (vectors * values.clamp_min(1e-30).rsqrt()) @ vectors.T
    # A = (C^-1 xy)^T; in whitened inputs A C^1/2 = (C^-1/2 xy)^T.
    weight, bias = (forward @ moments.xy).T / moments.scale, moments.target / moments.scale
    return Whitening(moments.mean, forward, weight, bias, moments.scale)


def soft_cross_entropy(logits: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of softmax(logits) under softmax(teacher), and its gradient (eq. 8).

    By hand, since autograd would pass over (P, V) numbers three times as often.

    Args:
        logits: (P, V).
        teacher: (P, V).

    Returns:
        The sum over positions in nats, a scalar, and d loss / d logits, (P, V), both fp32.
    """
    p = teacher.float().softmax(-1)
    log_q = logits.float().log_softmax(-1)
    loss = -_dot(p, log_q)
    return loss, log_q.exp_().sub_(p)


@torch.no_grad()
def cross_entropy(backbone: Backbone, read: Callable[[Tensor], Tensor], pairs: Pairs) -> float:
    """The `ce` of `measure`, without the rest."""
    total = sum(
        -float(_dot(log_p.exp(), log_q)) for _, log_p, log_q in _log_probs(backbone, read, pairs)
    )
    return total / len(pairs.h)


@torch.no_grad()
def measure(
    backbone: Backbone,
    read: Callable[[Tensor], Tensor],
    pairs: Pairs,
    full: Tensor | None = None,
) -> dict[str, float]:
    """How well a map does, averaged over positions.

    Args:
        backbone: The model whose norm and head read the states.
        read: The map, (P, d) to (P, d).
        pairs: Its inputs and the teacher's states.
        full: h^L of the same positions, (P, d); None leaves the full model out.

    Returns:
        `ce`, cross-entropy under the teacher, `kl`, the same without the teacher's own entropy,
        and `entropy`, all in nats; `agree_teacher` and `agree_full`, shares of equal arg max.
    """
    sums = dict.fromkeys(("ce", "kl", "entropy", "agree_teacher", "agree_full"), 0.0)
    if full is None:
        del sums["agree_full"]
    for at, log_p, log_q in _log_probs(backbone, read, pairs):
        top = log_q.argmax(-1)
        sums["agree_teacher"] += int((top == log_p.argmax(-1)).sum())
        if full is not None:
            sums["agree_full"] += int((top == backbone.logits(full[at]).argmax(-1)).sum())
        p = log_p.exp()
        ce = -float(_dot(p, log_q))
        sums["ce"] += ce
        sums["kl"] += ce + float(_dot(p, log_p))
        sums["entropy"] -= float(_dot(log_q.exp(), log_q))
    return {name: value / len(pairs.h) for name, value in sums.items()}


def _dot(p: Tensor, log_q: Tensor) -> Tensor:
    """Sum of products, (P, V) twice to a scalar.

    Row by row: `torch.dot` of all numbers at once is off by a thousandth in fp32, and by another
    amount with other threads.
    """
    return torch.linalg.vecdot(p, log_q).sum()


def _log_probs(
    backbone: Backbone, read: Callable[[Tensor], Tensor], pairs: Pairs
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Positions, the teacher's and the map's log-probabilities (P', V), a block at a time."""

    def log_softmax(h: Tensor) -> Tensor:
        return backbone.logits(h.to(backbone.state_dtype)).float().log_softmax(-1)

    for at in torch.arange(len(pairs.h)).split(backbone.logits_rows(torch.float32)):
        yield at, log_softmax(pairs.t[at]), log_softmax(read(pairs.h[at].float()))
