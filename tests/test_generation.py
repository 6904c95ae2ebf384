"""Generation with exits: against transformers' own loop, against scoring, against no cache at all."""

from __future__ import annotations

import copy
import functools
import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_exit_trace import backbone as scored_backbone
from test_exit_trace import lens_logits, maps, midways, naive_entropy
from zoo import FAMILIES, random_ids, tiny

from spade_eval.backbone import Backbone
from spade_eval.backfill import CALL, Sequences, _together
from spade_eval.batching import collate, cut
from spade_eval.decoders import Decoder, Linear, LogitLens, Spade, States
from spade_eval.errors import UnsupportedModelError, UserError
from spade_eval.exits import ExitRule
from spade_eval.generation import Generated, check, generate
from spade_eval.policy import Policy
from spade_eval.scoring import Layout, Request, plan
from spade_eval.trace import score, score_with_exits

pytestmark = pytest.mark.usefixtures("one_thread")

ATOL = 1e-4
TIE = 1e-3
SOME = ["llama", "gpt2", "gemma3", "mistral_sliding", "bloom"]
RAGGED = (9, 3, 7, 1)


@functools.cache
def backbone(family: str) -> Backbone:
    """With room for 64 new tokens."""
    return Backbone(tiny(family, max_position_embeddings=128))


