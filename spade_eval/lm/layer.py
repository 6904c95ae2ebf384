"""Models that read one fixed layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from spade_eval.decoders import Decoder, LogitLens, Positions, Spade, Start
from spade_eval.errors import UserError, did_you_mean
from spade_eval.lm import arguments
from spade_eval.lm.base import SpadeLM, log
from spade_eval.trace import Answers, score

if TYPE_CHECKING:
    from spade_eval.batching import Batch
    from spade_eval.cost import Account


class FixedLayerLM(SpadeLM):
    """Scores with one decoder at one layer.

    Args:
        decoder: The decoder.
        layer: l; 0 is the embedding, L or -1 the last layer, where every decoder is the model
            itself.
        **kwargs: Arguments of `SpadeLM`.
    """

    def __init__(self, decoder: Decoder, layer: int | None, **kwargs: Any):
        if layer is None:
            hints = [f" {n!r} was given.{h}" for n in kwargs if (h := did_you_mean(n, ["layer"]))]
            raise UserError(
                "layer is missing: give layer=N (0 is the embedding, -1 the last)." + "".join(hints)
            )
        self.decoder, self.layer = decoder, arguments.layer(layer)
        super().__init__(**kwargs)
        self.layer = arguments.layer(layer, self.backbone.n_layers)

    def _check_config(self, n_layers: int) -> None:
        arguments.layer(self.layer, n_layers)

    def _score(self, batch: Batch, account: Account) -> Answers:
        dtype = self.softmax_dtype or torch.float32
        known = self.backbone.starts.computed
        answers = score(self.backbone, batch, self.decoder, self.layer, dtype)
        starts = self.backbone.starts.computed - known
        tail = self.decoder.tail_tokens(batch.scored_positions)
        account.add(batch, self.layer, self.backbone.n_layers, tail, starts)
        return answers

    def _settings(self) -> dict[str, object]:
        return {**self.decoder.describe(), "layer": self.layer}


class SpadeLayerLM(FixedLayerLM):
    """`--model spade_layer`: SPADE at a fixed layer (arXiv 2507.17618, eq. 6; "SimLens" in its v2).

    Args:
        pretrained: As in HFLM; the default model if absent.
        layer: l, see `FixedLayerLM`.
        positions: "reset" (the pair stands at 0 and 1) or "keep" (at 0 and i).
        start: "keep", or "none" for the ablation SPADE-NoS.
        **kwargs: HFLM's arguments.
    """

    def __init__(
        self,
        pretrained: Any = None,
        layer: int | None = None,
        positions: Positions = "reset",
        start: Start = "keep",
        **kwargs: Any,
    ):
        super().__init__(
            Spade(positions=positions, start=start), layer, pretrained=pretrained, **kwargs
        )
        # A token on its own attends to nothing else, and rotary positions are about distances.
        self._inert = self.backbone.positions_inert or start == "none"
        if self._inert and positions == "keep":
            log.warning("positions=keep has no effect on these tails of %s.", self.backbone.name)

    def _settings(self) -> dict[str, object]:
        return {**super()._settings(), **({"positions": "inert"} if self._inert else {})}


class LogitLensLM(FixedLayerLM):
    """`--model logit_lens`: the model's own norm and head on the states of a fixed layer.

    Args:
        pretrained: As in HFLM; the default model if absent.
        layer: l, see `FixedLayerLM`.
        **kwargs: HFLM's arguments.
    """

    def __init__(self, pretrained: Any = None, layer: int | None = None, **kwargs: Any):
        super().__init__(LogitLens(), layer, pretrained=pretrained, **kwargs)
