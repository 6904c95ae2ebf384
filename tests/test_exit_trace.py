"""Algorithm 1 against a loop over single sequences, and the layers that it leaves out."""

from __future__ import annotations

import copy
import functools
import itertools
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import VOCAB, tiny

from spade_eval.backbone import Backbone
from spade_eval.batching import collate, cut
from spade_eval.decoders import Decoder, Linear, Spade
from spade_eval.exits import ExitRule
from spade_eval.hollow import head_places, narrow_head
from spade_eval.lens import LinearLens
from spade_eval.lens_config import LensConfig
from spade_eval.lm.windows import window
from spade_eval.scoring import Layout, Request, plan
from spade_eval.trace import Trace, score, score_with_exits

if TYPE_CHECKING:
    from spade_eval.batching import Batch

FAMILIES = [
    "llama",
    "gpt2",
    "gemma3",
    "mistral_sliding",
    "bloom",
    "phi",
    "cohere",
    "gpt_oss",
    "qwen3_5",
]
SCOPES = ["context", "token", "request"]
ATOL = 1e-4
CANDIDATES = (1, 2, 3)  # of 4 layers

Key = tuple[int, int]  # request and position


pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Read:
    logprob: float
    layer: int
    confidence: float


@functools.cache
def backbone(family: str) -> Backbone:
    return Backbone(tiny(family))


@functools.cache
def maps(family: str) -> LinearLens:
    """A lens that nobody fitted."""
    one = backbone(family)
    lens = LinearLens(LensConfig("l_spade", family, one.n_layers, one.width, (0, 1, 2, 3)))
    generator = torch.Generator().manual_seed(7)
    for layer in range(4):
        weight = torch.randn(one.width, one.width, generator=generator) * 0.1
        lens.set_map(layer, weight, torch.randn(one.width, generator=generator) * 0.1)
    return lens.requires_grad_(False)


def identity(family: str) -> LinearLens:
    return LinearLens.identity(backbone(family).n_layers, backbone(family).width)


def rule(threshold: float, **kwargs: Any) -> ExitRule:
    return ExitRule(threshold, **({"interval": 1, "min_layer": 1} | kwargs))


@functools.cache
def questions(seed: int = 0) -> tuple[Request, ...]:
    """Contexts with several continuations, contexts that begin others, twins, and position 0."""
    rng = random.Random(seed)

    def some(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, VOCAB) for _ in range(n))

    found = []
    for _ in range(3):
        context = some(rng.randint(2, 8))
        found += [Request(context, some(rng.randint(1, 4))) for _ in range(2)]
        longer = found[-1].continuation
        found.append(Request(context + longer[:1], (*longer[1:], *some(2))))
    one = some(1)
    found += [Request(one, some(1)), Request(one, some(3)), Request(*(some(1), some(2)))]
    return (*found, found[0], found[0])


def batches(asked: Any, family: str, packed: bool, batch_size: int = 4) -> list[Batch]:
    width = window(backbone(family).model.config)
    packed = packed and backbone(family).packs
    layout = Layout(64, packed, width, crossover=400.0, batch_size=batch_size)
    return [collate(rows) for rows in cut(plan(list(asked), layout).rows, batch_size)]


def collect(batch: Batch, trace: Trace) -> dict[Key, Read]:
    who = trace.decisions
    of = who.member_of[who.read_from]
    keys = zip(batch.requests.tolist(), batch.scored_positions[batch.read_at].tolist(), strict=True)
    layers, values = trace.exit_layers[of].tolist(), trace.confidence[of].tolist()
    reads = zip(trace.answers.logprobs, layers, values, strict=True)
    return {key: Read(*read) for key, read in zip(keys, reads, strict=True)}


