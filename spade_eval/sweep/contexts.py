"""Hidden states where contexts end: what the report's figure of the space of answers is made of.

One row per document of a multiple-choice task, at every layer, with the number of the right answer.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

from spade_eval.decisions import decide

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from spade_eval.batching import Batch, Ints

LARGEST = float(np.finfo(np.float16).max)


def context_ends(batch: Batch) -> Ints:
    """Scored positions at which contexts end, (K,)."""
    return decide(batch, "context").check_at


def by_document(
    batch: Batch, states: NDArray[np.float16], instances: Sequence[Any]
) -> dict[int, NDArray[np.float16]]:
    """Give each document the states where its context ends; any, if its choices are contexts.

    Args:
        batch: A batch with contexts that end at K positions.
        states: Of these positions, (L+1, K, d).
        instances: lm-eval's instance behind each request.
    """
    who = decide(batch, "context")
    found: dict[int, NDArray[np.float16]] = {}
    for k, request in enumerate(who.requests[who.check_of].tolist()):
        found.setdefault(instances[request].doc_id, states[:, k])
    return found


def right_answers(task: Any, instances: Iterable[Any]) -> dict[int, tuple[int, str]]:
    """Number and text of each document's right answer; documents with several have none."""
    found: dict[int, tuple[int, str]] = {}
    for number, doc in {instance.doc_id: instance.doc for instance in instances}.items():
        target, choices = task.doc_to_target(doc), task.doc_to_choice(doc)
        if isinstance(target, str):
            target = choices.index(target) if target in choices else None
        if isinstance(target, int) and 0 <= target < len(choices):
            found[number] = int(target), str(choices[target]).strip()
    return found


def write(
    path: Path, states: Mapping[int, NDArray[np.float16]], answers: Mapping[int, tuple[int, str]]
) -> None:
    """Write `states` (L+1, N, d), fp16, and `labels` (N,), in the order of the documents.

    The labels' names are the answers' texts, if each number has one of its own, the same in all of
    its documents; they stand in the file's metadata under `answers`, as JSON.
    """
    documents = sorted(states.keys() & answers.keys())
    if not documents:
        return
    right = [answers[d] for d in documents]
    labels = np.array([number for number, _ in right], dtype=np.int64)
    names = dict(right)
    often = min(Counter(labels.tolist()).values()) > 1  # one alone would always agree with itself
    named = often and len(set(right)) == len(names) == len(set(names.values()))
    save_file(
        {"states": np.stack([states[d] for d in documents], axis=1), "labels": labels},
        path,
        {"answers": json.dumps(names)} if named else None,
    )
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors keeps files to their owner
