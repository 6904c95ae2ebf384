"""Algorithm 1 for the newest token of every sequence, with keys and values that are filled in late.

A token that exits at layer l leaves no keys and values above l. Its state is kept there, pending,
and climbs on with the first later token that goes deeper:

    newest token, layers 1..l1 -> check -> exit: answer by the decoder, state pending at l1
                                           (by the check's own logits, if its lens is the decoder)
                                -> layers l1+1..l2, with everything that is pending at l1 -> check
                                ...
                                -> layer L: answer

So no exit changes what a later token sees, and decoding equals scoring the same tokens. Depths
never increase from an older token to a newer one: what a layer holds of a sequence is its
beginning, the shorter the deeper the layer lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from spade_eval.caches import Columns, KeyValues, Span
from spade_eval.decoders import Linear, States

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from spade_eval.backbone import Backbone
    from spade_eval.batching import Ints
    from spade_eval.hollow import Lane
    from spade_eval.policy import Policy


# Tokens that take as long as a call itself, which reads all weights of its layers: 135M on a CPU.
CALL = 6


@dataclass(frozen=True)
class Work:
    """What each of B sequences has cost: token-layers, and the number of checks.

    Attributes:
        prompt: The prompt's tokens, as far as the first answer needed them, (B,).
        decode: Each further token, as far as its own answer needed it, (B,).
        backfilled: What was left out before and a later token needed, and what was computed again
            so that rows could share a call, (B,).
        tail: Answers in the two-token tail, (B,).
        checks: Confidences measured, (B,).
        heads: Answers for which the head was computed; the others are those of a check, (B,).
    """

    prompt: Ints
    decode: Ints
    backfilled: Ints
    tail: Ints
    checks: Ints
    heads: Ints

    @classmethod
    def none(cls, rows: int) -> Work:
        """Nothing yet, for `rows` sequences."""
        return cls(*(np.zeros(rows, dtype=np.int64) for _ in range(6)))


@dataclass(frozen=True)
class Step:
    """The newest token of every row that is still decoded.

    Attributes:
        logits: What follows it, (B', V).
        layers: The layer that each one exited at; the last stop if it did not, (B',).
        confidence: The last value measured, (B',); NaN where none was.
    """

    logits: Tensor
    layers: Ints
    confidence: NDArray[np.float32]


class Sequences:
    """Sequences that grow by one token at a time.

    Args:
        backbone: The model.
        policy: Where tokens may be read.
        lengths: Tokens of each prompt, (B,); the rows of `step` are left-padded to the longest.

    Attributes:
        policy: The same; another with the same stops may take its place between steps.
        origin: Which of the B sequences each row still is, (B',).
        work: What the sequences have cost.
    """

    def __init__(self, backbone: Backbone, policy: Policy, lengths: Ints):
        rows, width = len(lengths), int(lengths.max())
        self.backbone, self.policy = backbone, policy
        self.origin = np.arange(rows)
        self.work = Work.none(rows)
        self._first = width - lengths  # column of each sequence's first token, (B',)
        self._fed = 0  # columns of the steps before this one
        # For each stop, the columns that the layers right below it hold of each row, (stops, B').
        self._ends = np.zeros((len(policy.stops), rows), dtype=np.int64)
        self._keys = KeyValues(backbone.n_layers, rows)
        # States at each stop, for those that climb on from there: (B', T, d).
        self._states = [Columns(rows, 1) for _ in policy.stops]
        self._ids = torch.zeros(rows, 0, dtype=torch.long)
        # What climbed to the last stop in this step, by its first column and its rows.
        self._lanes: dict[tuple[int, bytes], tuple[Span, Lane]] = {}

    @torch.no_grad()
    def step(self, ids: Tensor) -> Step:
        """Read the newest token of every row.

        Args:
            ids: The sequences so far, left-padded, (B', T): the prompts, then one column more at
                each step.
        """
        self._ids = ids = ids.to(self.backbone.device)
        n, stops = len(ids), self.policy.stops
        layers = np.full(n, stops[-1])
        confidence = np.full(n, np.nan, dtype=np.float32)
        h = torch.empty(n, self.backbone.width, dtype=self.backbone.state_dtype, device=ids.device)
        open_ = np.arange(n)
        to_read = np.ones(n, dtype=bool)  # by the decoder; checks may answer for the others
        logits: list[tuple[Ints, Tensor]] = []
        for stop, layer in enumerate(stops):
            newest = self._climb(stop, open_)  # (len(open_), d)
            if layer == stops[-1]:
                leaving = np.ones(len(open_), dtype=bool)
            else:
                leaving, own = self._confident(newest, open_, layer, confidence)
                if own is not None and leaving.any():
                    to_read[open_[leaving]] = False
                    logits.append((open_[leaving], own))
            layers[open_[leaving]] = layer
            h[torch.from_numpy(open_[leaving])] = newest[torch.from_numpy(leaving)]
            open_ = open_[~leaving]
            if not len(open_):
                break
        self._fed, self._lanes = ids.shape[1], {}
        if to_read.any():
            rest = np.flatnonzero(to_read)
            logits.append((rest, self._read(h, layers, rest)))
        return Step(_merge(logits), layers, confidence)

    def keep(self, rows: Ints) -> None:
        """Go on with these rows alone, (B',)."""
        at = torch.from_numpy(rows)
        self.origin, self._first = self.origin[rows], self._first[rows]
        self._ends = self._ends[:, rows]
        self._keys.keep(at)
        for columns in self._states:
            columns.keep(at)

    # ------------------------------------------------------------------ inside

    def _climb(self, stop: int, rows: Ints) -> Tensor:
        """Take rows, (G,), from the stop below to this one, with what is pending there.

        Returns:
            The states of the rows' newest tokens at the stop, (G, d).
        """
        below, self._lanes = self._lanes, {}
        groups = _together(self._ends[stop, rows])
        return _merge([(some, self._advance(stop, rows[some], below)) for some in groups])

    def _advance(
        self, stop: int, rows: Ints, below: dict[tuple[int, bytes], tuple[Span, Lane]]
    ) -> Tensor:
        """Take rows to a stop in one call per layer, from the first column that any of them lacks.

        Returns:
            As `_climb`.
        """
        stops = self.policy.stops
        depth, to = (stops[stop - 1] if stop else 0), stops[stop]
        held = self._ends[stop, rows]
        base, end = int(self._first[rows].min()), self._ids.shape[1]
        begin = max(int(held.min()), base)
        key = begin, rows.tobytes()
        if key in below:  # the very same tokens have just come from below
            span, lane = below[key]
        else:
            everyone = len(rows) == len(self.origin)
            span = Span(None if everyone else torch.from_numpy(rows), base, begin, end)
            lane = self._enter(span, rows)
            if stop:
                lane.h = self._states[stop - 1].read(span, begin).to(lane.h.device)
                lane.depth = depth
        self._lanes[key] = span, lane
        self._keys.span = span
        self.backbone.advance(lane, to)
        self._count(rows, held, begin, to - depth)
        self._ends[stop, rows] = end
        if to != stops[-1]:
            self._states[stop].write(span, lane.h)
        return lane.h[:, -1].to(self.backbone.device)

    def _enter(self, span: Span, rows: Ints) -> Lane:
        """Have the model prepare its layers' arguments for a span."""
        device = self.backbone.device
        ids = self._ids if span.rows is None else self._ids[span.rows]
        columns = torch.arange(span.base, span.end, device=device)
        first = torch.from_numpy(self._first[rows]).to(device)[:, None]  # (G, 1)
        self._keys.span = span
        return self.backbone.embed(
            ids[:, span.begin :],
            position_ids=(columns[span.begin - span.base :] - first).clamp(min=0),
            attention_mask=(columns >= first).long(),  # (G, end - base)
            cache=self._keys.cache,
        )

    def _confident(
        self, h: Tensor, rows: Ints, layer: int, confidence: NDArray[np.float32]
    ) -> tuple[NDArray[np.bool_], Tensor | None]:
        """Which rows, (G,), with newest states (G, d), exit here; keeps the values.

        Returns:
            The rows that do, (G,), and what follows them, (G', V), if the lens itself answers.
        """
        rule, lens = self.policy.rule, self.policy.lens
        assert rule is not None
        assert lens is not None
        leaving, own = np.zeros(len(rows), dtype=bool), None
        # A sequence of one token has no pair to go on with: it never exits.
        checked = np.flatnonzero(self._first[rows] < self._ids.shape[1] - 1)
        if len(checked):
            aligned = lens(h[torch.from_numpy(checked)], layer)
            logits = self.backbone.logits(aligned)
            values = rule.measure(logits)
            confidence[rows[checked]] = values.cpu().numpy()
            leaving[checked] = rule.confident(values).cpu().numpy()
            self.work.checks[self.origin[rows[checked]]] += 1
            if self.policy.decoder == Linear(lens):
                own = logits[torch.from_numpy(leaving[checked])]
        return leaving, own

    def _read(self, h: Tensor, layers: Ints, rows: Ints) -> Tensor:
        """What the decoder says follows the newest tokens, (B', d), of some rows, (R,): (R, V)."""
        n_layers, at = self.backbone.n_layers, torch.from_numpy(rows)
        ids, first, layers = self._ids[at], self._first[rows], layers[rows]
        positions = ids.shape[1] - 1 - first
        states = States(
            h[at],
            torch.from_numpy(layers),
            token_ids=ids[:, -1],
            start_ids=ids[torch.arange(len(ids)), torch.from_numpy(first)],
            positions=torch.from_numpy(positions).to(ids.device),
        )
        tails = self.policy.decoder.tails(self.backbone, positions)
        self.work.tail[self.origin[rows]] += tails * (n_layers - layers)
        self.work.heads[self.origin[rows]] += 1
        return self.backbone.logits(self.policy.decoder.align(self.backbone, states))

    def _count(self, rows: Ints, held: Ints, begin: int, layers: int) -> None:
        """Count what rows compute from a column on, of which they hold some; padding apart."""
        first = self._first[rows]
        lacks = np.maximum(first, held)
        again = lacks - np.maximum(first, begin)  # for those beside that hold less
        late = np.maximum(self._fed - lacks, 0)  # of earlier steps
        own = self._ids.shape[1] - lacks - late
        of = self.origin[rows]
        (self.work.decode if self._fed else self.work.prompt)[of] += own * layers
        self.work.backfilled[of] += (late + again) * layers


def _merge(parts: list[tuple[Ints, Tensor]]) -> Tensor:
    """Put what groups of rows, (G,) each, have given, (G, ...) each, into the rows' order."""
    rows, values = zip(*parts, strict=True)
    if len(values) == 1:  # all rows
        return values[0]
    return torch.cat(values)[torch.from_numpy(np.concatenate(rows).argsort())]


def _together(ends: Ints) -> list[Ints]:
    """Share rows out over calls, by the columns that a layer holds of each.

    Rows with the same end need no padding. One that holds a few columns more may join those that
    hold less, and compute these columns again, where that is cheaper than a call of its own.

    Args:
        ends: Of each row, (G,).

    Returns:
        Indices of the rows of each call, each row once.
    """
    calls: list[list[Ints]] = []
    begin = 0
    for end in np.unique(ends):
        rows = np.flatnonzero(ends == end)
        if calls and (end - begin) * len(rows) <= CALL:
            calls[-1].append(rows)
        else:
            calls.append([rows])
            begin = end
    return [np.sort(np.concatenate(call)) for call in calls]