def prompts(lengths: tuple[int, ...], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random prompts, left-padded."""
    width = max(lengths)
    ids = random_ids(len(lengths), width, seed)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def rule(threshold: float, **kwargs: Any) -> ExitRule:
    return ExitRule(threshold, **({"interval": 1, "min_layer": 1, "exit_scope": "token"} | kwargs))


def exits(family: str, threshold: float, decoder: Decoder | None = None, **kwargs: Any) -> Policy:
    return Policy.exits(4, decoder or Spade(), rule(threshold, **kwargs), maps(family))


def run(family: str, policy: Policy, asked: dict[str, Any], new: int, **kwargs: Any) -> tuple[Any, Generated]:  # fmt: skip
    defaults = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": new}
    return generate(scored_backbone(family), policy, **asked, **(defaults | kwargs))


def top2_gap(logits: Any) -> float:
    first, second = torch.as_tensor(logits).topk(2).values.tolist()
    return float(first - second)


# ---------------------------------------------------------------- the model itself


@pytest.mark.parametrize("family", SOME[:3])
def test_without_exits_it_is_the_models_own_greedy_decoding(family: str) -> None:
    decodes_as_the_model(family, 64)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in SOME[:3]])
@pytest.mark.parametrize("new", [9, pytest.param(64, marks=pytest.mark.slow)])
def test_so_it_is_in_every_family(family: str, new: int) -> None:
    decodes_as_the_model(family, new)


def decodes_as_the_model(family: str, new: int) -> None:
    """Ragged prompts; a row that meets EOS is padded from there."""
    one = backbone(family)
    arguments = prompts(RAGGED, seed=3) | {
        "max_new_tokens": new, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0,
        "return_dict_in_generate": True, "output_scores": True,
    }  # fmt: skip
    theirs = one.model.generate(**arguments)
    ours, happened = generate(one, Policy((4,), LogitLens()), **arguments)
    same_text(ours, theirs)
    for row, layers in enumerate(happened.exit_layers):
        assert layers == [4] * len(happened.tokens[row])
        text = ours.sequences[row, 9 : 9 + len(layers)].tolist()
        assert text == happened.tokens[row]
        assert 2 not in text[:-1]


def same_text(ours: Any, theirs: Any) -> None:
    """Equal up to a tie, after which texts go different ways."""
    for row in range(len(theirs.sequences)):
        a, b = ours.sequences[row].tolist(), theirs.sequences[row].tolist()
        first = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if first is None:
            continue
        step = first - (len(b) - len(theirs.scores))
        assert top2_gap(theirs.scores[step][row]) < TIE
        assert step > 8, "nothing was compared"


@pytest.mark.parametrize("family", ["llama", "mistral_sliding"])
def test_one_prompt_without_a_mask(family: str) -> None:
    one = backbone(family)
    arguments = {
        "input_ids": random_ids(1, 7, 5), "max_new_tokens": 64, "do_sample": False,
        "pad_token_id": 0, "return_dict_in_generate": True, "output_scores": True, "output_logits": True,
    }  # fmt: skip
    theirs = one.model.generate(**arguments)
    ours, _ = generate(one, Policy((4,), LogitLens()), **arguments)
    same_text(ours, theirs)
    for name in ("scores", "logits"):
        a, b = (torch.stack(getattr(out, name)[:16]) for out in (ours, theirs))
        torch.testing.assert_close(a, b, atol=ATOL, rtol=ATOL)


def test_an_adapter_is_part_of_the_model() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(tiny("llama").config).eval()
    asked = prompts(RAGGED, 3) | {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}  # fmt: skip
    plain = base.generate(**asked)
    adapted = get_peft_model(base, config).eval()
    ours, _ = generate(Backbone(adapted), Policy((4,), LogitLens()), **asked)
    assert torch.equal(ours, adapted.generate(**asked))
    assert not torch.equal(ours, plain)


# ---------------------------------------------------------------- scoring


@torch.no_grad()
def forced(family: str, policy: Policy, asked: list[Request]) -> dict[tuple[int, int], tuple[int, bool]]:  # fmt: skip
    """Texts that scoring is given whole: layer and greedy flag by request and position."""
    one = scored_backbone(family)
    layout = Layout(64, False, None, 400.0, len(asked))
    (batch,) = [collate(some) for some in cut(plan(asked, layout).rows, len(asked))]
    if policy.rule is None:
        layers = np.full(len(batch.read_at), policy.stops[-1])
        greedy = score(one, batch, policy.decoder, policy.stops[-1]).greedy
    else:
        assert policy.lens is not None
        (trace,) = score_with_exits(one, [batch], policy.decoder, policy.lens, policy.rule, {})
        layers = trace.exit_layers[trace.decisions.member_of][trace.decisions.read_from]
        greedy = trace.answers.greedy
    positions = batch.scored_positions[batch.read_at].tolist()
    keys = zip(batch.requests.tolist(), positions, strict=True)
    return dict(zip(keys, zip(layers.tolist(), greedy, strict=True), strict=True))


@torch.no_grad()
def naive_answer(family: str, policy: Policy, ids: list[int], layer: int) -> torch.Tensor:
    """What the decoder says follows a sequence, from its state at a layer, (V,)."""
    one = scored_backbone(family)
    h = one.hidden_states(torch.tensor([ids]))[layer][:, -1]
    states = States(h, layer, torch.tensor(ids[-1:]), torch.tensor(ids[:1]), torch.tensor([len(ids) - 1]))  # fmt: skip
    return one.logits(policy.decoder.align(one, states))[0]


def agrees_with_scoring(family: str, policy: Policy, asked: dict[str, Any], happened: Generated) -> Counter[int]:  # fmt: skip
    """Every token and exit layer is what scoring says of the text; returns how many exited where."""
    width = asked["input_ids"].shape[1]
    seen: Counter[int] = Counter()
    texts = [
        Request(tuple(asked["input_ids"][row, width - length :].tolist()), tuple(new))
        for row, (length, new) in enumerate(zip(happened.prompt_lengths, happened.tokens, strict=True))
    ]  # fmt: skip
    scored = forced(family, policy, texts)
    for row, text in enumerate(texts):
        for i, layer in enumerate(happened.exit_layers[row]):
            ids = text.context + text.continuation[:i]
            expected, greedy = scored[row, len(ids) - 1]
            if layer != expected:  # allowed where a confidence lies at the threshold
                assert policy.rule is not None
                assert policy.lens is not None
                values = naive_entropy(lens_logits(Request(ids, (3,)), family, policy.lens)[:, -1])
                assert np.abs(values - policy.rule.threshold).min() < ATOL
            elif not greedy:
                assert top2_gap(naive_answer(family, policy, list(ids), layer)) < TIE
            seen[layer] += 1
    return seen


lengths = st.lists(st.integers(1, 8), min_size=1, max_size=2).map(tuple)


@given(
    st.sampled_from(SOME),
    lengths,
    st.integers(0, 10**6),
    st.floats(0.3, 4.2),
    st.sampled_from(["spade", "lens"]),
    st.integers(1, 4),
)
def test_tokens_and_exits_are_those_of_scoring(
    family: str, lengths: tuple[int, ...], seed: int, threshold: float, readout: str, new: int
) -> None:
    decoder = Spade() if readout == "spade" else Linear(maps(family))
    policy = exits(family, threshold, decoder)
    asked = prompts(lengths, seed)
    _, happened = run(family, policy, asked, new)
    agrees_with_scoring(family, policy, asked, happened)


@functools.cache
def thresholds(family: str) -> tuple[float, ...]:
    """Between the entropies that this lens shows on some text."""
    asked = prompts(RAGGED, 1)
    found: list[float] = []
    for ids, length in zip(asked["input_ids"].tolist(), RAGGED, strict=True):
        request = Request(tuple(ids[9 - length :]), (3,))
        found += naive_entropy(lens_logits(request, family, maps(family))).ravel().tolist()
    return tuple(midways(found, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_exits_as_in_scoring(family: str) -> None:
    seen: Counter[int] = Counter()
    asked = prompts(RAGGED, 1)
    for threshold in thresholds(family):
        policy = exits(family, threshold)
        _, happened = run(family, policy, asked, 4)
        seen += agrees_with_scoring(family, policy, asked, happened)
    assert len(seen) > 1, "the thresholds are to spread the exits"


@pytest.mark.parametrize("layer", [0, 2, 4])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_fixed_layer_is_that_of_scoring(family: str, layer: int) -> None:
    asked = prompts(RAGGED, 2)
    readers = [LogitLens(), Spade(), Spade(positions="keep"), Spade(start="none"), Linear(maps(family))]  # fmt: skip
    for decoder in readers:
        policy = Policy((layer,), decoder)
        _, happened = run(family, policy, asked, 6)
        assert agrees_with_scoring(family, policy, asked, happened) == {layer: 24}


# ---------------------------------------------------------------- no cache


@torch.no_grad()
def without_cache(family: str, policy: Policy, prompt: list[int], new: int) -> tuple[list[int], list[int]]:  # fmt: skip
    """The same policy, everything computed anew at every step; stops before a close call."""
    one, ids = scored_backbone(family), list(prompt)
    assert policy.rule is not None
    assert policy.lens is not None
    layers: list[int] = []
    for _ in range(new):
        states = one.hidden_states(torch.tensor([ids]))
        layer = 4
        for candidate in policy.stops[:-1]:
            logits = one.logits(policy.lens(states[candidate][:, -1], candidate))
            value = float(naive_entropy(logits.double().numpy())[0])
            if abs(value - policy.rule.threshold) < ATOL:
                return ids[len(prompt) :], layers
            if value <= policy.rule.threshold and len(ids) > 1:
                layer = candidate
                break
        logits = naive_answer(family, policy, ids, layer)
        if top2_gap(logits) < TIE:
            break
        ids.append(int(logits.argmax()))
        layers.append(layer)
    return ids[len(prompt) :], layers


@pytest.mark.parametrize("family", SOME)
def test_a_cache_changes_nothing(family: str) -> None:
    seen: Counter[int] = Counter()
    for threshold in thresholds(family):
        policy = exits(family, threshold)
        asked = prompts(RAGGED, 4)
        _, happened = run(family, policy, asked, 8)
        for row, length in enumerate(RAGGED):
            prompt = asked["input_ids"][row, 9 - length :].tolist()
            tokens, layers = without_cache(family, policy, prompt, 8)
            assert happened.tokens[row][: len(tokens)] == tokens
            assert happened.exit_layers[row][: len(layers)] == layers
            seen.update(layers)
    assert len(seen) > 1
    assert seen.total() > 40


# ---------------------------------------------------------------- caches


def held(sequences: Sequences, row: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that a layer, from 1, holds of a row's tokens: (heads, T, width)."""
    stop = int(np.searchsorted(sequences.policy.stops, layer))
    first, end = int(sequences._first[row]), int(sequences._ends[stop, row])
    keys, values = (c._data for c in sequences._keys._layers[layer - 1]._columns)
    if keys is None or values is None:
        return torch.zeros(0, 0, 0), torch.zeros(0, 0, 0)
    return keys[row, :, first:end], values[row, :, first:end]


@pytest.mark.parametrize("family", SOME)
@torch.no_grad()
def test_caches_hold_beginnings_and_one_deep_token_completes_them(family: str) -> None:
    one, missing = scored_backbone(family), 0
    for threshold in thresholds(family):
        policy = exits(family, threshold)
        asked = prompts(RAGGED, 6)
        ids = asked["input_ids"]
        sequences = Sequences(one, policy, np.array(RAGGED))
        for _ in range(8):
            chosen = sequences.step(ids).logits.argmax(-1)
            for row in range(4):
                cached = [held(sequences, row, layer)[0].shape[1] for layer in range(1, 5)]
                assert cached == sorted(cached, reverse=True)
                assert cached[0] == RAGGED[row] + ids.shape[1] - 9
                missing += cached[0] - cached[-1]
            ids = torch.cat([ids, chosen[:, None]], 1)
        sequences.policy = replace(policy, rule=rule(-1.0))
        sequences.step(ids)
        for row, length in enumerate(RAGGED):
            cache = transformers.DynamicCache()
            whole = ids[row : row + 1, 9 - length :]
            one.advance(one.embed(whole, cache=cache), 4)
            for layer in range(1, 5):
                keys, values = held(sequences, row, layer)
                torch.testing.assert_close(keys, cache.layers[layer - 1].keys[0], atol=ATOL, rtol=0)
                torch.testing.assert_close(values, cache.layers[layer - 1].values[0], atol=ATOL, rtol=0)  # fmt: skip
    assert missing > 20


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("family", ["llama", "mistral_sliding", "bloom"])
def test_a_batch_is_its_rows(family: str) -> None:
    asked = prompts(RAGGED, 7)
    for threshold in thresholds(family):
        policy = exits(family, threshold)
        _, together = run(family, policy, asked, 8)
        for row, length in enumerate(RAGGED):
            one = {"input_ids": asked["input_ids"][row : row + 1, 9 - length :]}
            _, alone = run(family, policy, one, 8)
            first = next(
                (i for i, pair in enumerate(zip(alone.tokens[0], together.tokens[row], strict=True)) if len({*pair}) > 1),
                8,
            )  # fmt: skip
            if first < 8:
                ids = one["input_ids"][0].tolist() + alone.tokens[0][:first]
                gap = top2_gap(naive_answer(family, policy, ids, alone.exit_layers[0][first]))
                assert gap < TIE
            assert alone.exit_layers[0][:first] == together.exit_layers[row][:first]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12))
