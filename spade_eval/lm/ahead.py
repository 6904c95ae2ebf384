"""Texts become token ids in blocks, ahead of their use.

A fast tokenizer encodes the texts of a block on all cores, and the overhead of a call falls on the
block: one text after another, short questions take a GPU longer to tokenise than to score.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

BLOCK = 512  # texts; two blocks are kept
SPECIAL: tuple[dict[str, bool], ...] = (
    {},
    {"add_special_tokens": True},
    {"add_special_tokens": False},
)


def texts_of(pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    """What lm-eval encodes of (context, continuation): the context and both together.

    It moves a context's trailing blanks to the continuation.
    """
    for context, continuation in pairs:
        yield context.rstrip()
        yield context + continuation


class Ahead:
    """Token ids of texts that will be asked for in about this order.

    Args:
        texts: All of them.
        tokenizer: A tokenizer of `transformers`.
        one: What encodes one text. How it treats special tokens is its own business: it shows it on
            the first text of a block that begins with `bos`, and on the first that does not.
        bos: The text of the token that begins sequences.
    """

    def __init__(
        self, texts: Iterable[str], tokenizer: Any, one: Callable[[str], list[int]], bos: str
    ):
        self._texts = iter(texts)
        self._tokenizer = tokenizer
        self._one = one
        self._bos = bos
        self._last: dict[str, list[int]] = {}
        self._known: dict[str, list[int]] = {}

    def get(self, text: str) -> list[int]:
        """The token ids of a text."""
        while text not in self._known and text not in self._last:
            block = list(dict.fromkeys(islice(self._texts, BLOCK)))
            if not block:
                return self._one(text)
            self._last, self._known = self._known, self._encode(block)
        return self._known[text] if text in self._known else self._last[text]

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
                return self._tokenizer(texts, **special)["input_ids"]
        return [first, *map(self._one, texts[1:])]
