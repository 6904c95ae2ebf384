"""Texts that are encoded in blocks get the tokens that they get alone, with every tokenizer."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from test_lm import build, instances, task_pairs
from tokenizers import processors
from zoo import byte_tokenizer

from spade_eval.lm import ahead
from spade_eval.lm.ahead import Ahead, texts_of
from spade_eval.lm.layer import SpadeLayerLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@functools.cache
def tokenizer(adds_bos: bool) -> PreTrainedTokenizerFast:
    """Of its own; one kind puts <bos> before every text, as Llama's does."""
    found = byte_tokenizer.__wrapped__()
    if adds_bos:
        found._tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", found.bos_token_id)]
        )
    return found


@functools.cache
def hf(adds_bos: bool, add_bos_token: bool | None) -> Any:
    return build(HFLM, tokenizer=tokenizer(adds_bos), add_bos_token=add_bos_token)


TEXTS = st.lists(st.sampled_from(["", "a", "ab ", "<bos>", "<bos>a", "é\n", "<eos>x", " b", "<bos> c"]) | st.text(max_size=4))  # fmt: skip


@given(
    texts=TEXTS,
    asked=TEXTS,
    adds_bos=st.booleans(),
    add_bos_token=st.sampled_from([None, True, False]),
    block=st.integers(1, 4),
)
def test_tokens_are_those_of_one_text_alone(
    texts: list[str], asked: list[str], adds_bos: bool, add_bos_token: bool | None, block: int
) -> None:
    """Whatever is asked for, in whatever order."""
    lm = hf(adds_bos, add_bos_token)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "BLOCK", block)
        found = Ahead(texts, lm.tokenizer, lm.tok_encode, "<bos>")
        for text in texts + asked:
            assert found.get(text) == lm.tok_encode(text), text


@pytest.mark.parametrize("add_bos_token", [None, True, False])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_requests_get_the_tokens_of_hflm(
    adds_bos: bool, add_bos_token: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In few calls, and with the blanks where HFLM puts them."""
    pairs = [*task_pairs(), ("<bos>Q", " a"), ("   ", "b"), ("q \n", "c"), ("<bos>Q", " d")]
    own = tokenizer(adds_bos)
    calls = []
    encode = type(own)._encode_plus

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return encode(*args, **kwargs)

    def tokens(cls: Any, **arguments: Any) -> list[tuple[list[int], list[int]]]:
        lm = build(cls, tokenizer=own, add_bos_token=add_bos_token, **arguments)
        seen: list[Any] = []

        def keep(requests: list[Any], **_: Any) -> list[Any]:
            seen.extend((context, continuation) for _, context, continuation in requests)
            return [(0.0, False)] * len(requests)

        monkeypatch.setattr(lm, "_loglikelihood_tokens", keep)
        lm.loglikelihood(instances(pairs))
        return seen

    theirs = tokens(HFLM)
    monkeypatch.setattr(type(own), "_encode_plus", counted)
    ours = tokens(SpadeLayerLM, layer=2)
    assert len(calls) < len(pairs) / 3
    bos = own.bos_token_id
    for pair, (context, continuation), found in zip(pairs, theirs, ours, strict=True):
        if pair[0] == "   " and not context:  # HFLM leaves it empty
            context = [bos]
        if add_bos_token and context[0] != bos:  # many tokenizers ignore it
            context = [bos, *context]
        assert found == (context, continuation), pair


def test_what_is_encoded_is_what_lm_eval_asks_for() -> None:
    assert [*texts_of([("a b", " c"), ("a \n", "b"), ("", "x")])] == [
        "a b", "a b c", "a", "a \nb", "", "x",
    ]  # fmt: skip
