"""Decoders: read an answer's distribution out of an intermediate layer.

Every decoder is one step that carries states of layer l into the space of the last layer, followed
by the model's own final norm and head:

    states of P scored positions after layer l (P, d) -> align: (P, d) -> logits (P, V)

| decoder | align |
|---|---|
| logit lens (nostalgebraist, 2020) | identity |
| SPADE (arXiv 2507.17618, eq. 6) | the pair [start, token] goes through layers l+1..L |
| SPADE-NoS (the paper's ablation) | the token goes through layers l+1..L alone |
| L-SPADE (eq. 7), tuned lens (arXiv 2303.08112) | a linear map of layer l |

At l = L all of them are the model itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from spade_eval.errors import require_known

if TYPE_CHECKING:
    from spade_eval.backbone import Backbone
    from spade_eval.batching import Ints
    from spade_eval.lens import LinearLens

Positions = Literal["reset", "keep"]
Start = Literal["keep", "none"]


@dataclass(frozen=True)
class States:
    """P scored positions after layer l, and what a tail needs to know about their tokens.

    Attributes:
        h: Hidden states after `layer`, (P, d).
        layer: l, from 0 (embedding) to L; or one for each position, (P,), on the CPU.
        token_ids: The token at each position, (P,).
        start_ids: The token at position 0 of its sequence, (P,).
        positions: Where the token stands in its sequence, counted from 0, (P,).
    """

    h: Tensor
    layer: int | Tensor
    token_ids: Tensor
    start_ids: Tensor
    positions: Tensor


class Decoder(Protocol):
    """What scoring asks of a decoder."""

    def align(self, backbone: Backbone, states: States) -> Tensor:
        """Carry states of `states.layer` into the last layer's space, (P, d) to (P, d)."""

    def tails(self, backbone: Backbone, positions: Ints) -> Ints:
        """Tokens that `align` sends through the remaining layers, by `positions`, (P,) to (P,)."""

    def describe(self) -> dict[str, object]:
        """Name and settings, as they go to the results file."""


@dataclass(frozen=True)
class LogitLens:
    """The states as they are: head(norm(h^l))."""

    def align(self, backbone: Backbone, states: States) -> Tensor:
        """Return the states themselves."""
        return states.h

    def tails(self, backbone: Backbone, positions: Ints) -> Ints:
        """Zeros: it runs no layer."""
        return np.zeros(len(positions), dtype=np.int64)

    def describe(self) -> dict[str, object]:
        """Name and settings."""
        return {"decoder": "logit_lens"}


@dataclass(frozen=True)
class Linear:
    """L-SPADE or tuned lens: the lens's map of the states' layer.

    No map is fitted at position 0, where there is no pair and states are unlike all others: the
    start token's own full-depth state answers there, as in SPADE.

    Attributes:
        lens: The maps, on the model's device.
    """

    lens: LinearLens

    def align(self, backbone: Backbone, states: States) -> Tensor:
        """Apply the map of the states' layer (eq. 7)."""
        if isinstance(states.layer, int) and states.layer == backbone.n_layers:
            return states.h
        layers = torch.as_tensor(states.layer).expand(len(states.h))
        out = states.h.clone()
        for layer in layers.unique().tolist():
            rows = (layers == layer).to(out.device)
            out[rows] = self.lens(states.h[rows], layer)
        first = states.positions == 0
        if first.any():
            own = backbone.start_states(states.start_ids[first]).hidden(backbone.n_layers)
            out[first] = own.to(out.device, out.dtype)
        return out

    def tails(self, backbone: Backbone, positions: Ints) -> Ints:
        """Zeros: it runs no layer."""
        return np.zeros(len(positions), dtype=np.int64)

    def describe(self) -> dict[str, object]:
        """Name."""
        return {"decoder": self.lens.config.decoder}


@dataclass(frozen=True)
class Spade:
    """SPADE and its ablation SPADE-NoS.

    The token at position 0 is the start token itself: there is no pair, and its own full-depth
    state answers.

    Attributes:
        positions: "reset" gives the pair the positions [0, 1], "keep" gives it [0, i].
        start: "keep" sends the pair, "none" the answer token alone.

    Raises:
        UserError: An unknown setting.
    """

    positions: Positions = "reset"
    start: Start = "keep"

    def __post_init__(self) -> None:
        for setting, value, valid in (
            ("positions", self.positions, get_args(Positions)),
            ("start", self.start, get_args(Start)),
        ):
            require_known(setting, value, valid)

    def align(self, backbone: Backbone, states: States) -> Tensor:
        """Send the answer tokens through the remaining layers (eq. 6)."""
        if isinstance(states.layer, int) and states.layer == backbone.n_layers:
            return states.h
        paired = self.start == "keep"
        if self.positions == "keep":
            positions = states.positions
        else:
            positions = torch.full_like(states.positions, int(paired))
        first = states.positions == 0
        if not paired or not first.any():
            starts = states.start_ids if paired else None
            return backbone.tail(states.h, states.layer, states.token_ids, positions, starts)
        later = ~first
        layer = states.layer
        if isinstance(layer, Tensor):
            layer = layer[later.cpu()]
        out = torch.empty_like(states.h)
        own = backbone.start_states(states.start_ids[first]).hidden(backbone.n_layers)
        out[first] = own.to(out.device, out.dtype)
        out[later] = backbone.tail(
            states.h[later],
            layer,
            states.token_ids[later],
            positions[later],
            states.start_ids[later],
        )
        return out

    def tails(self, backbone: Backbone, positions: Ints) -> Ints:
        """The token, and its start token where that is not stored; none at position 0 of a pair."""
        if self.start == "none":
            return np.ones(len(positions), dtype=np.int64)
        return np.where(positions > 0, 1 if backbone.keeps_keys else 2, 0)

    def describe(self) -> dict[str, object]:
        """Name and settings."""
        name = "spade" if self.start == "keep" else "spade_nos"
        return {"decoder": name, "positions": self.positions, "start": self.start}


def logit_lens(backbone: Backbone, h: Tensor) -> Tensor:
    """Logit lens: head(norm(h)).

    Args:
        backbone: The model.
        h: Hidden states after any layer, (P, d).

    Returns:
        Logits (P, V).
    """
    return backbone.logits(h)


def spade(
    backbone: Backbone,
    h: Tensor,
    layer: int,
    token_ids: Tensor,
    start_ids: Tensor,
    positions: Tensor | None = None,
) -> Tensor:
    """SPADE (eq. 6): the pair [start, token] through layers `layer` + 1..L, read at the token.

    Args:
        backbone: The model.
        h: Hidden states of the answer tokens after `layer`, (P, d).
        layer: l, from 0 to L.
        token_ids: The answer tokens, (P,); not at position 0, where there is no pair.
        start_ids: The start token of each, (P,).
        positions: Where the tokens stand, (P,), to keep their positions; None resets each pair to
            [0, 1].

    Returns:
        Logits (P, V).
    """
    if positions is None:
        positions = torch.ones_like(token_ids)
    return backbone.logits(backbone.tail(h, layer, token_ids, positions, start_ids))


def spade_nos(
    backbone: Backbone,
    h: Tensor,
    layer: int,
    token_ids: Tensor,
    positions: Tensor | None = None,
) -> Tensor:
    """SPADE without the start token: each token alone through layers `layer` + 1..L.

    Args and return value as for `spade`; None resets the position to 0.
    """
    if positions is None:
        positions = torch.zeros_like(token_ids)
    return backbone.logits(backbone.tail(h, layer, token_ids, positions, None))
