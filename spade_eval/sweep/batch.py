"""One batch read by every decoder at every layer, from one pass of the main lane.

main lane -> states h^l of P scored positions at every layer
logit lens, linear maps: a layer at a time -> head
SPADE: the pairs of all layers join on the way up, one call per layer -> head
-> log-probability and greediness of every read, (C, N), confidences where exits watch, (A, W)
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from spade_eval.answers import read
from spade_eval.confidence import CONFIDENCES
from spade_eval.decisions import decide
from spade_eval.decoders import Linear, LogitLens, Spade, States
from spade_eval.sweep.contexts import LARGEST, context_ends
from spade_eval.trace import climb
from spade_eval.transfer import put

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from spade_eval.backbone import Backbone
    from spade_eval.batching import Batch, Ints
    from spade_eval.confidence import Name
    from spade_eval.decoders import Decoder
    from spade_eval.exits import Scope
    from spade_eval.lens import LinearLens
    from spade_eval.sweep.grid import Grid

TAIL_ROWS = 16_384  # pairs whose states are held at once: 38 MB for 135M in fp32


@dataclass(frozen=True)
class Found:
    """What a sweep finds in a batch with N reads.

    Attributes:
        logprobs: Of each of the grid's readings, (C, N), fp32.
        greedy: Whether the target is the most likely token, (C, N).
        confidences: By lens and confidence, (A, W): at its candidate layers, at the watched
            positions; NaN where there is none.
        states: Where contexts end, at every layer, (L+1, K, d), fp16; None if not asked for.
    """

    logprobs: NDArray[np.float32]
    greedy: NDArray[np.bool_]
    confidences: dict[tuple[str, Name], NDArray[np.float32]] = field(default_factory=dict)
    states: NDArray[np.float16] | None = None


def watched(batch: Batch, scopes: Iterable[Scope]) -> Ints:
    """Scored positions at which some scope measures a confidence, ascending, (W,)."""
    at = [decide(batch, scope).check_at for scope in scopes]
    return np.unique(np.concatenate(at)) if at else np.zeros(0, dtype=np.int64)


class Reader:
    """Reads batches through a grid.

    Args:
        backbone: The model.
        grid: What is read.
        lenses: By (decoder, name), as readings name them, and the identity.
        keys: For each key that the grid's exits watch, its (decoder, name).
        spade: The pair's positions.
        softmax_dtype: The log-softmax is computed in this type.
    """

    def __init__(
        self,
        backbone: Backbone,
        grid: Grid,
        lenses: Mapping[tuple[str, str], LinearLens],
        keys: Mapping[str, tuple[str, str]],
        spade: Spade,
        softmax_dtype: torch.dtype,
    ):
        self.backbone, self.grid, self.lenses, self.keys = backbone, grid, lenses, keys
        self.spade, self.dtype = spade, softmax_dtype
        self.names: dict[str, list[Name]] = {
            lens: list(dict.fromkeys(e.rule.confidence for e in grid.exits if e.lens == lens))
            for lens in grid.candidates
        }

    def decoder(self, decoder: str, lens: str) -> Decoder:
        """The decoder of a reading."""
        if decoder in ("spade", "spade_nos"):
            return replace(self.spade, start="keep" if decoder == "spade" else "none")
        return (
            LogitLens() if decoder in ("logit_lens", "full") else Linear(self.lenses[decoder, lens])
        )

    def read(
        self,
        batch: Batch,
        scopes: Sequence[Scope],
        choices: Mapping[int, Sequence[int]],
        keep_states: bool = False,
    ) -> Found:
        """Read a batch.

        Args:
            batch: The batch.
            scopes: Where exits decide.
            choices: For each request the first tokens of its context's continuations, for
                `choice_entropy`.
            keep_states: Whether the states where contexts end are wanted.
        """
        grid, n = self.grid, len(batch.read_at)
        found = Found(
            np.empty((len(grid.readings), n), dtype=np.float32),
            np.empty((len(grid.readings), n), dtype=bool),
        )
        watch = _Watch(self, batch, scopes, choices, found)
        depths = sorted({reading.layer for reading in grid.readings})
        if keep_states:
            depths = list(range(self.backbone.n_layers + 1))
        at = put(context_ends(batch), self.backbone.device) if keep_states else None
        states_at_ends: list[NDArray[np.float16]] = []
        pairs: list[tuple[int, States]] = []
        by_layer: dict[int, list[int]] = {}
        for index, reading in enumerate(grid.readings):
            by_layer.setdefault(reading.layer, []).append(index)
        for layer, states in zip(depths, climb(self.backbone, batch, depths), strict=True):
            if at is not None:
                h = states.h[at].float().clamp(-LARGEST, LARGEST)
                states_at_ends.append(h.half().cpu().numpy())
            for index in by_layer.get(layer, ()):
                reading = grid.readings[index]
                if reading.decoder in ("spade", "spade_nos"):
                    pairs.append((index, states))
                else:
                    h = self.decoder(reading.decoder, reading.lens).align(self.backbone, states)
                    self._answer(batch, index, h, found, watch)
        for start in ("spade", "spade_nos"):
            lanes = [(i, s) for i, s in pairs if grid.readings[i].decoder == start]
            self._tails(batch, start, lanes, found)
        return replace(found, states=np.stack(states_at_ends)) if keep_states else found

    def _tails(
        self, batch: Batch, name: str, lanes: list[tuple[int, States]], found: Found
    ) -> None:
        """Send the pairs of all layers on together, some positions at a time."""
        if not lanes:
            return
        decoder = self.decoder(name, "")
        positions, width = len(batch.scored), lanes[0][1].h.shape[-1]
        at_once = max(1, TAIL_ROWS // len(lanes))
        one, n = lanes[0][1], len(lanes)
        layers = torch.tensor([int(states.layer) for _, states in lanes])
        out = [torch.empty_like(states.h) for _, states in lanes]
        for first in range(0, positions, at_once):
            part = slice(first, first + at_once)
            h = torch.cat([states.h[part] for _, states in lanes])
            each = len(one.h[part])
            together = States(
                h,
                layers.repeat_interleave(each),
                one.token_ids[part].repeat(n),
                one.start_ids[part].repeat(n),
                one.positions[part].repeat(n),
            )
            aligned = decoder.align(self.backbone, together).view(n, each, width)
            for lane, own in zip(out, aligned, strict=True):
                lane[part] = own
        for (index, _), h in zip(lanes, out, strict=True):
            self._answer(batch, index, h, found, None)

    def _answer(
        self, batch: Batch, index: int, h: Tensor, found: Found, watch: _Watch | None
    ) -> None:
        """Read one reading's aligned states, (P, d)."""
        look = None if watch is None else watch.at(index)
        answers = read(self.backbone, h, batch.read_at, batch.targets, self.dtype, look)
        found.logprobs[index] = answers.logprobs
        found.greedy[index] = answers.greedy