def test_calls_share_what_costs_less_than_a_call(ends: list[int]) -> None:
    calls = _together(np.array(ends))
    assert sorted(row for call in calls for row in call.tolist()) == [*range(len(ends))]
    held = [sorted({ends[row] for row in call}) for call in calls]
    for call, inside in zip(calls, held, strict=True):
        assert call.tolist() == sorted(call.tolist())
        for end in inside:
            again = (end - inside[0]) * sum(ends[row] == end for row in call)
            assert again <= CALL, "computed again for more than a call costs"
    for one, other in itertools.combinations(held, 2):  # in order, and not needlessly apart
        assert one[-1] < other[0]
        assert (other[0] - one[0]) * ends.count(other[0]) > CALL


# ---------------------------------------------------------------- what transformers prepares


class Rows(transformers.StoppingCriteria):
    """Stops each row after so many new tokens."""

    def __init__(self, *new: int):
        self.ends = torch.tensor(new) + 9

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self.ends


class Heard:
    """A streamer."""

    def __init__(self) -> None:
        self.parts: list[torch.Tensor] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.parts.append(value if value.ndim == 2 else value[:, None])

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
        {"do_sample": True, "top_k": 5, "num_return_sequences": 2},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"suppress_tokens": [5, 6, 7], "min_new_tokens": 20},
    ],
    ids=["top_p", "top_k", "penalty", "suppress"],
)
def test_processors_and_the_sampler_are_those_of_transformers(arguments: dict[str, Any]) -> None:
    """With the same seed the same samples, also after rows have met EOS (many tokens are one)."""
    one = scored_backbone("llama")
    asked = prompts(RAGGED, 8) | arguments | {"max_new_tokens": 24, "eos_token_id": [*range(3, 13)], "pad_token_id": 0}  # fmt: skip
    torch.manual_seed(1)
    theirs = one.model.generate(**asked)
    torch.manual_seed(1)
    ours, happened = generate(one, Policy((4,), LogitLens()), **asked)
    assert torch.equal(ours, theirs)
    if "min_new_tokens" not in arguments:
        assert len({len(tokens) for tokens in happened.tokens}) > 1


