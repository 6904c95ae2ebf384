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
from spade_eval.compaction import Rows, compact
from spade_eval.decisions import Decisions, decide
from spade_eval.decoders import Decoder, States
from spade_eval.exits import request_mean

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from spade_eval.backbone import Backbone
    from spade_eval.batching import Batch, Ints
    from spade_eval.exits import ExitRule
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


def rows_of(batch: Batch) -> Rows:
    """A batch's rows before anything has left."""
    real = np.arange(batch.ids.shape[1]) < batch.lengths[:, None]
    origin = np.arange(batch.ids.size).reshape(batch.ids.shape)
    return Rows(batch.ids, real, batch.positions, batch.sees, origin)


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
    batch: Batch,
    decoder: Decoder,
    lens: LinearLens,
    rule: ExitRule,
    choices: Mapping[int, Sequence[int]],
    softmax_dtype: torch.dtype = torch.float32,
) -> Trace:
    """SPADE-EXIT (Algorithm 1) for a batch.

    A decision is taken from its own positions alone: whatever shares its batch, it is the same.

    Args:
        backbone: The model.
        batch: The batch.
        decoder: What answers after an exit.
        lens: Its maps are asked for the confidence.
        rule: Threshold, candidate layers, scope.
        choices: For each request the first tokens of its context's continuations, for
            `choice_entropy`.
        softmax_dtype: The log-softmax is computed in this type.
    """
    n_layers, device = backbone.n_layers, backbone.device
    who = decide(batch, rule.scope)
    exit_layers = np.full(who.count, n_layers)
    confidence = np.full(who.count, np.nan, dtype=np.float32)
    checked = np.zeros(who.count, dtype=np.int64)
    passed = np.zeros(batch.ids.size, dtype=np.int64)
    first = batch.scored_positions[who.member_at] == 0
    # A start token answers with its own stored state: it alone keeps nothing in the lane.
    undecided = np.zeros(who.count, dtype=bool)
    undecided[who.member_of[~first]] = True
    h = torch.empty(len(who.member_at), backbone.width, dtype=backbone.model.dtype, device=device)

    rows = rows_of(batch)
    lane = enter(backbone, rows)
    for layer in (*rule.candidates(n_layers, lens.available), n_layers):
        if not undecided.any():
            break
        backbone.advance(lane, layer)
        passed[rows.origin[rows.real]] = layer
        if layer < n_layers:
            checks = undecided[who.check_of]
            at, of = who.check_at[checks], who.check_of[checks]
            if not len(at):
                continue
            states = _gather(lane, rows.where(batch.scored[at])).to(device)  # (K, d)
            values = _confidence(backbone, lens(states, layer), at, of, who, rule, batch, choices)
            measured = np.unique(of)
            confidence[measured] = values[measured]
            np.add.at(checked, of, 1)
            leaving = undecided & rule.confident(torch.from_numpy(values)).numpy()
        else:
            leaving = undecided
        if not leaving.any():
            continue
        exit_layers[leaving] = layer
        members = np.flatnonzero(leaving[who.member_of] & ~first)
        at = rows.where(batch.scored[who.member_at[members]])
        h[torch.from_numpy(members).to(device)] = _gather(lane, at).to(device, h.dtype)
        undecided = undecided & ~leaving
        still = undecided[who.member_of] & ~first
        if still.any() and layer < n_layers:
            open_at = batch.scored[np.unique(who.member_at[still])]
            if (found := compact(rows, open_at)) is not None:
                rows, source = found
                before, lane = lane, enter(backbone, rows)
                lane.h = _gather(before, source.reshape(-1)).view(*source.shape, -1)
                lane.depth = layer

    # Members that left a position at the same layer share its answer.
    left = np.stack([who.member_at, exit_layers[who.member_of]])  # (2, M)
    (at, layers), one, of = np.unique(left, axis=1, return_index=True, return_inverse=True)
    picked = h[torch.from_numpy(one).to(device)]
    left_states = _states(backbone, batch, picked, torch.from_numpy(layers), at)
    answer = decoder.align(backbone, left_states)
    read_from = of.reshape(-1)[who.read_from]
    order = np.argsort(read_from, kind="stable")
    sorted_ = read(backbone, answer, read_from[order], batch.targets[order], softmax_dtype)
    back = np.argsort(order)
    answers = Answers(
        [sorted_.logprobs[i] for i in back.tolist()], [sorted_.greedy[i] for i in back.tolist()]
    )
    return Trace(answers, who, exit_layers, confidence, passed.reshape(batch.ids.shape), checked)


def _confidence(
    backbone: Backbone,
    aligned: Tensor,
    at: Ints,
    of: Ints,
    who: Decisions,
    rule: ExitRule,
    batch: Batch,
    choices: Mapping[int, Sequence[int]],
) -> NDArray[np.float32]:
    """The confidence of every decision, (D,), from states of its positions, (K, d); else NaN."""
    if rule.confidence == "choice_entropy":
        own = [choices[request] for request in who.requests[of].tolist()]
        tokens = sorted({token for some in own for token in some})
        column = {token: i for i, token in enumerate(tokens)}
        exists = torch.zeros(len(own), len(tokens), dtype=torch.bool, device=aligned.device)
        for row, some in enumerate(own):
            exists[row, [column[token] for token in some]] = True
        logits = backbone.logits(aligned, torch.tensor(tokens, device=aligned.device))  # (K, C)
        values = rule.measure(logits.to(exists.device), exists)
    else:
        blocks = aligned.split(backbone.logits_rows(torch.float32))
        values = torch.cat([rule.measure(backbone.logits(block)) for block in blocks])
    decisions = torch.from_numpy(of).to(values.device)
    return request_mean(values, decisions, who.count).cpu().numpy()


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
