"""What a sweep asks for: which cells its table has, and what must be read to fill them.

A reading is one decoder at one layer; an exit is one threshold of one exit rule. Exits are made of
readings: where a decision left, and what was answered there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from spade_eval.confidence import CONFIDENCES, Name
from spade_eval.errors import UserError, require_known
from spade_eval.exits import ExitRule, Readout, Scope

if TYPE_CHECKING:
    from collections.abc import Mapping

    from spade_eval.lens import LinearLens

LENSES = ("l_spade", "tuned_lens")  # decoders with maps
DECODERS = ("logit_lens", "tuned_lens", "spade", "spade_nos", "l_spade")
IDENTITY = "logit_lens"  # the key of the lens without maps
MOST_THRESHOLDS = 1000


@dataclass(frozen=True)
class Reading:
    """One decoder at one layer.

    Attributes:
        decoder: One of `DECODERS`, or "full": the model itself.
        lens: Name of the maps, empty for decoders without.
        layer: l.
    """

    decoder: str
    lens: str
    layer: int


@dataclass(frozen=True)
class Exit:
    """One threshold of one exit rule.

    Attributes:
        lens: Key of the lens whose confidence is measured.
        rule: Threshold, confidence, scope, read-out.
    """

    lens: str
    rule: ExitRule


@dataclass(frozen=True)
class Ask:
    """What a user asks for.

    Attributes:
        decoders: Of `DECODERS`; None takes all that can be had.
        layers: Of the table; None takes all.
        thresholds: Of the exit rules; none leaves exits out.
        confidences: How the exit rules measure.
        scopes: Of the exit rules; whole texts always decide by token.
        readouts: "spade" answers by the pair after an exit of L-SPADE, "lens" by any map itself.
        interval: As in `ExitRule`.
        min_layer: As in `ExitRule`.

    Raises:
        UserError: An unknown name, or a threshold that is not a number.
    """

    decoders: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    thresholds: tuple[float, ...] = ()
    confidences: tuple[Name, ...] = ("entropy",)
    scopes: tuple[Scope, ...] = ("context",)
    readouts: tuple[Readout, ...] = ("spade", "lens")
    interval: int = 2
    min_layer: int | None = None

    def __post_init__(self) -> None:
        for name, given, valid in (
            ("decoders", self.decoders or (), DECODERS),
            ("confidence", self.confidences, tuple(CONFIDENCES)),
            ("exit_scope", self.scopes, get_args(Scope)),
            ("readout", self.readouts, get_args(Readout)),
        ):
            for value in given:
                require_known(name, value, valid)
        self.rules()

    def rules(self) -> list[ExitRule]:
        """Every exit rule, thresholds ascending; those that make no sense are left out."""
        return [
            ExitRule(threshold, confidence, self.interval, self.min_layer, scope, readout)
            for confidence in self.confidences
            for scope in self.scopes
            if confidence != "choice_entropy" or scope == "context"
            for readout in self.readouts
            for threshold in self.thresholds
        ]


@dataclass(frozen=True)
class Grid:
    """What a sweep of one model reads.

    Attributes:
        n_layers: L.
        layers: Layers of the table, ascending.
        readings: What is computed; the model itself is first. At layer L all decoders are that.
        exits: Exit cells of the table.
        candidates: For each lens that an exit watches, its candidate layers.
    """

    n_layers: int
    layers: tuple[int, ...]
    readings: tuple[Reading, ...]
    exits: tuple[Exit, ...]
    candidates: Mapping[str, tuple[int, ...]]

    @property
    def table(self) -> list[Reading]:
        """The readings that the table has: the model itself, then by decoder and layer."""
        shown = [r for r in self.readings if r.layer in self.layers]
        full = self.readings[0]
        kinds = list(dict.fromkeys((r.decoder, r.lens) for r in shown if r != full))
        rows = [full]
        for decoder, lens in kinds:
            rows += [r for r in shown if (r.decoder, r.lens) == (decoder, lens)]
            if self.n_layers in self.layers:
                rows.append(Reading(decoder, lens, self.n_layers))
        return rows

    def index(self, reading: Reading) -> int:
        """Where a reading's values are found."""
        if reading.layer == self.n_layers:
            return 0
        return self.readings.index(reading)