@torch.no_grad()
def run(
    asked: Any,
    family: str,
    exits: ExitRule,
    lens: LinearLens | None = None,
    decoder: Decoder | None = None,
    packed: bool = True,
    batch_size: int = 4,
    choices: Any = None,
) -> dict[Key, Read]:
    found: dict[Key, Read] = {}
    every = list(batches(asked, family, packed, batch_size))
    for beside in (every[i : i + 3] for i in range(0, len(every), 3)):  # climb side by side
        traces = score_with_exits(
            backbone(family), beside, decoder or Spade(), lens or identity(family), exits, choices or {}
        )  # fmt: skip
        for batch, trace in zip(beside, traces, strict=True):
            found |= collect(batch, trace)
    assert len(found) == sum(len(r.continuation) for r in asked)
    return found


# ---------------------------------------------------------------- the loop


@torch.no_grad()
def lens_logits(request: Request, family: str, lens: LinearLens) -> np.ndarray:
    """What a lens says at every token of one sequence and every candidate layer: (3, n, V)."""
    one = backbone(family)
    ids = torch.tensor([(request.context + request.continuation)[:-1]])
    states = one.hidden_states(ids)
    found = []
    for layer in CANDIDATES:
        h = states[layer][0]
        if lens.config.decoder != "identity":
            m = lens.layers[str(layer)]
            h = h + h @ m.weight.T + m.bias
        found.append(one.logits(h).double().numpy())
    return np.stack(found)


