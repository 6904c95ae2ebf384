"""WikiText pages as text: undo the tokenisation of the files, count words and bytes.

The rules and their order are those of the harness's own `wikitext` task, so that perplexities can
be compared with published ones. They were made for WikiText's files and damage ordinary prose.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Each (pattern, replacement) is applied to the whole page, in this order.
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"s '", r"s'"),
        *((rf" @\{mark}@ ", mark) for mark in "-,."),  # "1 @,@ 000", "well @-@ known"
        *((rf" \{mark} ", f"{mark} ") for mark in ":;.!?,"),
        # the inside of brackets and quotes, freed of the blanks at its ends
        (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
        (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
        (r"{\s*([^}]*?)\s*}", r"{\1}"),
        (r'"\s*([^"]*?)\s*"', r'"\1"'),
        (r"'\s*([^']*?)\s*'", r"'\1'"),
        # headings
        (r"= = = =", "===="),
        (r"= = =", "==="),
        (r"= =", "=="),
        (r" ° ", "°"),
        (r" \n", "\n"),
        (r"\n ", "\n"),
        (r" N ", " 1 "),
        (r" 's", "'s"),
    )
]


def detokenize(doc: Mapping[str, Any]) -> str:
    """Turn the page of a row into ordinary text.

    Args:
        doc: A row with the column `page`.

    Returns:
        The text to score.
    """
    text: str = doc["page"]
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text


def perplexities(doc: Mapping[str, Any], results: Sequence[float]) -> dict[str, tuple[float, int]]:
    """Relate the log-likelihood of a page to its length.

    Args:
        doc: A row with the column `page`.
        results: The log-likelihood of the detokenised page, the only element.

    Returns:
        For each metric the log-likelihood and its weight: the words or bytes of the page as it
        stands in the file, before `detokenize`, which is how WikiText perplexities are defined.
    """
    (loglikelihood,) = results
    words = len(re.split(r"\s+", doc["page"]))
    octets = len(doc["page"].encode())
    return {
        "word_perplexity": (loglikelihood, words),
        "byte_perplexity": (loglikelihood, octets),
        "bits_per_byte": (loglikelihood, octets),
    }
