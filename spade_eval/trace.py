"""Run a batch through the layers: to one fixed layer, or until it may exit.

    fixed:  main lane, layers 1..l -> states at the scored positions (P, d) -> decoder -> answers
    exits:  main lane -> at candidate layers: confidence of what is undecided
                           confident: its states leave (l, h^l); tokens nobody needs leave the lane
            -> layer L: the rest
            tail: all that left, each from its own layer, one call per layer -> answers

Only scored positions reach a decoder and the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from spade_eval.answers import Answers, read
from spade_eval.decisions import Decisions, decide
from spade_eval.decoders import Decoder, States
from spade_eval.departures import Departures, rows_of
from spade_eval.exits import request_mean

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from spade_eval.backbone import Backbone
    from spade_eval.batching import Batch, Ints
    from spade_eval.compaction import Rows
    from spade_eval.exits import ExitRule, Scope
    from spade_eval.hollow import Lane
    from spade_eval.lens import LinearLens


@dataclass(frozen=True)
class Trace:
    """What happened to a batch.

    Attributes:
        answers: For each of its N reads.
        decisions: Who decided.
        exit_layers: Of each decision, (D,); L where the full computation answered.
        confidence: The last value measured for each decision, (D,); NaN where none was.
        passed: How many layers each token of the batch's rows went through, (B, T).
        checked: How often each decision's confidence was measured, in positions, (D,).
    """

    answers: Answers
    decisions: Decisions
    exit_layers: Ints
    confidence: NDArray[np.float32]
    passed: Ints
    checked: Ints


def enter(backbone: Backbone, rows: Rows) -> Lane:
    """Embed rows: the main lane at depth 0, with every layer's arguments."""
    positions = mask = None
    if rows.positions is not None and rows.sees is not None:
        positions = torch.from_numpy(rows.positions).to(backbone.device)
        mask = backbone.additive_mask(torch.from_numpy(rows.sees))
    return backbone.embed(torch.from_numpy(rows.ids).to(backbone.device), positions, mask)


def climb(backbone: Backbone, batch: Batch, layers: Sequence[int]) -> Iterator[States]:
    """Run the main lane upwards and stop at each of `layers`, ascending, for the scored positions.

    The lane runs only as far as the caller asks for states.
    """
    lane = enter(backbone, rows_of(batch))
    for layer in layers:
        h = _gather(backbone.advance(lane, layer), batch.scored).to(backbone.device)
        yield _states(backbone, batch, h, layer, np.arange(len(batch.scored)))


def score(
    backbone: Backbone,
    batch: Batch,
    decoder: Decoder,
    layer: int,
    softmax_dtype: torch.dtype = torch.float32,
) -> Answers:
    """Score a batch with a decoder at a fixed layer."""
    states = next(climb(backbone, batch, [layer]))
    h = decoder.align(backbone, states)
    return read(backbone, h, batch.read_at, batch.targets, softmax_dtype)


def score_with_exits(
    backbone: Backbone,
    batches: Sequence[Batch],
    decoder: Decoder,
    lens: LinearLens,
    rule: ExitRule,
    choices: Mapping[int, Sequence[int]],
    softmax_dtype: torch.dtype = torch.float32,
) -> list[Trace]:
    """SPADE-EXIT (Algorithm 1) for batches that climb side by side.

    A check of a few positions takes as long as one of many: it reads the whole head. So the main
    lanes of several batches stop at the same candidate layers, and what they have to check, to send
    on alone and to read is computed together. A decision is taken from its own positions alone:
    whatever climbs beside it, it is the same.

    Args:
        backbone: The model.
        batches: The batches; the states of all of them are held at once.
        decoder: What answers after an exit.
        lens: Its maps are asked for the confidence.
        rule: Threshold, candidate layers, scope.
        choices: For each request the first tokens of its context's continuations, for
            `choice_entropy`.
        softmax_dtype: The log-softmax is computed in this type.
    """
    climbs = [_Climb(backbone, batch, rule.scope) for batch in batches]
    for layer in (*rule.candidates(backbone.n_layers, lens.available), backbone.n_layers):
        going = [climb for climb in climbs if climb.undecided.any()]
        for climb in going:
            climb.advance(layer)
        if layer == backbone.n_layers:
            for climb in going:
                climb.leave(layer, climb.undecided)
            break
        checks = [climb.to_check() for climb in going]
        states = [climb.gather(at) for climb, (at, _) in zip(going, checks, strict=True)]
        if not sum(map(len, states)):
            continue
        requests = np.concatenate(
            [climb.who.requests[of] for climb, (_, of) in zip(going, checks, strict=True)]
        )
        values = _confidence(backbone, lens(torch.cat(states), layer), requests, rule, choices)
        for climb, (_, of), own in zip(
            going, checks, values.split([len(h) for h in states]), strict=True
        ):
            climb.leave(layer, climb.confident(own, of, rule))
    return _answer(backbone, climbs, decoder, softmax_dtype)


