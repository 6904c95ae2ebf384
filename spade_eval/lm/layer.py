"""Models that read one fixed layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from spade_eval import lenses
from spade_eval.decoders import Decoder, Linear, LogitLens, Positions, Spade, Start
from spade_eval.errors import UserError, did_you_mean
from spade_eval.lm import arguments
from spade_eval.lm.base import SpadeLM, log
from spade_eval.policy import Policy
from spade_eval.trace import score

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spade_eval.answers import Answers
    from spade_eval.batching import Batch
    from spade_eval.cost import Account


class FixedLayerLM(SpadeLM):
    """Scores with one decoder at one layer; subclasses set `decoder`.

    Args:
        layer: l; 0 is the embedding, L or -1 the last layer, where every decoder is the model
            itself.
        **kwargs: Arguments of `SpadeLM`.
    """

    decoder: Decoder

    def __init__(self, layer: int | None, **kwargs: Any):
        if layer is None:
            hints = [f" {n!r} was given.{h}" for n in kwargs if (h := did_you_mean(n, ["layer"]))]
            raise UserError(
                "layer is missing: give layer=N (0 is the embedding, -1 the last)." + "".join(hints)
            )
        self.layer = arguments.layer(layer)
        super().__init__(**kwargs)
        self.layer = arguments.layer(layer, self.backbone.n_layers)

    def _check_config(self, n_layers: int) -> None:
        arguments.layer(self.layer, n_layers)

    def _policy(self) -> Policy:
        return Policy((self.layer,), self.decoder)

    def _score(self, batches: Sequence[Batch], account: Account) -> list[Answers]:
        return [self._score_one(batch, account) for batch in batches]

    def _score_one(self, batch: Batch, account: Account) -> Answers:
        dtype = self.softmax_dtype or torch.float32
        known = self.backbone.starts.computed
        answers = score(self.backbone, batch, self.decoder, self.layer, dtype)
        starts = self.backbone.starts.computed - known
        tails = self.decoder.tails(self.backbone, batch.scored_positions)
        account.add(batch, self._source, self.prices, self.layer, self.layer, tails, starts)
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
        self.decoder = Spade(positions=positions, start=start)
        super().__init__(layer, pretrained=pretrained, **kwargs)
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
        self.decoder = LogitLens()
        super().__init__(layer, pretrained=pretrained, **kwargs)


class LinearLensLM(FixedLayerLM):
    """Scores through the linear map of one layer.

    Args:
        pretrained: As in HFLM; the default model if absent.
        layer: l, see `FixedLayerLM`; one with a map, or L.
        lens: Folder or hub id of a lens (`spade-eval fit` makes them), or a `LinearLens`.
        force_lens: Whether a lens of another model, of the same size, is a warning only.
        **kwargs: HFLM's arguments.
    """

    name: str

    def __init__(
        self,
        pretrained: Any = None,
        layer: int | None = None,
        lens: Any = None,
        force_lens: bool = False,
        **kwargs: Any,
    ):
        loaded = lenses.load(lens, pretrained is None, self.name)
        if loaded is None:
            raise UserError("lens=identity is the logit lens: use --model logit_lens.")
        kind = loaded.config.decoder
        if kind != self.name:
            raise UserError(f"lens={lenses.called(lens)} is a {kind} lens: use --model {kind}.")
        self._lens, self._lens_name = loaded, lenses.called(lens)
        super().__init__(layer, pretrained=pretrained, **kwargs)
        self._lens = lenses.fit_to(self._lens, self.backbone, self._lens_name, force_lens)
        self.decoder = Linear(self._lens)

    def _check_config(self, n_layers: int) -> None:
        lenses.require_depth(self._lens, n_layers, self._lens_name, self._model_source)
        super()._check_config(n_layers)
        lenses.require_layer(self._lens, arguments.layer(self.layer, n_layers), self._lens_name)

    def _settings(self) -> dict[str, object]:
        return {**super()._settings(), **lenses.describe(self._lens, self._lens_name)}


class LSpadeLM(LinearLensLM):
    """`--model l_spade`: L-SPADE (arXiv 2507.17618, eq. 7; "Linear SimLens" in its v2)."""

    name = "l_spade"


class TunedLensLM(LinearLensLM):
    """`--model tuned_lens`: the tuned lens (Belrose et al., 2023, arXiv 2303.08112)."""

    name = "tuned_lens"
