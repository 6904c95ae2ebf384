"""Where a generated token may be read: at one fixed layer, or where it may exit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spade_eval.decoders import Decoder, LogitLens
from spade_eval.errors import UserError

if TYPE_CHECKING:
    from spade_eval.exits import ExitRule
    from spade_eval.lens import LinearLens


@dataclass(frozen=True)
class Policy:
    """Where a token may be read, and what reads it.

    Attributes:
        stops: Layers at which the main lane stops, ascending. At the last one every token is read
            that has not exited before; no layer above it is ever run in the main lane.
        decoder: Reads the token.
        rule: Decides at all stops but the last; not needed where there is only one.
        lens: Its maps are asked for the confidence.
    """

    stops: tuple[int, ...]
    decoder: Decoder
    rule: ExitRule | None = None
    lens: LinearLens | None = None

    @classmethod
    def exits(cls, n_layers: int, decoder: Decoder, rule: ExitRule, lens: LinearLens) -> Policy:
        """SPADE-EXIT; with a threshold that nothing can meet, the model itself.

        Args:
            n_layers: L.
            decoder: What answers after an exit.
            rule: Threshold and candidate layers.
            lens: The maps.

        Raises:
            UserError: The rule's confidence needs answer choices.
        """
        if rule.confidence == "choice_entropy":
            raise UserError(
                "confidence=choice_entropy needs answer choices, and generated text has none. Use "
                "confidence=entropy."
            )
        if rule.never:
            return cls((n_layers,), LogitLens())
        candidates = rule.candidates(n_layers, lens.available)
        return cls((*candidates, n_layers), decoder, rule, lens)