class _Climb:
    """One batch on its way up, and what is known about its decisions."""

    def __init__(self, backbone: Backbone, batch: Batch, scope: Scope):
        self.backbone, self.batch = backbone, batch
        self.who = who = decide(batch, scope)
        self.departures = Departures(batch, who, backbone.n_layers)
        self.confidence = np.full(who.count, np.nan, dtype=np.float32)
        self.checked = np.zeros(who.count, dtype=np.int64)
        self.h = torch.empty(
            len(who.member_at), backbone.width, dtype=backbone.state_dtype, device=backbone.device
        )
        self.lane = enter(backbone, self.departures.rows)

    @property
    def undecided(self) -> NDArray[np.bool_]:
        """Which decisions are open, (D,)."""
        return self.departures.undecided

    def advance(self, layer: int) -> None:
        """Run what is left of the main lane up to `layer`."""
        self.backbone.advance(self.lane, layer)
        self.departures.advance(layer)

    def to_check(self) -> tuple[Ints, Ints]:
        """Scored positions whose confidence is wanted, (K,), and their decisions, (K,)."""
        open_ = self.undecided[self.who.check_of]
        return self.who.check_at[open_], self.who.check_of[open_]

    def gather(self, at: Ints) -> Tensor:
        """States of scored positions where the lane now is, (K, d)."""
        flat = self.departures.rows.where(self.batch.scored[at])
        return _gather(self.lane, flat).to(self.backbone.device)

    def confident(self, values: Tensor, of: Ints, rule: ExitRule) -> NDArray[np.bool_]:
        """Keep the values (K,) of decisions (K,); which undecided ones may exit, (D,)."""
        decisions = torch.from_numpy(of).to(values.device)
        means = request_mean(values, decisions, self.who.count).cpu()
        np.add.at(self.checked, of, 1)
        self.confidence[of] = means.numpy()[of]
        return self.undecided & rule.confident(means).numpy()

    def leave(self, layer: int, leaving: NDArray[np.bool_]) -> None:
        """Take the states of decisions (D,) that exit; drop from the lane what nobody needs."""
        if not leaving.any():
            return
        members = self.departures.leave(layer, leaving)
        h = self.gather(self.who.member_at[members])
        self.h[torch.from_numpy(members).to(h.device)] = h.to(self.h.dtype)
        if (source := self.departures.compact()) is not None:
            before, self.lane = self.lane, enter(self.backbone, self.departures.rows)
            self.lane.h = _gather(before, source.reshape(-1)).view(*source.shape, -1)
            self.lane.depth = layer


def _confidence(
    backbone: Backbone,
    aligned: Tensor,
    requests: Ints,
    rule: ExitRule,
    choices: Mapping[int, Sequence[int]],
) -> Tensor:
    """The confidence, (K,), of states in the last layer's space, (K, d), and their requests."""
    if rule.confidence != "choice_entropy":
        blocks = aligned.split(backbone.logits_rows(torch.float32))
        return torch.cat([rule.measure(backbone.logits(block)) for block in blocks])
    own = [choices[request] for request in requests.tolist()]
    tokens = sorted({token for some in own for token in some})
    column = {token: i for i, token in enumerate(tokens)}
    exists = torch.zeros(len(own), len(tokens), dtype=torch.bool)
    for row, some in enumerate(own):
        exists[row, [column[token] for token in some]] = True
    logits = backbone.logits(aligned, torch.tensor(tokens, device=aligned.device))  # (K, C)
    return rule.measure(logits, exists.to(logits.device))


def _answer(
    backbone: Backbone, climbs: Sequence[_Climb], decoder: Decoder, softmax_dtype: torch.dtype
) -> list[Trace]:
    """Let the decoder and the head answer for all that left, at once."""
    states: list[States] = []
    read_from: list[Ints] = []
    offset = 0
    for climb in climbs:
        who = climb.who
        # Members that left a position at the same layer share its answer.
        left = np.stack([who.member_at, climb.departures.exit_layers[who.member_of]])  # (2, M)
        (at, layers), one, of = np.unique(left, axis=1, return_index=True, return_inverse=True)
        h = climb.h[torch.from_numpy(one).to(climb.h.device)]
        states.append(_states(backbone, climb.batch, h, torch.from_numpy(layers), at))
        read_from.append(of.reshape(-1)[who.read_from] + offset)
        offset += len(at)
    names = ("h", "layer", "token_ids", "start_ids", "positions")
    together = States(*(torch.cat([getattr(s, name) for s in states]) for name in names))
    targets = np.concatenate([climb.batch.targets for climb in climbs])
    reads = np.concatenate(read_from)
    order = np.argsort(reads, kind="stable")
    h = decoder.align(backbone, together)
    found = read(backbone, h, reads[order], targets[order], softmax_dtype)
    logprobs, greedy = np.empty(len(reads)), np.empty(len(reads), dtype=bool)
    logprobs[order], greedy[order] = found.logprobs, found.greedy
    traces, first = [], 0
    for climb in climbs:
        own = slice(first, first := first + len(climb.batch.targets))
        traces.append(
            Trace(
                Answers(logprobs[own].tolist(), greedy[own].tolist()),
                climb.who,
                climb.departures.exit_layers,
                climb.confidence,
                climb.departures.passed.reshape(climb.batch.ids.shape),
                climb.checked,
            )
        )
    return traces


def _states(backbone: Backbone, batch: Batch, h: Tensor, layer: int | Tensor, at: Ints) -> States:
    """States (M, d) of the scored positions `at` (M,), with what a tail needs of them."""
    device = backbone.device
    return States(
        h,
        layer,
        token_ids=torch.from_numpy(batch.token_ids[at]).to(device),
        start_ids=torch.from_numpy(batch.start_ids[at]).to(device),
        positions=torch.from_numpy(batch.scored_positions[at]).to(device),
    )


def _gather(lane: Lane, flat: Ints) -> Tensor:
    """States of tokens, given by their flat index, (K, d), on the lane's device."""
    return lane.h.flatten(0, 1)[torch.from_numpy(flat).to(lane.h.device)]