def naive_entropy(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return -(p * np.log(np.maximum(p, 1e-300))).sum(-1)


def decided_by(request: Request, scope: str, position: int) -> list[int]:
    """The positions whose confidence decides about one."""
    first = len(request.context) - 1
    every = range(first, first + len(request.continuation))
    found = {"context": [first], "token": [position], "request": list(every)}[scope]
    return [p for p in found if p > 0]


def values(request: Request, scope: str, position: int, entropies: np.ndarray) -> np.ndarray | None:
    """What a decision sees at the candidates; None if it sees nothing."""
    at = decided_by(request, scope, position)
    return entropies[:, at].mean(1) if at else None


def naive_layer(seen: np.ndarray | None, threshold: float) -> int:
    if seen is None:
        return 4
    return next((n for n, h in zip(CANDIDATES, seen, strict=True) if h <= threshold), 4)


def midways(found: list[float], n: int) -> list[float]:
    """Thresholds between observed values, away from all of them."""
    ordered = np.unique(np.array(found))
    gaps = [(a + b) / 2 for a, b in itertools.pairwise(ordered) if b - a > 1e-3]
    return [gaps[len(gaps) * (i + 1) // (n + 1)] for i in range(n)]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_read_exits_where_the_loop_says_and_answers_as_spade_does_there(
    family: str, scope: Any
) -> None:
    asked = questions()
    for lens in (identity(family), maps(family)):
        entropies = [naive_entropy(lens_logits(r, family, lens)) for r in asked]
        keys = [(i, len(r.context) - 1 + k) for i, r in enumerate(asked) for k in range(len(r.continuation))]  # fmt: skip
        seen = {key: values(asked[key[0]], scope, key[1], entropies[key[0]]) for key in keys}
        fixed = [
            {key: read for batch in batches(asked, family, False, 64) for key, read in _at(batch, family, layer)}
            for layer in range(5)
        ]  # fmt: skip
        thresholds = midways([float(h) for s in seen.values() if s is not None for h in s], 5)
        layers = set()
        for packed, threshold in enumerate(thresholds):
            found = run(
                asked, family, rule(threshold, exit_scope=scope), lens, packed=packed % 2 == 0
            )
            for key, read in found.items():
                expected = naive_layer(seen[key], threshold)
                assert read.layer == expected
                assert read.logprob == pytest.approx(fixed[expected][key], abs=ATOL)
                last = None if seen[key] is None else seen[key][CANDIDATES.index(min(expected, 3))]
                assert read.confidence == pytest.approx(np.nan if last is None else last, abs=1e-4, nan_ok=True)  # fmt: skip
                layers.add(expected)
        assert len(layers) > 2, "the thresholds are to spread the exits"


@pytest.mark.parametrize("confidence", ["entropy", "max_prob"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_5"])
def test_a_check_that_answers_says_what_the_map_and_the_head_say(
    family: str, scope: Any, confidence: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a block holds: another lens of the same maps is asked again, and agrees."""
    asked, lens = questions(8), maps(family)
    again = Linear(copy.deepcopy(lens))
    spread = set()
    thresholds = (2.0, 2.6, 3.2) if confidence == "entropy" else (0.5, 0.35, 0.2)
    blocks = ((1, True), (3, False), (1000, True))
    for threshold, (rows, packed) in zip(thresholds, blocks, strict=True):
        exits = rule(threshold, exit_scope=scope, confidence=confidence)
        monkeypatch.setattr(Backbone, "logits_rows", lambda *_, rows=rows: rows)
        ours = run(asked, family, exits, lens, Linear(lens), packed)
        theirs = run(asked, family, exits, lens, again, packed)
        for key, read in ours.items():
            assert read.layer == theirs[key].layer
            assert read.confidence == pytest.approx(theirs[key].confidence, nan_ok=True, abs=0)
            assert read.logprob == pytest.approx(theirs[key].logprob, abs=1e-5)
            spread.add(read.layer)
    assert len(spread) > 2


def _at(batch: Batch, family: str, layer: int) -> list[tuple[Key, float]]:
    keys = zip(batch.requests.tolist(), batch.scored_positions[batch.read_at].tolist(), strict=True)
    answers = score(backbone(family), batch, Spade(), layer)
    return list(zip(keys, answers.logprobs, strict=True))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "bloom"])
def test_an_infinite_threshold_is_spade_at_the_first_candidate(family: str, scope: Any) -> None:
    asked = questions(1)
    exits = rule(float("inf"), exit_scope=scope, min_layer=2)
    for packed in (True, False):
        found = run(asked, family, exits, packed=packed)
        for batch in batches(asked, family, packed):
            for key, logprob in _at(batch, family, 2):
                if decided_by(asked[key[0]], scope, key[1]):
                    assert found[key].layer == 2
                    assert found[key].logprob == pytest.approx(logprob, abs=ATOL)
                else:  # no pair to decide by
                    assert found[key].layer == 4


@pytest.mark.parametrize("positions", ["reset", "keep"])
def test_positions_reach_the_tail(positions: Any) -> None:
    asked, decoder = questions(1), Spade(positions=positions)
    found = run(asked, "llama", rule(float("inf")), decoder=decoder)
    for batch in batches(asked, "llama", True):
        keys = zip(batch.requests.tolist(), batch.scored_positions[batch.read_at].tolist(), strict=True)  # fmt: skip
        for key, logprob in zip(keys, score(backbone("llama"), batch, decoder, 1).logprobs, strict=True):  # fmt: skip
            if found[key].layer == 1:
                assert found[key].logprob == pytest.approx(logprob, abs=ATOL)


@pytest.mark.parametrize("given", ["identity", "maps"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@torch.no_grad()
def test_the_lens_may_answer_itself(family: str, given: str) -> None:
    """Its own distribution after an exit; the model's where there was none, and at position 0."""
    asked = questions(2)
    lens = identity(family) if given == "identity" else maps(family)
    logits = [lens_logits(r, family, lens) for r in asked]
    full = [
        backbone(family).model(torch.tensor([(r.context + r.continuation)[:-1]])).logits[0].double().numpy()
        for r in asked
    ]  # fmt: skip
    entropies = [naive_entropy(x) for x in logits]
    (threshold,) = midways([float(h) for e in entropies for h in e.ravel()], 1)
    for exits in (rule(threshold), rule(threshold, exit_scope="token")):
        found = run(asked, family, exits, lens, Linear(lens))
        for (i, position), read in found.items():
            seen = values(asked[i], exits.exit_scope, position, entropies[i])
            assert read.layer == naive_layer(seen, threshold)
            row = full[i] if read.layer == 4 or position == 0 else logits[i][read.layer - 1]
            token = (asked[i].context + asked[i].continuation)[position + 1]
            z = row[position]
            expected = z[token] - z.max() - np.log(np.exp(z - z.max()).sum())
            assert read.logprob == pytest.approx(expected, abs=ATOL)


@pytest.mark.parametrize("confidence", ["top2_margin", "max_prob"])
def test_probabilities_exit_from_below(confidence: Any) -> None:
    asked = questions(3)
    tops = []
    for r in asked:
        z = lens_logits(r, "llama", maps("llama"))[:, len(r.context) - 1]
        p = np.sort(np.exp(z - z.max(-1, keepdims=True)) / np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True), -1)  # fmt: skip
        tops.append(p[:, -1] - (p[:, -2] if confidence == "top2_margin" else 0))
    (threshold,) = midways([float(v) for top in tops for v in top], 1)
    found = run(asked, "llama", rule(threshold, confidence=confidence), maps("llama"))
    layers = set()
    for (i, _), read in found.items():
        reached = [n for n, v in zip(CANDIDATES, tops[i], strict=True) if v >= threshold]
        expected = 4 if len(asked[i].context) == 1 or not reached else reached[0]
        assert read.layer == expected
        layers.add(expected)
    assert len(layers) > 2


def test_choice_entropy_looks_at_the_contexts_own_choices() -> None:
    layers = set()
    for family, packed in itertools.product(("llama", "gemma2", "cohere"), (True, False)):
        asked = questions(4)
        first: dict[tuple[int, ...], list[int]] = {}
        for r in asked:
            if r.continuation[0] not in first.setdefault(r.context, []):
                first[r.context].append(r.continuation[0])
        choices = {i: first[r.context] for i, r in enumerate(asked)}
        entropies = [
            naive_entropy(lens_logits(r, family, maps(family))[:, len(r.context) - 1][:, choices[i]])
            for i, r in enumerate(asked)
        ]  # fmt: skip
        (threshold,) = midways([float(h) for e in entropies for h in e], 1)
        exits = rule(threshold, confidence="choice_entropy")
        found = run(asked, family, exits, maps(family), packed=packed, choices=choices)
        for (i, _), read in found.items():
            seen = None if len(asked[i].context) == 1 else entropies[i]
            assert read.layer == naive_layer(seen, threshold)
            layers.add(read.layer)
    assert len(layers) > 2


# ---------------------------------------------------------------- what may not matter


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral_sliding"])
@pytest.mark.parametrize("scope", SCOPES)
def test_exit_layers_do_not_increase_with_the_threshold(family: str, scope: Any) -> None:
    before: dict[Key, Read] | None = None
    depths = []
    for threshold in (-0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, float("inf")):
        found = run(questions(5), family, rule(threshold, exit_scope=scope))
        if before is not None:
            assert all(found[key].layer <= before[key].layer for key in found)
        before = found
        depths.append(sum(read.layer for read in found.values()))
    assert depths[0] == 4 * len(found)
    assert len(set(depths)) > 2


tokens = st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=6).map(tuple)
shared = st.sampled_from([(5, 6, 7, 8, 9), (5, 6, 7), (11,)])
contexts = st.one_of(shared, st.tuples(shared, tokens).map(lambda pair: pair[0] + pair[1]), tokens)


@settings(max_examples=40)  # a case is a dozen runs of a model
@given(
    st.lists(st.builds(Request, contexts, tokens), min_size=1, max_size=4),
    st.sampled_from(["llama", "gemma3", "gpt2", "bloom"]),
    st.sampled_from(SCOPES),
    st.floats(0.3, 4.2),
    st.booleans(),
    st.integers(1, 9),
)
def test_a_decision_depends_on_nothing_but_its_request(
    asked: list[Request], family: str, scope: Any, threshold: float, packed: bool, batch_size: int
) -> None:
    exits, lens = rule(threshold, exit_scope=scope), maps(family)
    together = run(asked, family, exits, lens, packed=packed, batch_size=batch_size)
    for i, request in enumerate(asked):
        alone = run([request], family, exits, lens, packed=False, batch_size=1)
        entropies = None
        for (_, position), read in alone.items():
            other = together[i, position]
            if other.layer != read.layer:
                if entropies is None:
                    entropies = naive_entropy(lens_logits(request, family, lens))
                seen = values(request, scope, position, entropies)
                assert seen is not None
                assert np.abs(seen - threshold).min() < ATOL
            else:
                assert other.logprob == pytest.approx(read.logprob, abs=ATOL, rel=1e-5)


# ---------------------------------------------------------------- layers that do not run


@torch.no_grad()
def watched(batch: Batch, family: str, exits: ExitRule, decoder: Decoder) -> tuple[Trace, dict, dict]:  # fmt: skip
    """A trace, and for each layer from 1 the tokens that it saw in the main lane and in the tail.

    The tail alone comes with a cache.
    """
    one = backbone(family)
    one.start_states(torch.from_numpy(batch.start_ids))  # known beforehand, so not seen
    lane, tail = dict.fromkeys(range(1, 5), 0), dict.fromkeys(range(1, 5), 0)

    def see(layer: int, args: tuple, kwargs: dict, out: Any) -> None:
        h = out[0] if isinstance(out, tuple) else out
        caches = [v for v in (*args, *kwargs.values()) if hasattr(v, "get_seq_length")]
        counts = tail if caches else lane
        counts[layer] += h.shape[0] * h.shape[1]
        assert not caches or h.shape[1] == 1, "an answer is one token"

    handles = [
        module.register_forward_hook(
            lambda _m, args, kwargs, out, n=n: see(n, args, kwargs, out), with_kwargs=True
        )
        for n, module in enumerate(one._layers, 1)
    ]
    try:
        (trace,) = score_with_exits(one, [batch], decoder, maps(family), exits, {})
    finally:
        for handle in handles:
            handle.remove()
    return trace, lane, tail


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma3"])
def test_layers_see_only_what_has_not_left(family: str, scope: Any) -> None:
    asked = questions(6)[:-2]
    left_out = 0
    for packed, batch_size, threshold in itertools.product((True, False), (1, 4), (1.5, 2.2, 3.0)):
        for batch in batches(asked, family, packed, batch_size):
            trace, lane, tail = watched(batch, family, rule(threshold, exit_scope=scope), Spade())
            who = trace.decisions
            first = batch.scored_positions[who.member_at] == 0
            layers = trace.exit_layers[who.member_of][~first]
            answers = who.member_at[~first] * 5 + layers
            real = np.arange(batch.ids.shape[1]) < batch.lengths[:, None]
            assert not trace.passed[~real].any()
            for n in range(1, 5):
                passed = int((trace.passed >= n).sum())
                padding = lane[n] - passed
                # One row needs no padding, and keeps none.
                assert padding == 0 if len(batch.ids) == 1 else 0 <= padding <= batch.ids.size
                # An answer is one token, for all that read this position from this layer.
                assert tail[n] == len({*answers[layers < n].tolist()})
                if not (layers >= n).any():
                    assert lane[n] == 0
                left_out += batch.ids.size - lane[n]
            # No token left before the answers that see it.
            for member, layer in zip(np.flatnonzero(~first), layers.tolist(), strict=True):
                at = int(batch.scored[who.member_at[member]])
                b, t = divmod(at, batch.ids.shape[1])
                path = np.arange(t + 1)
                if batch.ends is not None:
                    path = path[batch.ends[b, : t + 1] > t]
                assert (trace.passed[b, path] >= layer).all()
    assert left_out > 0


def test_nothing_runs_above_the_layer_at_which_all_left() -> None:
    asked = [r for r in questions(6) if len(r.context) > 1]
    for family, packed in itertools.product(("llama", "gpt2"), (True, False)):
        for batch in batches(asked, family, packed):
            trace, lane, tail = watched(batch, family, rule(99.0, min_layer=2), Spade())
            assert (lane[1], lane[2], lane[3], lane[4]) == (batch.ids.size, batch.ids.size, 0, 0)
            answers = len(batch.scored)
            assert tail == {1: 0, 2: 0, 3: answers, 4: answers}
            assert trace.passed.sum() == 2 * batch.tokens
            lens = Linear(maps(family))
            _, lane, tail = watched(batch, family, rule(99.0, min_layer=2), lens)
            assert (lane[3], lane[4], set(tail.values())) == (0, 0, {0})


def test_position_0_keeps_nothing_in_the_lane() -> None:
    (batch,) = batches([Request((5,), (6,)), Request((7,), (8,))], "llama", False)
    trace, lane, tail = watched(batch, "llama", rule(1.0), Spade())
    assert (set(lane.values()), set(tail.values()), trace.passed.sum()) == ({0}, {0}, 0)
    assert trace.exit_layers.tolist() == [4, 4]


def test_checks_are_counted_as_they_are_made() -> None:
    (batch,) = batches(questions(7), "llama", True, 64)
    for scope in SCOPES:
        trace, _, _ = watched(batch, "llama", rule(2.0, exit_scope=scope), Spade())
        who = trace.decisions
        positions = np.bincount(who.check_of, minlength=who.count)
        made = np.where(trace.exit_layers == 4, 3, trace.exit_layers)  # candidates are 1, 2, 3
        assert (trace.checked == positions * made).all()
        assert np.isnan(trace.confidence).tolist() == (positions == 0).tolist()


@torch.no_grad()
def heads(batch: Batch, family: str, exits: ExitRule, decoder: Decoder, **choices: Any) -> tuple[Trace, list[int]]:  # fmt: skip
    """A trace, and the rows of each call of the head."""
    one, seen = backbone(family), []
    handle = one.model.get_output_embeddings().register_forward_hook(
        lambda _m, args, _o: seen.append(len(args[0]))
    )
    try:
        (trace,) = score_with_exits(one, [batch], decoder, maps(family), exits, choices)
    finally:
        handle.remove()
    return trace, seen


def test_a_position_is_measured_once_for_all_that_look_at_it() -> None:
    """Four answers of one token are four requests, and one position."""
    asked = [Request((5, 6, 7, 8), (n,)) for n in range(10, 14)]
    (batch,) = batches(asked, "llama", True, 64)
    assert len(batch.scored) == 1
    for threshold, layer in ((0.01, 4), (99.0, 1)):
        trace, seen = heads(batch, "llama", rule(threshold, exit_scope="request"), Spade())
        assert trace.exit_layers.tolist() == [layer] * 4
        assert seen == [1] * (3 if layer == 4 else 1) + [1], "each check, and the answer"
        assert trace.checked.tolist() == [3 if layer == 4 else 1] * 4
        assert len({*trace.confidence.tolist()}) == 1


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("packed", [True, False])
def test_a_check_that_answers_needs_no_head_again(packed: bool, scope: Any) -> None:
    """Only positions that exit without a check of their own, or not at all, are read afterwards."""
    asked, lens, kept = questions(9), maps("llama"), 0
    (batch, *_) = batches(asked, "llama", packed, 64)
    for threshold in (2.0, 2.6, 99.0):
        exits = rule(threshold, exit_scope=scope)
        trace, seen = heads(batch, "llama", exits, Linear(lens))
        _, asks = heads(batch, "llama", exits, Linear(copy.deepcopy(lens)))
        who, layers = trace.decisions, trace.exit_layers
        left = {*zip(who.member_at.tolist(), layers[who.member_of].tolist(), strict=True)}
        checked = {*zip(who.check_at.tolist(), layers[who.check_of].tolist(), strict=True)}
        answered = {(at, layer) for at, layer in checked if layer < 4}
        assert answered <= left
        assert sum(asks) - sum(seen) == len(answered)
        if scope == "token":
            first = batch.scored_positions[batch.read_at] == 0
            assert len(left - answered) == (layers == 4).sum() >= first.any()
        kept += len(answered)
    assert kept > 5


@torch.no_grad()
def test_no_block_of_logits_is_larger_than_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backbone, "logits_rows", lambda *_: 2)
    (batch, *_) = batches(questions(9), "llama", True, 64)
    for decoder in (Spade(), Linear(maps("llama"))):
        _, seen = heads(batch, "llama", rule(2.6, exit_scope="token"), decoder)
        assert max(seen) == 2
        assert len(seen) > 9


# ---------------------------------------------------------------- a head of a few columns

HEADS = ["llama", "gemma2", "cohere", "granite", "phi", "bloom", "opt_projected", "falcon"]


@pytest.mark.parametrize("family", HEADS)
@torch.no_grad()
def test_some_columns_of_the_logits(family: str) -> None:
    one = backbone(family)
    h = torch.randn(5, one.width, generator=torch.Generator().manual_seed(0)) * 3
    columns = torch.tensor([96, 3, 50])
    head = one.model.get_output_embeddings()
    assert one.narrows  # found out once, by the whole head
    widths = []
    handle = head.register_forward_hook(lambda *_: widths.append("full"))
    narrow = one.logits(h, columns)
    handle.remove()
    assert not widths, "the whole head was computed"
    torch.testing.assert_close(narrow, one.logits(h)[:, columns], atol=1e-5, rtol=1e-5)
    assert one.model.get_output_embeddings() is head


@torch.no_grad()
@pytest.mark.parametrize("case", ["replaced", "wrapped before", "renamed", "with a second name"])
def test_columns_are_right_wherever_the_head_is_put_later(case: str) -> None:
    model = copy.deepcopy(backbone("llama").model)
    head = model.lm_head
    model.get_output_embeddings = lambda: head  # as of a model with a head in a place of its own
    if case == "wrapped before":
        model.lm_head = torch.nn.Sequential(head)
    elif case == "with a second name":
        model._modules = {"alias": head, **model._modules}
    one = Backbone(model)
    if case == "replaced":
        head = model.lm_head = torch.nn.Linear(one.width, one.vocab_size, bias=False)
    elif case == "wrapped before":
        model.lm_head = head
    elif case == "renamed":
        model.lm_head = torch.nn.Sequential(head)
    h = torch.randn(5, one.width, generator=torch.Generator().manual_seed(0))
    columns = torch.tensor([96, 3, 50])
    torch.testing.assert_close(one.logits(h, columns), one.logits(h)[:, columns])


def test_choices_are_asked_in_blocks_where_the_whole_head_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = [Request(r.context, (n,)) for r in questions(4)[::2] for n in (10, 11, 12)]
    choices = {i: [10, 11, 12] for i in range(len(asked))}
    plain = backbone("llama")
    one = Backbone(copy.deepcopy(plain.model))
    head = one.model.lm_head
    head._hf_hook = None  # as accelerate leaves its own there
    monkeypatch.setattr(Backbone, "logits_rows", lambda *_: 2)
    seen: list[tuple[int, ...]] = []
    head.register_forward_hook(lambda _m, _a, out: seen.append(tuple(out.shape)))
    (batch, *_) = batches(asked, "llama", True, 64)
    exits = rule(0.5, confidence="choice_entropy")
    found = []
    for which in (plain, one):
        with torch.no_grad():
            (trace,) = score_with_exits(which, [batch], Spade(), maps("llama"), exits, choices)
        found.append(trace)
    ours, theirs = found[1], found[0]
    assert {rows for rows, _, columns in seen if columns == VOCAB} == {1, 2}
    assert ours.exit_layers.tolist() == theirs.exit_layers.tolist()
    np.testing.assert_allclose(ours.confidence, theirs.confidence, atol=1e-5)
    np.testing.assert_allclose(ours.answers.logprobs, theirs.answers.logprobs, atol=1e-5)


def test_the_head_comes_back_whatever_happens() -> None:
    model = backbone("llama").model
    head, states = model.get_output_embeddings(), dict(model.state_dict())

    def fail() -> None:
        with narrow_head(model, head_places(model), torch.tensor([3, 4])):
            assert model.get_output_embeddings().out_features == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert model.get_output_embeddings() is head
    assert model.lm_head is head
    assert all(states[name] is value or torch.equal(states[name], value) for name, value in model.state_dict().items())  # fmt: skip
