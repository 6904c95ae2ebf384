"""When to exit: the rule that compares a confidence with T, and the candidate layers.

logits of P positions at a candidate layer (P, V) -> measure (P,) -> confident (P,) bool
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from spade_eval.confidence import CONFIDENCES, Name
from spade_eval.errors import UserError, require_known

if TYPE_CHECKING:
    from collections.abc import Collection

Scope = Literal["context", "token", "request"]
Readout = Literal["spade", "lens"]


def never(confidence: Name, threshold: float) -> bool:
    """Whether no value can meet the threshold, so that no check needs to be evaluated."""
    _refuse_nan(threshold)
    kind = CONFIDENCES[confidence]
    return threshold < 0 if kind.low else threshold > kind.most


def confident(values: Tensor, threshold: float, confidence: Name) -> Tensor:
    """The exit rule: H <= T for entropies (Algorithm 1), >= T for probabilities.

    Args:
        values: What `confidence` measured, (P,).
        threshold: T; the comparison is made in the type of `values`.
        confidence: Says which direction is the confident one.

    Returns:
        Which positions exit, (P,) bool; NaN never does.
    """
    _refuse_nan(threshold)
    return values <= threshold if CONFIDENCES[confidence].low else values >= threshold


def request_mean(values: Tensor, members: Tensor, n: int) -> Tensor:
    """Mean confidence of each request, for exit_scope=request.

    Args:
        values: Confidence of each position, (P,).
        members: The request that each position belongs to, from 0 to n - 1, (P,) int64.
        n: How many requests there are.

    Returns:
        Means (n,); NaN, which is never confident, for a request without positions.
    """
    means = values.new_full((n,), torch.nan)
    return means.scatter_reduce(0, members, values, "mean", include_self=False)


def candidates(
    n_layers: int,
    interval: int = 2,
    min_layer: int | None = None,
    maps: Collection[int] | None = None,
) -> tuple[int, ...]:
    """The layers at which an exit is considered: multiples of `interval` from `min_layer` up.

    Args:
        n_layers: L; candidates lie strictly between 0 and L.
        interval: From 1 up.
        min_layer: From 0 to L; None is ceil(L / 2).
        maps: Layers at which the lens has a map; None is every layer.

    Returns:
        The candidates, ascending, at least one.

    Raises:
        UserError: A value out of range, or no candidate left.
    """
    interval = _whole("interval", interval, 1)
    if n_layers < 2:
        raise UserError(f"A model of {n_layers} layer has no layer to exit from before its last.")
    if interval >= n_layers:
        raise UserError(
            f"interval={interval} is too large: this model has {n_layers} layers, and exits lie "
            f"before the last. Give a whole number from 1 to {n_layers - 1}."
        )
    grid = range(interval, n_layers, interval)
    least = (n_layers + 1) // 2 if min_layer is None else _whole("min_layer", min_layer, 0)
    if least > grid[-1]:
        raise UserError(
            f"min_layer={least} lies beyond the last candidate: this model has {n_layers} layers, "
            f"and with interval={interval} the last exit is at layer {grid[-1]}. Give a whole "
            f"number from 0 to {grid[-1]}."
        )
    asked = [layer for layer in grid if layer >= least]
    found = tuple(layer for layer in asked if maps is None or layer in maps)
    if maps is not None and not found:
        usable = sorted(layer for layer in maps if 0 < layer < n_layers)
        also = f", or interval=1,min_layer={usable[0]} to use those it has" if usable else ""
        raise UserError(
            f"The lens has no map at a layer where an exit may happen. Its maps: "
            f"{_listed(sorted(maps))}; asked with interval={interval},min_layer={least}: "
            f"{_listed(asked)}. Give a lens with maps there{also}."
        )
    return found


@dataclass(frozen=True)
class ExitRule:
    """The settings of SPADE-EXIT that need no model.

    Attributes:
        threshold: T: nats for entropies, a probability otherwise. "inf" and "-inf" become numbers.
        confidence: What is compared with T.
        interval: Candidate layers are its multiples.
        min_layer: The first layer that may be one; None is ceil(L / 2).
        exit_scope: What decides together: all continuations of a context, each token, each request.
        readout: What answers after an exit: the two-token tail, or the lens of the check itself.

    Raises:
        UserError: A value that is not valid for any model.
    """

    threshold: float
    confidence: Name = "entropy"
    interval: int = 2
    min_layer: int | None = None
    exit_scope: Scope = "context"
    readout: Readout = "spade"

    def __post_init__(self) -> None:
        for argument, value, valid in (
            ("confidence", self.confidence, get_args(Name)),
            ("exit_scope", self.exit_scope, get_args(Scope)),
            ("readout", self.readout, get_args(Readout)),
        ):
            require_known(argument, value, valid)
        if self.confidence == "choice_entropy" and self.exit_scope != "context":
            raise UserError(
                "confidence=choice_entropy asks which choice follows a context; exit_scope="
                f"{self.exit_scope} decides elsewhere. Leave exit_scope out, or use "
                "confidence=entropy."
            )
        # lm-eval's command line may give 2 as 2.0 and inf as a string; from here on they are what
        # the annotations say.
        object.__setattr__(self, "threshold", _threshold(self.threshold, self.confidence))
        object.__setattr__(self, "interval", _whole("interval", self.interval, 1))
        if self.min_layer is not None:
            object.__setattr__(self, "min_layer", _whole("min_layer", self.min_layer, 0))

    @property
    def never(self) -> bool:
        """Whether no value can meet the threshold."""
        return never(self.confidence, self.threshold)

    def measure(self, logits: Tensor, exists: Tensor | None = None) -> Tensor:
        """Values (P,) of logits (P, V); `choice_entropy` takes (P, C) and which choices exist."""
        measure = CONFIDENCES[self.confidence].measure
        return measure(logits) if exists is None else measure(logits, exists)

    def confident(self, values: Tensor) -> Tensor:
        """Which of the values (P,) let their positions exit, (P,) bool."""
        return confident(values, self.threshold, self.confidence)

    def candidates(self, n_layers: int, maps: Collection[int] | None = None) -> tuple[int, ...]:
        """The candidate layers in a model of `n_layers`; see the function of this name."""
        return candidates(n_layers, self.interval, self.min_layer, maps)

    def describe(self) -> dict[str, object]:
        """Settings under the names of the arguments, as they go to the results file."""
        # JSON has no infinity: it goes there as the string that the argument takes.
        threshold = self.threshold if math.isfinite(self.threshold) else str(self.threshold)
        return {
            "threshold": threshold,
            "confidence": self.confidence,
            "interval": self.interval,
            "min_layer": self.min_layer,
            "exit_scope": self.exit_scope,
            "readout": self.readout,
        }


DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(ExitRule) if f.name != "threshold"}
"""Of the arguments that a run with exits takes beside its threshold."""
DEFAULTS["positions"] = "reset"  # of the tail's pairs


def _listed(layers: Collection[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


def _refuse_nan(threshold: float) -> None:
    if math.isnan(threshold):
        raise UserError("threshold=nan: every comparison with it is false. Give a number.")


def _threshold(value: object, confidence: Name) -> float:
    """Check a threshold that a user gave."""
    meaning = (
        "the entropy in nats at or below which an answer exits, such as 1.2 (-1: never)"
        if CONFIDENCES[confidence].low
        else "the probability at or above which an answer exits, such as 0.9 (2: never)"
    )
    if value is None:
        raise UserError(f"threshold is missing. Give {meaning}.")
    if value in ("inf", "-inf", "nan"):
        value = float(str(value))
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UserError(f"threshold={value!r} is not a number. Give {meaning}.")
    _refuse_nan(float(value))
    return float(value)


def _whole(argument: str, value: object, least: int) -> int:
    """Check a whole number that a user gave."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise UserError(f"{argument}={value!r}: give a whole number from {least} up.")
    return int(value)
