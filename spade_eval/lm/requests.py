"""What lm-eval's requests tell: their tasks, where they come from, and how answers begin."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from spade_eval.tally import Source

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

log = logging.getLogger(__name__)

TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]
"""As HFLM has it: the texts of context and continuation, if known, and their token ids."""


def source_of(instances: Sequence[Any]) -> Source:
    """The tasks of lm-eval's instances.

    A rank with fewer instances than the others is given its last one again, beyond the number of
    its repeats, which does not count.
    """
    seen: Counter[int] = Counter()
    counted = np.zeros(len(instances), dtype=bool)
    for index, instance in enumerate(instances):
        counted[index] = seen[id(instance)] < (instance.repeats or 1)
        seen[id(instance)] += 1
    return Source([str(instance.task_name) for instance in instances], counted)


def place(request: Any) -> str:
    """Where a request comes from, for messages."""
    return f"task {request.task_name}, document {request.doc_id}"


def first_tokens(
    requests: Sequence[TokenRequest], instances: Sequence[Any] = ()
) -> dict[int, list[int]]:
    """For each request the first tokens of its context's continuations, each once, ascending.

    They are those of one document of one task: another one may give the same context other choices,
    as TruthfulQA's two tasks do.

    Args:
        requests: The requests.
        instances: lm-eval's instances behind them, if known.
    """
    unknown: list[Hashable] = [None] * len(requests)
    asked_by = [(str(i.task_name), i.doc_id) for i in instances] or unknown
    keys = [(who, tuple(c)) for who, (_, c, _) in zip(asked_by, requests, strict=True)]
    first: dict[Hashable, set[int]] = {}
    for key, (_, _, continuation) in zip(keys, requests, strict=True):
        first.setdefault(key, set()).add(continuation[0])
    return {index: sorted(first[key]) for index, key in enumerate(keys)}


def warn_of_single_choices(choices: Mapping[int, Sequence[int]]) -> None:
    """Say so where `choice_entropy` finds one choice alone.

    Args:
        choices: What `first_tokens` finds.
    """
    alone = sum(len(own) == 1 for own in choices.values())
    if alone > len(choices) / 2:
        log.warning(
            "%d of %d requests have a context with one answer, or with answers that begin alike: "
            "choice_entropy is 0 there, and exits at the first candidate. Use confidence=entropy.",
            alone, len(choices),
        )  # fmt: skip


def warn_of_shared_beginnings(requests: Sequence[TokenRequest]) -> None:
    """Say so where one decision per context looks at a token that all its answers share.

    Chat templates end in a newline, which lm-eval moves to the answers.
    """
    answers: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for _, context, continuation in requests:
        answers.setdefault(tuple(context), set()).add(tuple(continuation[:2]))
    several = [own for own in answers.values() if len(own) > 1]
    alike = sum(len({answer[0] for answer in own}) == 1 for own in several)
    if alike > len(several) / 2:
        log.warning(
            "All answers of %d of %d contexts begin with one token, as behind a chat template: "
            "exit_scope=context decides before they differ. Use exit_scope=request, or token.",
            alike, len(several),
        )  # fmt: skip