class _Watch:
    """Measures confidences from logits that are there anyway."""

    def __init__(
        self,
        reader: Reader,
        batch: Batch,
        scopes: Sequence[Scope],
        choices: Mapping[int, Sequence[int]],
        found: Found,
    ):
        self.reader, self.found = reader, found
        self.positions = watched(batch, scopes)
        self.choices: list[Sequence[int]] = []
        if choices:
            who = decide(batch, "context")
            at = np.searchsorted(self.positions, who.check_at)
            own: list[Sequence[int]] = [()] * len(self.positions)
            for i, decision in zip(at.tolist(), who.check_of.tolist(), strict=True):
                own[i] = choices[int(who.requests[decision])]
            self.choices = own
        for lens, layers in reader.grid.candidates.items():
            for name in reader.names[lens]:
                shape = (len(layers), len(self.positions))
                found.confidences[lens, name] = np.full(shape, np.nan, dtype=np.float32)

    def at(self, index: int) -> Callable[[int, Tensor], None] | None:
        """What looks at the logits of a reading; None where nobody does."""
        reading = self.reader.grid.readings[index]
        mine = [
            (lens, self.reader.grid.candidates[lens].index(reading.layer))
            for lens in self.reader.grid.candidates
            if self.reader.keys[lens] == (reading.decoder, reading.lens)
            and reading.layer in self.reader.grid.candidates[lens]
        ]
        if not mine:
            return None

        def look(first: int, logits: Tensor) -> None:
            here = slice(*np.searchsorted(self.positions, (first, first + len(logits))))
            if here.start == here.stop:
                return
            rows = logits[put(self.positions[here] - first, logits.device)]
            for lens, layer in mine:
                for name in self.reader.names[lens]:
                    values = self._measure(name, rows, here)
                    self.found.confidences[lens, name][layer, here] = values.cpu().numpy()

        return look

    def _measure(self, name: Name, logits: Tensor, here: slice) -> Tensor:
        """Confidences of watched positions `here` from their logits, (W', V) to (W',)."""
        measure = CONFIDENCES[name].measure
        if name != "choice_entropy":
            return measure(logits)
        if not self.choices:
            return logits.new_full((len(logits),), torch.nan)
        own = self.choices[here]
        most = max(1, *map(len, own))
        tokens = torch.zeros(len(own), most, dtype=torch.long)
        exists = torch.zeros(len(own), most, dtype=torch.bool)
        for row, some in enumerate(own):
            tokens[row, : len(some)] = torch.tensor(some, dtype=torch.long)
            exists[row, : len(some)] = True
        chosen = logits.gather(1, tokens.to(logits.device))  # (W', C)
        return measure(chosen, exists.to(logits.device))
