"""Whole texts as lm-eval scores them: in disjoint windows, each token once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM


def token_windows(lm: HFLM, text: str) -> list[tuple[list[int], list[int]]]:
    """Context and continuation of each window of at most `lm.max_length` tokens; none of no text.

    The first token follows the prefix token, each further window the last token before it.
    """
    rolling = get_rolling_token_windows(
        token_list=lm.tok_encode(text),
        prefix_token=lm.prefix_token_id,
        max_seq_len=lm.max_length,
        context_len=1,
    )
    return [make_disjoint_window(pair) for pair in rolling]
