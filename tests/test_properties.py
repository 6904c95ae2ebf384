"""Identities that hold for any requests: scores belong to a request, not to its neighbours."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_decoders import naive_tail
from zoo import VOCAB, tiny

from spade_eval.backbone import Backbone
from spade_eval.batching import collate, cut
from spade_eval.decoders import Decoder, LogitLens, Spade
from spade_eval.lm.windows import window
from spade_eval.scoring import Layout, Request, plan
from spade_eval.trace import score

tokens = st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=9).map(tuple)
shared = st.sampled_from([(5, 6, 7, 8, 9, 10), (5, 6, 7), (11,)])  # so that contexts are shared
contexts = st.one_of(shared, st.tuples(shared, tokens).map(lambda pair: pair[0] + pair[1]), tokens)
requests = st.lists(st.builds(Request, contexts, tokens), min_size=1, max_size=7)
decoders = st.sampled_from([LogitLens(), Spade(), Spade(positions="keep"), Spade(start="none")])
families = st.sampled_from(["llama", "gemma3", "gpt2", "mistral_sliding", "cohere2", "qwen3_5"])


@functools.cache
def backbone(family: str) -> Backbone:
    return Backbone(tiny(family))


@torch.no_grad()
def scores(
    asked: list[Request], family: str, decoder: Decoder, layer: int, packed: bool, batch_size: int
) -> list[float]:
    config = backbone(family).model.config
    layout = Layout(
        32,
        packed and backbone(family).packs,
        window(config),
        crossover=200.0,
        batch_size=batch_size,
    )
    sums = [0.0] * len(asked)
    for rows in cut(plan(asked, layout).rows, batch_size):
        batch = collate(rows)
        answers = score(backbone(family), batch, decoder, layer)
        for request, value in zip(batch.requests.tolist(), answers.logprobs, strict=True):
            sums[request] += value
    return sums


@given(requests, families, decoders, st.integers(0, 4), st.booleans(), st.integers(1, 9))
def test_scores_depend_on_nothing_but_the_request(
    asked: list[Request], family: str, decoder: Decoder, layer: int, packed: bool, batch_size: int
) -> None:
    together = scores(asked, family, decoder, layer, packed, batch_size)
    alone = [scores([request], family, decoder, layer, False, 1)[0] for request in asked]
    assert together == pytest.approx(alone, abs=1e-4, rel=1e-5)


@given(st.builds(Request, contexts, tokens), families, st.integers(0, 4), st.booleans())
@torch.no_grad()
def test_scores_are_those_of_the_naive_loop(
    request: Request, family: str, layer: int, keep: bool
) -> None:
    """The model on the whole sequence, and for each answer token two tokens through the upper layers."""
    model = backbone(family).model
    ids = torch.tensor([request.context + request.continuation])
    states = backbone(family).hidden_states(ids[:, :-1])
    logits = model(ids[:, :-1], use_cache=False).logits[0]
    expected = 0.0
    for at in range(len(request.context) - 1, ids.shape[1] - 1):
        if at == 0 or layer == len(states) - 1:
            found = logits[at]
        else:
            found = naive_tail(model, states, 0, at, layer, ids, [0, at if keep else 1], True)
        expected += found.log_softmax(-1)[ids[0, at + 1]].item()
    decoder = Spade(positions="keep" if keep else "reset")
    ours = scores([request], family, decoder, layer, True, 4)
    assert ours == pytest.approx([expected], abs=1e-4, rel=1e-5)
