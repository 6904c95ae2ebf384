"""Validation questions: rows of tasks with all their requests, scored as lm-eval scores them.

    tasks -> rows of a split -> questions -> log-likelihoods -> the task's own accuracy

By default it is the validation split; a task without one gives a part of its training rows instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import sem

from spade_eval.errors import UserError
from spade_eval.fit import documents, rows
from spade_eval.splits import Split

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from spade_eval.lm.base import SpadeLM

HELD_OUT = 1 / 10  # of a task's training rows, where it has no validation split


@dataclass(frozen=True)
class Question:
    """A row of a task, and the requests that lm-eval scores it by.

    Attributes:
        task: Name of the task.
        requests: Token ids of contexts and continuations.
        answer: Token ids of the right answer's request, as one sequence.
        accuracy: From (log-likelihood, greedy) of each request to the row's accuracy, 0 or 1.
    """

    task: str
    requests: tuple[documents.TokenPair, ...]
    answer: tuple[int, ...]
    accuracy: Callable[[Sequence[tuple[float, bool]]], float]


@dataclass(frozen=True)
class Accuracy:
    """Mean accuracy over n questions, and its standard error as lm-eval has it (None for one)."""

    mean: float
    stderr: float | None
    n: int


def validation(
    lm: SpadeLM, tasks: dict[str, Any], split: str = "validation", *, seed: int, most: int
) -> list[Question]:
    """Questions to choose an adapter by, from each task in turn.

    Args:
        lm: The model that will read them.
        tasks: By name, see `documents.load_tasks`.
        split: Whose rows are asked, see `spade_eval.splits.Split`. Of training rows, and of these
            where a task has no validation split at all, it is a tenth.
        seed: Decides about the order.
        most: Number of questions, over all tasks.

    Raises:
        UserError: A task that cannot be trained on, or not be scored by accuracy, or lacks the
            split.
    """
    streams = []
    for name, task in tasks.items():
        _check(name, task)
        part = split if split != "validation" or task.has_validation_docs() else "train"
        found = rows.rows_of(name, task, part)
        order = rows.shuffled(name, len(found), seed)
        if Split.parse(part).name == "train":
            order = order[: max(1, int(len(order) * HELD_OUT))]
        streams.append(rows.usable(name, found, order, partial(_question, lm, name, task)))
    return [question for _, question in documents.take(streams, most)]


def score(lm: SpadeLM, questions: Sequence[Question]) -> list[float]:
    """The accuracy of each question, all of them scored in one pass by lm-eval's own rule."""
    requests = [(None, *pair) for question in questions for pair in question.requests]
    results = iter(lm._loglikelihood_tokens(requests, disable_tqdm=True))
    return [q.accuracy([next(results) for _ in q.requests]) for q in questions]


def accuracies(questions: Sequence[Question], scores: Sequence[float]) -> dict[str, Accuracy]:
    """Accuracy by task, and under "all" over the questions of all tasks."""
    by_task: dict[str, list[float]] = {}
    for question, value in zip(questions, scores, strict=True):
        by_task.setdefault(question.task, []).append(value)
    return {name: _mean(values) for name, values in (*by_task.items(), ("all", list(scores)))}


def _mean(values: Sequence[float]) -> Accuracy:
    stderr = float(sem(values)) if len(values) > 1 else None
    return Accuracy(float(np.mean(values)), stderr, len(values))


def _check(name: str, task: Any) -> None:
    """Refuse a task that has no right answers to learn, or no accuracy to validate by."""
    if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
        raise UserError(
            f"task {name} is of type {task.OUTPUT_TYPE}: finetune trains on tasks whose answers "
            "are given and scored (multiple_choice, loglikelihood). Leave it out."
        )
    if not task.has_training_docs():
        raise UserError(
            f"task {name} has no training split to take documents from. Leave it out, or write a "
            "task of your own with one (--include_path)."
        )


def _question(lm: SpadeLM, name: str, task: Any, row: Any) -> Question:
    """The requests of a row."""
    [(context, answer)] = documents.right_answer(lm, task, row)
    prefix = task.doc_to_prefix(row)
    asked = task.fewshot_context(row, num_fewshot=0, gen_prefix=prefix)
    requests = task.construct_requests(row, asked)
    requests = requests if isinstance(requests, list) else [requests]

    def accuracy(results: Sequence[tuple[float, bool]]) -> float:
        metrics = task.process_results(row, list(results))
        if "acc" not in metrics:
            raise UserError(f"task {name} has no metric acc, which finetune validates by")
        return float(metrics["acc"])

    pairs = tuple(documents.token_pair(lm, *request.args) for request in requests)
    accuracy([(0.0, False)] * len(pairs))  # a task without accuracy is told before the training
    return Question(name, pairs, (*context, *answer), accuracy)
