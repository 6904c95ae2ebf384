"""How sure a distribution is.

    logits of P positions (P, V) -> measure (P,), fp32

| confidence | measure | exits if |
|---|---|---|
| entropy (arXiv 2507.17618, eq. 9) | H = -sum_v p_v ln p_v, in nats | <= T |
| choice_entropy | the same over the context's own answer choices | <= T |
| top2_margin | the largest probability less the second largest | >= T |
| max_prob | the largest probability | >= T |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

Name = Literal["entropy", "choice_entropy", "top2_margin", "max_prob"]

# Logits per block on a CPU. Temporaries of a few MB stay near the core and are used again, where
# larger ones come from the system each time. Still smaller blocks are faster on an idle machine,
# but their threads meet more often, which takes many times as long where cores are shared.
CPU_BLOCK = 1_000_000


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats (eq. 9), in fp32.

    Args:
        logits: (P, V) in any floating type; -inf is a probability of 0. A row with NaN, or without
            any finite logit, has the entropy NaN, which is confident at no threshold.

    Returns:
        H, (P,), from 0 to ln V.
    """
    return _by_blocks(_entropy, logits)


def choice_entropy(logits: Tensor, exists: Tensor) -> Tensor:
    """Entropy in nats over a context's own answer choices, in fp32.

    Args:
        logits: At the first tokens of the choices, (P, C), each distinct token once.
        exists: Which of them the context has, (P, C) bool.

    Returns:
        H, (P,), from 0 (a single choice) to ln C; NaN where there is no choice.
    """
    return entropy(logits.masked_fill(~exists, -torch.inf))


def top2_margin(logits: Tensor) -> Tensor:
    """The largest probability less the second largest, (P, V) to (P,), in fp32."""
    return _by_blocks(_top2_margin, logits)


def max_prob(logits: Tensor) -> Tensor:
    """The largest probability, (P, V) to (P,), in fp32."""
    return _by_blocks(_max_prob, logits)


def _by_blocks(measure: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """Apply `measure` to a few rows at a time on a CPU, to all of them at once elsewhere."""
    if logits.device.type != "cpu":
        return measure(logits)
    rows = max(1, CPU_BLOCK // logits.shape[-1])
    return torch.cat([measure(block) for block in logits.split(rows)])


def _shifted(logits: Tensor) -> Tensor:
    """A new tensor of fp32 logits whose largest is 0 in each row."""
    # Subtracting fp32 from a half-precision tensor converts and shifts in a single pass.
    return (logits - logits.amax(-1, keepdim=True).float()).float()


def _entropy(logits: Tensor) -> Tensor:
    # With z shifted and n = sum e^z: H = ln n - sum(e^z z) / n. Neither ln n nor -z is negative, so
    # nothing cancels. The clamp turns 0 * -inf, which is NaN, into 0.
    z = _shifted(logits).clamp_(min=torch.finfo(torch.float32).min)
    e = z.exp()
    n = e.sum(-1)
    return n.log() - e.mul_(z).sum(-1) / n


def _max_prob(logits: Tensor) -> Tensor:
    return _shifted(logits).exp_().sum(-1).reciprocal()


def _top2_margin(logits: Tensor) -> Tensor:
    first, second = logits.topk(2, -1).values.float().unbind(-1)
    return -torch.expm1(second - first) * _max_prob(logits)


@dataclass(frozen=True)
class Confidence:
    """One way to tell whether a distribution may be trusted.

    Attributes:
        measure: From logits (P, V) to values (P,) in fp32; `choice_entropy` takes its mask too.
        low: Whether low values are the confident ones.
        most: The values lie in [0, most].
    """

    measure: Callable[..., Tensor]
    low: bool
    most: float


CONFIDENCES: dict[Name, Confidence] = {
    "entropy": Confidence(entropy, low=True, most=math.inf),
    "choice_entropy": Confidence(choice_entropy, low=True, most=math.inf),
    "top2_margin": Confidence(top2_margin, low=False, most=1.0),
    "max_prob": Confidence(max_prob, low=False, most=1.0),
}
