"""The model of a sweep: lm-eval's requests in, every cell's answers kept for the replay."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from spade_eval import lenses
from spade_eval.answers import Answers
from spade_eval.cost import Account
from spade_eval.decisions import decide
from spade_eval.decoders import Spade
from spade_eval.errors import UserError
from spade_eval.lm.base import SpadeLM
from spade_eval.lm.requests import first_tokens, warn_of_single_choices
from spade_eval.sweep.batch import Found, Reader, watched
from spade_eval.sweep.collected import Call, Collected
from spade_eval.sweep.contexts import by_document
from spade_eval.sweep.exits import Exits, decided_values, exit_layers, follow
from spade_eval.sweep.grid import DECODERS, IDENTITY, LENSES, Ask, Exit, Grid, Reading, grid, key

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from spade_eval.batching import Batch, Ints
    from spade_eval.decoders import Positions
    from spade_eval.exits import Scope
    from spade_eval.lens import LinearLens
    from spade_eval.lm.requests import TokenRequest
    from spade_eval.sweep.store import Store
    from spade_eval.tally import Prices


class SweepLM(SpadeLM):
    """Reads every layer through every decoder, in one pass of the model.

    Args:
        pretrained: As in `SpadeLM`.
        ask: What is asked for.
        maps: Lenses by name; of the same name only if of different kinds. Empty takes the default
            model's own, if it is used, as "default".
        positions: Of SPADE's pairs, see `SpadeLayerLM`.
        force_lens: Whether a lens of another model, of the same size, is a warning only.
        **kwargs: HFLM's arguments.
    """

    most_tokens_in_batch = 2048  # with all layers' states, 150 MB for 135M in fp32

    def __init__(
        self,
        pretrained: Any = None,
        ask: Ask | None = None,
        maps: Sequence[tuple[str, str | Path | LinearLens]] = (),
        positions: Positions = "reset",
        force_lens: bool = False,
        **kwargs: Any,
    ):
        self.ask = ask or Ask()
        self._spade = Spade(positions=positions)
        asked = self.ask.decoders
        if not maps and pretrained is None and (asked is None or "l_spade" in asked):
            maps = [("default", lenses.DEFAULT_LENS)]
        self.maps = _load(maps)
        self._sources = {
            k: lenses.called(source) for k, (_, source) in zip(self.maps, maps, strict=True)
        }
        super().__init__(pretrained, **kwargs)
        self.maps = {
            k: (name, lenses.fit_to(lens, self.backbone, name, force_lens))
            for k, (name, lens) in self.maps.items()
        }
        self.grid: Grid = grid(self.ask, self.backbone.n_layers, self.maps)
        keys = {k: (str(lens.config.decoder), name) for k, (name, lens) in self.maps.items()}
        by_reading = {keys[k]: lens for k, (_, lens) in self.maps.items()}
        self.reader = Reader(
            self.backbone, self.grid, by_reading, {**keys, IDENTITY: (IDENTITY, "")}, self._spade,
            self.softmax_dtype or torch.float32,
        )  # fmt: skip
        self._whole_texts = False
        self.collected: Collected | None = None

    def _check_config(self, n_layers: int) -> None:
        grid(self.ask, n_layers, self.maps)

    def begin(self, store: Store, keep_states: bool = False) -> Collected:
        """Collect what comes from here on."""
        cells = len(self.grid.readings) + len(self.grid.exits)
        self.collected = Collected(
            store,
            accounts=[Account() for _ in range(cells)],
            states={} if keep_states else None,
        )
        self._started: list[set[int]] = [set() for _ in range(cells)]
        return self.collected

    # ------------------------------------------------------------------ requests

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """As in `SpadeLM`; every token decides for itself."""
        # lm-eval asks again for the last text to keep processes in step. A text is all the windows
        # of its instance, so it is scored once.
        texts = list({id(request): request for request in requests}.values())
        self._whole_texts = True
        try:
            values = super().loglikelihood_rolling(texts, disable_tqdm)
        finally:
            self._whole_texts = False
        found = {id(text): value for text, value in zip(texts, values, strict=True)}
        return [found[id(request)] for request in requests]

    def _prepare(self, requests: Sequence[TokenRequest]) -> None:
        asked = any(e.rule.confidence == "choice_entropy" for e in self.grid.exits)
        self._choices = {}
        if asked and not self._whole_texts:
            self._choices = first_tokens(requests, self._instances)
            warn_of_single_choices(self._choices)
        if self.collected is not None:
            shape = (len(self.grid.readings) + len(self.grid.exits), len(requests))
            self.collected.calls.append(
                Call(self._instances, np.zeros(shape), np.ones(shape, dtype=bool))
            )

    def scope(self, exit_: Exit) -> Scope:
        """Where an exit's decisions are taken in the requests at hand."""
        return "token" if self._whole_texts else exit_.rule.exit_scope

    def _score(self, batches: Sequence[Batch], account: Account) -> list[Answers]:
        return [self._score_one(batch, account) for batch in batches]

    def _score_one(self, batch: Batch, account: Account) -> Answers:
        scopes = sorted({self.scope(exit_) for exit_ in self.grid.exits})
        collected = self.collected
        if collected is None or account is not self.account:  # how much fits into memory?
            found = self.reader.read(batch, scopes, self._choices)
            return Answers(found.logprobs[0].tolist(), found.greedy[0].tolist())
        path = collected.store.next()
        kept = collected.store.load(path, batch)
        if kept is None:
            begin = time.perf_counter()
            # Which start tokens are computed together shows in the last bit: a batch must not
            # depend on whether those before it were computed or read.
            self.backbone.starts.clear()
            found = self.reader.read(batch, scopes, self._choices, collected.states is not None)
            kept = found, time.perf_counter() - begin
            collected.store.keep(path, batch, *kept)
        found, seconds = kept
        collected.seconds += seconds
        self._collect(collected, batch, found, scopes)
        if collected.states is not None and found.states is not None:
            collected.states.update(by_document(batch, found.states, self._instances))
        n, no_tails = self.backbone.n_layers, np.zeros(len(batch.scored), dtype=np.int64)
        account.add(batch, self._source, self.prices, n, n, no_tails, 0)
        return Answers(found.logprobs[0].tolist(), found.greedy[0].tolist())

    # ------------------------------------------------------------------ cells

    def _collect(
        self, into: Collected, batch: Batch, found: Found, scopes: Sequence[Scope]
    ) -> None:
        """Add a batch's answers to every cell."""
        for index, reading in enumerate(self.grid.readings):
            self._add(into, index, batch, found.logprobs[index], found.greedy[index])
            decoder = self.reader.decoder(reading.decoder, reading.lens)
            tails = decoder.tails(self.backbone, batch.scored_positions)
            pairs = reading.decoder in ("spade", *LENSES)
            starts = self._starts(index, batch, tails) if pairs else 0
            into.accounts[index].add(
                batch, self._source, self.prices, reading.layer, reading.layer, tails, starts
            )
        self._collect_exits(into, batch, found, watched(batch, scopes))

    def _collect_exits(
        self, into: Collected, batch: Batch, found: Found, at: NDArray[np.int64]
    ) -> None:
        n_layers = self.backbone.n_layers
        values: dict[tuple[Any, ...], NDArray[np.float32]] = {}
        followed: dict[tuple[Any, ...], Exits] = {}
        decisions = {s: decide(batch, s) for s in set(map(self.scope, self.grid.exits))}
        at_start = batch.scored_positions[batch.read_at] == 0
        for number, exit_ in enumerate(self.grid.exits, len(self.grid.readings)):
            scope, rule = self.scope(exit_), exit_.rule
            who, candidates = decisions[scope], self.grid.candidates[exit_.lens]
            # What all thresholds share.
            measured = exit_.lens, rule.confidence
            if (*measured, scope) not in values:
                values[(*measured, scope)] = decided_values(who, at, found.confidences[measured])
            layers = exit_layers(values[(*measured, scope)], candidates, rule, n_layers)
            # Rules that decide alike move the same tokens.
            same = (scope, candidates, rule.never, layers.tobytes())
            if same not in followed:
                followed[same] = follow(batch, who, layers, candidates, rule.never, n_layers)
            done = followed[same]
            # At position 0 the start token's own full depth answers, whatever the map.
            source = np.where(at_start, n_layers, done.of_reads)
            reading = self._reading(exit_)
            rows = {layer: self.grid.index(Reading(*reading, layer)) for layer in np.unique(source)}
            row = np.vectorize(rows.get, otypes=[np.int64])(source)
            reads = np.arange(len(source))
            self._add(into, number, batch, found.logprobs[row, reads], found.greedy[row, reads])
            decoder = self.reader.decoder(*reading)
            tails = decoder.tails(self.backbone, batch.scored_positions)
            below = np.zeros(len(batch.scored), dtype=bool)
            np.logical_or.at(below, batch.read_at, done.of_reads < n_layers)
            starts = 0 if rule.never else self._starts(number, batch, tails * below)
            account, prices = into.accounts[number], self._exit_prices(exit_)
            account.add(batch, self._source, prices, done.passed, done.of_reads, tails, starts)
            account.add_exits(batch, self._source, prices, who, done.layers, done.checked)

    def _reading(self, exit_: Exit) -> tuple[str, str]:
        """Which decoder, and with which maps, answers after an exit."""
        return ("spade", "") if exit_.rule.readout == "spade" else self.reader.keys[exit_.lens]

    @staticmethod
    def _add(
        into: Collected,
        cell: int,
        batch: Batch,
        logprobs: NDArray[np.float32],
        greedy: NDArray[np.bool_],
    ) -> None:
        call = into.calls[-1]
        np.add.at(call.logprobs[cell], batch.requests, logprobs)
        np.logical_and.at(call.greedy[cell], batch.requests, greedy)

    def _starts(self, cell: int, batch: Batch, tails: Ints) -> int:
        """How many start tokens a run of the cell alone would have to compute for this batch.

        Args:
            cell: The cell.
            batch: The batch.
            tails: Tokens that go on as pairs at each scored position, (P,).
        """
        # At position 0 the start token's own states answer.
        asked = (tails > 0) | (batch.scored_positions == 0)
        used = set(batch.start_ids[asked].tolist())
        new = used - self._started[cell]
        self._started[cell] |= new
        return len(new)

    def _exit_prices(self, exit_: Exit) -> Prices:
        lens = None if exit_.lens == IDENTITY else self.maps[exit_.lens][1]
        return lenses.prices(self.backbone, self.prices.head, lens, exit_.rule)

    def _settings(self) -> dict[str, object]:
        found = {k: lenses.describe(lens, self._sources[k]) for k, (_, lens) in self.maps.items()}
        return {"decoder": "sweep", "positions": self._spade.positions, "lenses": found}


def _load(
    maps: Sequence[tuple[str, str | Path | LinearLens]],
) -> dict[str, tuple[str, LinearLens]]:
    """Load lenses before the model, so that a wrong name costs no time.

    Raises:
        UserError: A lens cannot be loaded, is no decoder's, or has another's name.
    """
    found: dict[str, tuple[str, LinearLens]] = {}
    for name, source in maps:
        lens = lenses.own(source)
        if lens.config.decoder not in DECODERS:
            called, kind = lenses.called(source), lens.config.decoder
            raise UserError(f"lens {name}={called} is a {kind} lens: leave it out.")
        if key(lens, name) in found:
            raise UserError(
                f"two {lens.config.decoder} lenses are called {name}: give each a name of its own."
            )
        found[key(lens, name)] = (name, lens)
    return found