def test_a_streamer_hears_the_prompts_and_every_token() -> None:
    heard = Heard()
    ids, _ = run("llama", exits("llama", 2.0), prompts(RAGGED, 9), 6, streamer=heard)
    assert torch.equal(torch.cat(heard.parts, 1), ids)
    assert (len(heard.parts), heard.ended) == (7, 1)


def test_stop_strings_need_only_the_tokenizer() -> None:
    from zoo import BYTES, byte_tokenizer

    one = Backbone(tiny("llama", vocab_size=BYTES))
    asked = {
        "input_ids": random_ids(2, 6, 3), "attention_mask": torch.ones(2, 6, dtype=torch.long),
        "do_sample": False, "max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    free, _ = generate(one, Policy((4,), LogitLens()), **asked)
    tokenizer = byte_tokenizer()
    stop = tokenizer.decode(free[0, 10:11])
    cut, happened = generate(
        one, Policy((4,), LogitLens()), **asked, tokenizer=tokenizer, stop_strings=[stop]
    )
    theirs = one.model.generate(**asked, tokenizer=tokenizer, stop_strings=[stop])
    assert torch.equal(cut, theirs)
    assert len(happened.tokens[0]) <= 5
    with pytest.raises(UserError, match=r"stop_strings=.*needs tokenizer="):
        generate(one, Policy((4,), LogitLens()), **asked, stop_strings=[stop])


# ---------------------------------------------------------------- cost


def watched(family: str) -> tuple[dict[int, int], list[Any]]:
    """Counts the tokens that each layer, from 1, sees, padding included."""
    seen = dict.fromkeys(range(1, 5), 0)

    def see(layer: int, out: Any) -> None:
        h = out[0] if isinstance(out, tuple) else out
        seen[layer] += h.shape[0] * h.shape[1]

    modules = scored_backbone(family)._layers
    return seen, [
        module.register_forward_hook(lambda _m, _a, out, n=n: see(n, out))
        for n, module in enumerate(modules, 1)
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_work_is_what_the_layers_saw(family: str) -> None:
    """A single row has no padding; the tail's tokens go through the same layers."""
    asked = {"input_ids": random_ids(1, 7, 11)}
    late = 0
    for threshold, interval in itertools.product(thresholds(family), (1, 2)):
        policy = exits(family, threshold, interval=interval)
        run(family, policy, asked, 12)  # the start token is known from here on
        seen, handles = watched(family)
        _, happened = run(family, policy, asked, 12)
        for handle in handles:
            handle.remove()
        work, layers = happened.work, happened.exit_layers[0]
        assert sum(seen.values()) == sum(
            int(part[0]) for part in (work.prompt, work.decode, work.backfilled, work.tail)
        )
        assert work.prompt[0] == 7 * layers[0]
        assert work.decode[0] == sum(layers[1:])
        assert work.tail[0] == sum(4 - layer for layer in layers)
        # Every token has climbed as far as the deepest after it.
        depths = [max(layers[i:]) for i in range(12)]
        assert work.prompt[0] + work.decode[0] + work.backfilled[0] == 7 * depths[0] + sum(depths[1:])  # fmt: skip
        # A check at each candidate that a token passed or left at.
        assert work.checks[0] == sum(stop <= layer for layer in layers for stop in policy.stops[:-1])  # fmt: skip
        late += int(work.backfilled[0])
    assert late > 0


@pytest.mark.parametrize("asked", [(7, 7, 7, 7), RAGGED], ids=["even", "ragged"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
@torch.no_grad()
def test_work_of_rows_that_share_calls_is_what_the_layers_saw(
    family: str, asked: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens that are computed again beside rows that lack more are work too; padding is not."""
    one, again = scored_backbone(family), 0
    advance = one.advance
    for threshold, seed in itertools.product(thresholds(family), (11, 12)):
        policy, given = exits(family, threshold), prompts(asked, seed)
        run(family, policy, given, 12)  # the start tokens are known from here on
        sequences = Sequences(one, policy, np.array(asked))
        padding = 0

        def watch(lane: Any, to: int, sequences: Sequences = sequences) -> Any:
            nonlocal padding
            span, first = sequences._keys.span, sequences._first
            rows = first if span.rows is None else first[span.rows.numpy()]
            if len(lane.h) == len(rows) and lane.h.shape[1] == span.end - span.begin:
                padding += int(np.maximum(rows - span.begin, 0).sum()) * (to - lane.depth)
            return advance(lane, to)

        monkeypatch.setattr(one, "advance", watch)
        seen, handles = watched(family)
        ids, needed = given["input_ids"], np.zeros(4, dtype=np.int64)
        depths: list[Any] = []
        for _ in range(12):
            step = sequences.step(ids)
            depths.append(step.layers)
            ids = torch.cat([ids, step.logits.argmax(-1)[:, None]], 1)
        for handle in handles:
            handle.remove()
        monkeypatch.undo()
        work = sequences.work
        main = work.prompt + work.decode + work.backfilled
        assert sum(seen.values()) == main.sum() + work.tail.sum() + padding
        # Without sharing every token climbs as far as the deepest after it, once.
        deepest = np.maximum.accumulate(np.array(depths)[::-1])[::-1]  # (12, B')
        needed = np.array(asked) * deepest[0] + deepest[1:].sum(0)
        assert (main >= needed).all()
        again += int((main - needed).sum())
    assert again > 0, "no row has joined another's call"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_check_that_answers_needs_no_head_again(family: str) -> None:
    """A lens that is also the decoder has given the answer; a copy of it is asked again."""
    head, lens, answered = scored_backbone(family).model.get_output_embeddings(), maps(family), 0
    for threshold in thresholds(family):
        found = []
        for decoder in (Linear(lens), Linear(copy.deepcopy(lens))):
            rows: list[int] = []
            handle = head.register_forward_hook(lambda _m, args, _o, rows=rows: rows.append(len(args[0])))  # fmt: skip
            output, happened = run(
                family, exits(family, threshold, decoder), prompts(RAGGED, 7), 8,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
            handle.remove()
            work = happened.work
            assert sum(rows) == work.checks.sum() + work.heads.sum()
            found.append((output, happened))
        (ours, one), (theirs, other) = found
        assert one.tokens == other.tokens
        assert one.exit_layers == other.exit_layers
        np.testing.assert_array_equal(one.confidence, other.confidence)
        torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), atol=1e-5, rtol=1e-5)  # fmt: skip
        assert other.work.heads.tolist() == [8] * 4
        assert one.work.heads.tolist() == [layers.count(4) for layers in one.exit_layers]
        answered += 32 - int(one.work.heads.sum())
    assert answered > 5


def test_no_layer_above_a_fixed_one_sees_the_prompt() -> None:
    seen, handles = watched("llama")
    _, happened = run("llama", Policy((2,), LogitLens()), prompts((9, 9), 3), 5)
    for handle in handles:
        handle.remove()
    assert seen == {1: 26, 2: 26, 3: 0, 4: 0}
    assert happened.work.prompt.tolist() == [18, 18]


def test_rows_that_have_finished_cost_nothing() -> None:
    asked = prompts((9, 9, 9), 12)
    criteria = transformers.StoppingCriteriaList([Rows(2, 10, 4)])
    for threshold in thresholds("llama"):
        policy = exits("llama", threshold)
        seen, handles = watched("llama")
        ids, happened = run("llama", policy, asked, 20, stopping_criteria=criteria)
        for handle in handles:
            handle.remove()
        assert [len(tokens) for tokens in happened.tokens] == [2, 10, 4]
        assert ids.shape == (3, 19)
        assert not ids[0, 11:].any()
        assert seen[1] - 27 - 13 <= 3  # prompts, then 1 + 9 + 3 tokens; start tokens perhaps
        for row, new in enumerate((2, 10, 4)):
            _, alone = run("llama", policy, {"input_ids": asked["input_ids"][row : row + 1]}, new)
            assert alone.tokens[0] == happened.tokens[row]
            for name in ("prompt", "decode", "tail", "checks", "heads"):
                assert getattr(alone.work, name)[0] == getattr(happened.work, name)[row]
            # Beside others a row may be computed again, so that they share a call.
            assert alone.work.backfilled[0] <= happened.work.backfilled[row]


def test_thresholds_that_nothing_meets_make_no_check() -> None:
    _, happened = run("llama", exits("llama", -1.0), prompts(RAGGED, 3), 5)
    assert not happened.work.checks.any()
    assert not happened.work.tail.any()
    everywhere = {layer for layers in happened.exit_layers for layer in layers}
    assert everywhere == {4}
    _, happened = run("llama", exits("llama", float("inf")), prompts(RAGGED[:3], 3), 5)
    assert {layer for layers in happened.exit_layers for layer in layers} == {1}


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 4}, "num_beams=4"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6"),
        ({"assistant_model": torch.nn.Linear(1, 1)}, "assistant_model=Linear"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
        ({"past_key_values": transformers.DynamicCache()}, "past_key_values=DynamicCache"),
        ({"inputs_embeds": torch.zeros(1, 2, 32)}, "inputs_embeds=Tensor"),
        ({"output_hidden_states": True}, "output_hidden_states=True"),
        ({"generation_config": transformers.GenerationConfig(num_beams=2, max_new_tokens=3)}, "num_beams=2"),
    ],
)  # fmt: skip
def test_what_the_loop_does_not_do_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run("llama", exits("llama", 2.0), prompts((3,)), 4, **arguments)


def test_prompts_that_cannot_be_continued_are_named() -> None:
    policy = exits("llama", 2.0)
    empty = {"input_ids": random_ids(2, 3), "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}
    with pytest.raises(UserError, match="Prompt 1 is empty"):
        run("llama", policy, empty, 4)
    with pytest.raises(UserError, match="Prompt 0 is empty"):
        run("llama", policy, {"input_ids": torch.zeros(1, 0, dtype=torch.long)}, 4)
    right = {"input_ids": random_ids(2, 3), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    with pytest.raises(UserError, match=r"prompt 1 has padding behind its tokens.*padding_side"):
        run("llama", policy, right, 4)
    with pytest.raises(UserError, match=r"60 tokens and up to 5 are to follow.*takes 64"):
        generate(
            scored_backbone("llama"), policy, 64, input_ids=random_ids(1, 60), max_new_tokens=5
        )
    generate(scored_backbone("llama"), policy, 64, input_ids=random_ids(1, 59), max_new_tokens=5)
    with pytest.raises(ValueError, match="max_new_tokens"):
        run("llama", policy, prompts((3,)), 0)


def test_generated_text_has_no_choices() -> None:
    with pytest.raises(UserError, match="choice_entropy needs answer choices"):
        exits("llama", 1.0, confidence="choice_entropy", exit_scope="context")


class Broken(torch.nn.Module):
    """A layer that attends to the tokens at hand and forgets the cache."""

    def __init__(self, layer: torch.nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("cache")
        if cache is not None and cache.get_seq_length() > 1:
            kwargs |= {"cache": None, "attention_mask": None}
        return self.layer(*args, **kwargs)


def test_a_model_that_cannot_be_filled_in_late_is_refused_for_generation_only() -> None:
    config = tiny("llama").config
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.model.layers[2] = Broken(model.model.layers[2])
    one = Backbone(model)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM cannot generate with exits"):
        check(one)
    one._cache_name = None
    with pytest.raises(UnsupportedModelError, match="keeps no key/value cache"):
        check(one)
