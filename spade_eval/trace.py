"""Run a batch through the layers: to one fixed layer, or until it may exit.

    fixed:  main lane, layers 1..l -> states at the scored positions (P, d) -> decoder -> answers
    exits:  main lane -> at candidate layers: confidence of what is undecided
                           confident: its states leave (l, h^l); tokens nobody needs leave the lane
            -> layer L: the rest
            tail: all that left, each from its own layer, one call per layer -> answers
                           (none where the lens of the checks answers: their logits do)

Only scored positions reach a decoder and the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from spade_eval.answers import Answers, read
from spade_eval.climbing import Check, Climb, enter, gather
from spade_eval.decisions import Decisions, answered_by_checks
from spade_eval.decoders import Decoder, Linear, States
from spade_eval.departures import rows_of
from spade_eval.measuring import measure, measure_choices
from spade_eval.transfer import put

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from spade_eval.backbone import Backbone
    from spade_eval.batching import Batch, Ints
    from spade_eval.exits import ExitRule
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
        checked: How often each decision's confidence was measured, in positions, (D,); one that
            several decisions look at is computed once.
    """

    answers: Answers
    decisions: Decisions
    exit_layers: Ints
    confidence: NDArray[np.float32]
    passed: Ints
    checked: Ints


def climb(backbone: Backbone, batch: Batch, layers: Sequence[int]) -> Iterator[States]:
    """Run the main lane upwards and stop at each of `layers`, ascending, for the scored positions.

    The lane runs only as far as the caller asks for states.
    """
    lane = enter(backbone, rows_of(batch))
    for layer in layers:
        h = gather(backbone.advance(lane, layer), batch.scored).to(backbone.device)
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
    climbs = [Climb(backbone, batch, rule.exit_scope) for batch in batches]
    by_choice = rule.confidence == "choice_entropy"
    itself = decoder == Linear(lens) and not by_choice  # what leaves is answered by its check
    for layer in (*rule.candidates(backbone.n_layers, lens.available), backbone.n_layers):
        going = [climb for climb in climbs if climb.undecided.any()]
        for climb in going:
            climb.advance(layer)
        if layer == backbone.n_layers:
            for climb in going:
                climb.leave(layer, climb.undecided)
            break
        checks = [climb.to_check(itself) for climb in going]
        if not sum(len(check.at) for check in checks):
            continue
        states = [climb.states(check.at) for climb, check in zip(going, checks, strict=True)]
        aligned = lens(torch.cat(states), layer)
        if by_choice:
            own = [choices[r] for check in checks for r in check.requests.tolist()]
            values = measure_choices(backbone, aligned, rule, own)
        else:
            values = _measure(backbone, aligned, going, checks, rule, softmax_dtype)
        each = values.split([len(check.at) for check in checks])
        for climb, check, of_climb in zip(going, checks, each, strict=True):
            climb.leave(layer, climb.confident(of_climb, check, rule))
    return _answer(backbone, climbs, decoder, itself, softmax_dtype)


def _measure(
    backbone: Backbone,
    aligned: Tensor,
    climbs: Sequence[Climb],
    checks: Sequence[Check],
    rule: ExitRule,
    softmax_dtype: torch.dtype,
) -> Tensor:
    """Confidences of all checks' positions together, (U,); the climbs keep what reads found."""
    first = np.cumsum([0, *(len(check.at) for check in checks)])
    read_at = np.concatenate([check.read_at + n for check, n in zip(checks, first, strict=False)])
    targets = np.concatenate(
        [climb.batch.targets[check.reads] for climb, check in zip(climbs, checks, strict=True)]
    )
    values, logprobs, greedy = measure(backbone, aligned, rule, read_at, targets, softmax_dtype)
    sizes = [len(check.reads) for check in checks]
    for climb, check, *found in zip(
        climbs, checks, logprobs.double().split(sizes), greedy.split(sizes), strict=True
    ):
        climb.logprobs[check.reads], climb.greedy[check.reads] = (x.numpy() for x in found)
    return values


def _answer(
    backbone: Backbone,
    climbs: Sequence[Climb],
    decoder: Decoder,
    itself: bool,
    softmax_dtype: torch.dtype,
) -> list[Trace]:
    """Let the decoder and the head answer, at once, for all that left without an answer."""
    states: list[States] = []
    read_from: list[Ints] = []
    reads: list[Ints] = []
    offset = 0
    for climb in climbs:
        who, exit_layers = climb.who, climb.departures.exit_layers
        open_ = np.ones(len(who.member_at), dtype=bool)
        if itself:
            open_ = ~answered_by_checks(who, exit_layers, backbone.n_layers)
        members = np.flatnonzero(open_)
        # Members that left a position at the same layer share its answer.
        left = np.stack([who.member_at, exit_layers[who.member_of]])[:, members]  # (2, M')
        (at, layers), one, of = np.unique(left, axis=1, return_index=True, return_inverse=True)
        h = climb.h[put(members[one], climb.h.device)]
        states.append(_states(backbone, climb.batch, h, torch.from_numpy(layers), at))
        answer = np.zeros(len(open_), dtype=np.int64)
        answer[members] = of.reshape(-1) + offset
        reads.append(np.flatnonzero(open_[who.read_from]))
        read_from.append(answer[who.read_from[reads[-1]]])
        offset += len(at)
    names = ("h", "layer", "token_ids", "start_ids", "positions")
    together = States(*(torch.cat([getattr(s, name) for s in states]) for name in names))
    targets = np.concatenate(
        [climb.batch.targets[own] for climb, own in zip(climbs, reads, strict=True)]
    )
    every = np.concatenate(read_from)
    order = np.argsort(every, kind="stable")
    h = decoder.align(backbone, together)
    found = read(backbone, h, every[order], targets[order], softmax_dtype)
    logprobs, greedy = np.empty(len(every)), np.empty(len(every), dtype=bool)
    logprobs[order], greedy[order] = found.logprobs, found.greedy
    traces, first = [], 0
    for climb, own in zip(climbs, reads, strict=True):
        here = slice(first, first := first + len(own))
        climb.logprobs[own], climb.greedy[own] = logprobs[here], greedy[here]
        traces.append(
            Trace(
                Answers(climb.logprobs.tolist(), climb.greedy.tolist()),
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
        token_ids=put(batch.token_ids[at], device),
        start_ids=put(batch.start_ids[at], device),
        positions=put(batch.scored_positions[at], device),
    )
