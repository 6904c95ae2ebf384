"""Texts become token ids in blocks, ahead of their use.

A fast tokenizer encodes the texts of a block on all of torch's threads, and the cost of a call is
the block's. One text after another, tokenising short questions takes longer than a GPU takes to
score them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

BLOCK = 512  # texts at once, at most; the last two blocks are kept
LEAST = 16  # texts that a thread takes
CHARACTERS = 2**20  # of a block, at most, give or take one text: a token takes a few dozen bytes
SPECIAL: tuple[dict[str, bool], ...] = (
    {},
    {"add_special_tokens": True},
    {"add_special_tokens": False},
)
ENCODERS = ("__call__", "encode", "_encode_plus")


def encodes_alike(tokenizer: Any) -> bool:
    """Whether a tokenizer is a fast one that encodes many texts as it does each alone.

    One that has a way of its own may treat a single text otherwise, as CodeLlama's does.
    """
    plain = PreTrainedTokenizerFast
    return bool(getattr(tokenizer, "is_fast", False)) and all(
        getattr(type(tokenizer), name, None) is getattr(plain, name) for name in ENCODERS
    )


def texts_of(pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    """What lm-eval encodes of (context, continuation), in its order: both together, the context.

    It moves a context's trailing blanks to the continuation. A continuation of no context it
    encodes without special tokens; that is left to it.
    """
    for context, continuation in pairs:
        if context:
            yield context + continuation
            yield context.rstrip()


class Ahead:
    """Token ids of texts that are asked for in this order; others are encoded alone.

    Args:
        texts: All of them.
        tokenizer: Of `transformers`; see `encodes_alike`.
        one: What encodes one text. How it treats special tokens is its own business: it shows it on
            the first text of a block that begins with `bos`, and on the first that does not.
        bos: The text of the token that begins sequences.
    """

    def __init__(
        self, texts: Iterable[str], tokenizer: Any, one: Callable[[str], list[int]], bos: str
    ):
        self._texts = iter(texts)
        self._next = next(self._texts, None)
        self._tokenizer = tokenizer
        self._one = one
        self._bos = bos
        self._last: dict[str, list[int]] = {}
        self._known: dict[str, list[int]] = {}

    def get(self, text: str) -> list[int]:
        """The token ids of a text."""
        for block in (self._known, self._last):
            if text in block:
                return block[text]
        if text != self._next:
            return self._one(text)
        self._last, self._known = self._known, self._encode(self._block())
        return self._known[text]

    def _block(self) -> list[str]:
        """The next texts, each once; what comes after them is in none of the kept blocks."""
        block: dict[str, None] = {}
        characters = 0
        while self._next is not None:
            if self._next not in block and self._next not in self._known:
                if len(block) == BLOCK or characters >= CHARACTERS:
                    break
                block[self._next] = None
                characters += len(self._next)
            self._next = next(self._texts, None)
        return list(block)

    def _encode(self, block: list[str]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for begins in (True, False):
            alike = [text for text in block if text.startswith(self._bos) == begins]
            if alike:
                found |= zip(alike, self._encode_alike(alike), strict=True)
        return found

    def _encode_alike(self, texts: list[str]) -> list[list[int]]:
        first = self._one(texts[0])
        for special in SPECIAL:
            if self._tokenizer(texts[:1], **special)["input_ids"] == [first]:
                return self._together(texts, special)
        return [first, *map(self._one, texts[1:])]

    def _together(self, texts: list[str], special: dict[str, bool]) -> list[list[int]]:
        # The tokenizer's own threads are switched off by `lm_eval` (TOKENIZERS_PARALLELISM=false);
        # in ours it lets go of Python's lock.
        size = max(LEAST, -(-len(texts) // torch.get_num_threads()))
        parts = [texts[i : i + size] for i in range(0, len(texts), size)]
        with ThreadPoolExecutor(len(parts)) as threads:
            found = threads.map(lambda part: self._tokenizer(part, **special)["input_ids"], parts)
            return [ids for part in found for ids in part]
