"""Texts that are encoded in blocks get the tokens that they get alone, with every tokenizer."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from test_lm import build, instances, task_pairs
from tokenizers import processors
from transformers import PreTrainedTokenizerFast
from zoo import byte_tokenizer

from spade_eval.lm import ahead
from spade_eval.lm.ahead import Ahead, encodes_alike, texts_of
from spade_eval.lm.layer import SpadeLayerLM


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


def test_what_is_encoded_is_what_lm_eval_asks_for_and_when() -> None:
    pairs = [("a b", " c"), ("a \n", "b"), ("", "x"), ("  ", "y")]
    lm, asked = build(HFLM), []
    encode = lm.tok_encode
    lm.tok_encode = lambda text, **special: asked.append((text, special)) or encode(text, **special)
    lm.loglikelihood(instances([*pairs[:3], ("z", "y")]))
    assert [text for text, special in asked if not special] == [*texts_of([*pairs[:3], ("z", "y")])]
    assert [*texts_of(pairs)] == ["a b c", "a b", "a \nb", "a", "  y", ""]


class Counted:
    """A tokenizer that counts its calls and the texts in them."""

    def __init__(self, inner: Any):
        self.inner, self.sizes = inner, []

    def __call__(self, texts: list[str], **special: bool) -> Any:
        self.sizes.append(len(texts))
        return self.inner(texts, **special)


def test_blocks_are_bounded_in_texts_and_in_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "BLOCK", 5)
    monkeypatch.setattr(ahead, "CHARACTERS", 40)
    own = byte_tokenizer()
    short, long = [f"s{i}" for i in range(12)], [f"{i}" * 25 for i in range(4)]
    counted = Counted(own)
    found = Ahead([*short, *long], counted, own.encode, "<bos>")
    assert [found.get(text) for text in [*short, *long]] == [own.encode(t) for t in [*short, *long]]
    # Before each block one text shows how special tokens are treated.
    assert [size for size in counted.sizes if size > 1] == [5, 5, 4, 2]


@given(choices=st.integers(1, 6), block=st.integers(7, 12), questions=st.integers(1, 40))
def test_questions_with_choices_are_encoded_in_blocks_to_the_end(
    choices: int, block: int, questions: int
) -> None:
    """A block may end just before a context that it holds already, asked with its next choice."""
    own = byte_tokenizer()
    alone = []
    pairs = [(f"question {q}", f" {c}") for q in range(questions) for c in range(choices)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "BLOCK", block)
        texts = list(texts_of(pairs))
        found = Ahead(texts, own, lambda text: alone.append(text) or own.encode(text), "<bos>")
        for text in texts:
            assert found.get(text) == own.encode(text)
    assert len(alone) <= -(-len(set(texts)) // block) + 1  # one at the head of each block


@pytest.mark.parametrize(
    ("threads", "sizes"), [(1, [100]), (3, [34, 34, 32]), (64, [16] * 6 + [4])]
)
def test_threads_share_a_block_and_keep_its_order(
    threads: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    own = byte_tokenizer()
    counted = Counted(own)
    texts = [f"text {i}" for i in range(100)]
    found = Ahead(texts, counted, own.encode, "<bos>")
    assert [found.get(text) for text in texts] == [own.encode(text) for text in texts]
    assert sorted(counted.sizes) == sorted([1, *sizes])


def test_other_texts_leave_the_blocks_where_they_are() -> None:
    own = byte_tokenizer()
    counted = Counted(own)
    texts = [f"t{i}" for i in range(9)]
    found = Ahead(texts, counted, own.encode, "<bos>")
    for text in texts:
        assert found.get("other" + text) == own.encode("other" + text)
        assert found.get(text) == own.encode(text)
    assert counted.sizes == [1, 9]


def test_special_tokens_of_an_unknown_kind_are_added_one_by_one() -> None:
    own = byte_tokenizer()
    found = Ahead(["a", "b"], own, lambda text: [7, *own.encode(text)], "<bos>")
    assert [found.get("a"), found.get("b")] == [[7, *own.encode("a")], [7, *own.encode("b")]]


class Infills(PreTrainedTokenizerFast):
    """Treats a text that it is given alone in its own way, as CodeLlama's tokenizer does."""

    def _encode_plus(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(text, str):
            text = text.replace("?", "<eos>")
        return super()._encode_plus(text, *args, **kwargs)


def test_a_tokenizer_with_a_way_of_its_own_encodes_each_text_alone() -> None:
    assert encodes_alike(byte_tokenizer())
    own = Infills(tokenizer_object=byte_tokenizer()._tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")  # fmt: skip
    assert not encodes_alike(own)
    lm = build(SpadeLayerLM, layer=2, tokenizer=own)
    asked = instances([("why", "a"), ("why?", "b")])
    alone = [lm._encode_pair(*request.args) for request in asked]
    assert own.eos_token_id in alone[1][0]
    with lm._encoding_ahead(request.args for request in asked):
        assert [lm._encode_pair(*request.args) for request in asked] == alone


def test_blocks_end_with_the_call_whatever_happens() -> None:
    lm = build(SpadeLayerLM, layer=2)
    with pytest.raises(KeyboardInterrupt), lm._encoding_ahead([("a", "b")]):
        assert lm._ahead is not None
        raise KeyboardInterrupt
    assert lm._ahead is None