def key(lens: LinearLens, name: str) -> str:
    """How exits tell lenses apart: an L-SPADE lens by its name, others with their kind."""
    kind = lens.config.decoder
    return name if kind == "l_spade" else f"{kind}:{name}"


def grid(ask: Ask, n_layers: int, lenses: Mapping[str, tuple[str, LinearLens]]) -> Grid:
    """Resolve what is asked for against a model.

    Args:
        ask: What is asked for.
        n_layers: L.
        lenses: For each key (see `key`) the lens and its name.

    Raises:
        UserError: A layer out of range, a decoder without its lens, a lens without its decoder.
    """
    had = {lens.config.decoder for _, lens in lenses.values()}
    decoders = ask.decoders or tuple(d for d in DECODERS if d not in LENSES or d in had)
    for decoder in LENSES:
        if decoder in decoders and decoder not in had:
            raise UserError(
                f"decoders: {decoder} needs a lens of its kind. Give --lens NAME=FOLDER, which "
                f"`spade-eval fit --decoder {decoder}` makes, or leave it out."
            )
    layers = tuple(range(n_layers + 1)) if ask.layers is None else ask.layers
    if layers and not 0 <= min(layers) <= max(layers) <= n_layers:
        raise UserError(f"layers={list(layers)}: this model has layers 0..{n_layers}.")
    # A decoder is read where the table shows it, and where an exit may answer by it.
    wanted: dict[tuple[str, str], set[int]] = {}
    maps: dict[tuple[str, str], tuple[int, ...]] = {}
    for decoder in decoders:
        if decoder not in LENSES:
            wanted[decoder, ""] = set(layers)
        for name, lens in lenses.values():
            if lens.config.decoder == decoder:
                maps[decoder, name] = lens.available
                wanted[decoder, name] = set(layers) & set(lens.available)
    exits: list[Exit] = []
    found: dict[str, tuple[int, ...]] = {}
    watched = {k: (str(lens.config.decoder), name) for k, (name, lens) in lenses.items()}
    watched[IDENTITY] = (IDENTITY, "")
    for rule in ask.rules():
        for lens_key, own in watched.items():
            answers = own if rule.readout == "lens" else ("spade", "")
            spade_without_l_spade = rule.readout == "spade" and own[0] != "l_spade"
            if own not in wanted or answers not in wanted or spade_without_l_spade:
                continue
            found[lens_key] = rule.candidates(n_layers, maps.get(own))
            wanted[own] |= set(found[lens_key])
            wanted[answers] |= set(found[lens_key])
            exits.append(Exit(lens_key, rule))
    readings = [Reading("full", "", n_layers)]
    for (decoder, name), at in wanted.items():
        readings += [Reading(decoder, name, layer) for layer in sorted(at) if layer < n_layers]
    return Grid(n_layers, tuple(sorted(set(layers))), tuple(readings), tuple(exits), found)


def thresholds(text: str) -> tuple[float, ...]:
    """Read `--thresholds`: FROM:TO:STEP with TO included, a list a,b,c, or none.

    Raises:
        UserError: Not of this form, or more than a thousand.
    """
    if text == "none":
        return ()
    try:
        if ":" in text:
            begin, end, step = map(float, text.split(":"))
            # Rounded to a thousandth of a step: 0.2 + 2 * 0.2 is to be 0.6.
            values = [begin + i * step for i in range(int((end - begin) / step + 1e-6) + 1)]
            values = [round(value, 10) for value in values]
        else:
            values = [float(value) for value in text.split(",")]
    except (ValueError, ZeroDivisionError, OverflowError) as err:
        raise UserError(
            f"thresholds={text!r}: write FROM:TO:STEP (TO included), a list such as 0.5,1,2, or "
            "none."
        ) from err
    if not 0 < len(values) <= MOST_THRESHOLDS:
        raise UserError(f"thresholds={text!r} are {len(values)} values: give 1 to 1000.")
    return tuple(sorted(set(values)))
