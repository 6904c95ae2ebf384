"""The rows of a task: of which split, in which order, and which of them can be used."""

from __future__ import annotations

import json
import logging
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from lm_eval.api.task import ConfigurableTask

from spade_eval.errors import UserError
from spade_eval.splits import Split

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

log = logging.getLogger(__name__)

T = TypeVar("T")

SPLITS = {"train": "training", "validation": "validation", "test": "test"}  # ours: lm-eval's


def rows_of(name: str, task: Any, split: str) -> Sequence[Any]:
    """The rows of a split, see `spade_eval.splits.Split`, after the task's own filter.

    Raises:
        UserError: The task has no such rows, cannot read them, or asks by code of its own.
    """
    own = getattr(type(task), "construct_requests", None)
    if own is not ConfigurableTask.construct_requests or getattr(task, "MULTIMODAL", False):
        raise UserError(
            f"task {name} asks by Python code of its own, or about more than text: its prompts "
            "cannot be had with their answers. Leave it out."
        )
    part = Split.parse(split)
    has = [s for s, theirs in SPLITS.items() if getattr(task, f"has_{theirs}_docs")()]
    if part.name not in has:
        raise UserError(
            f"task {name} has no {part.name} split; it has: {', '.join(has)}. Choose one of these "
            "(and do not evaluate on it), or leave the task out."
        )
    with blaming(f"task {name}: its {part.name} rows cannot be read"):
        rows = getattr(task, f"{SPLITS[part.name]}_docs")()
        rows = rows if hasattr(rows, "__getitem__") else list(rows)
        if part == Split(part.name):
            return rows
        found = [rows[i] for i in range(len(rows))[part.start : part.stop]]
    if not found:
        raise UserError(f"split={split!r} has no rows: task {name} has {len(rows)} of them.")
    return found


def source_of(task: Any, split: str) -> str | None:
    """The name that a task's data set gives a split of ours: two splits may be the same rows."""
    return getattr(task.config, f"{SPLITS[split]}_split")


def data_of(task: Any) -> str:
    """Names the data set of a task; empty where its own code makes the rows."""
    config = task.config
    files = (config.dataset_kwargs or {}).get("data_files")
    parts = (config.dataset_path, config.dataset_name, files and json.dumps(files, sort_keys=True))
    return " ".join(part for part in parts if part)


def shuffled(name: str, n_rows: int, seed: int) -> list[int]:
    """The order in which the rows of a task or file are read."""
    # A text as seed is hashed the same way everywhere. With the name in it, what stands beside a
    # task does not change the task's own order.
    order = list(range(n_rows))
    random.Random(f"{seed} {name}").shuffle(order)
    return order


def usable(
    name: str, rows: Sequence[Any], order: Sequence[int], make: Callable[[Any], T]
) -> Generator[tuple[int, T], None, None]:
    """What `make` makes of the rows, with the row's index, without those at which it fails.

    When closed, it tells how many those were.

    Raises:
        UserError: `make` fails at every row.
    """
    taken, unusable, first = 0, 0, ""
    try:
        for taken, doc_id in enumerate(order, 1):  # noqa: B007 - for the warning
            try:
                made = make(rows[doc_id])
            except Exception as err:  # a task's own functions fail as they like on unlabelled rows
                unusable += 1
                first = first or f"; the first, row {doc_id}: {cause(err)}"
                continue
            yield doc_id, made
        if unusable == taken:
            raise UserError(
                f"{name}: none of {taken} rows is usable{first}. Choose another split or task."
            )
    finally:
        if 0 < unusable < taken:
            log.warning("%d of %d rows of %s are unusable%s.", unusable, taken, name, first)


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """Tasks and loaders of data sets are foreign code: one line for whatever they raise."""
    try:
        yield
    except Exception as err:
        raise UserError(f"{what}: {cause(err)}") from err


def cause(err: Exception) -> str:
    """An error of foreign code, as the end of a message."""
    text = " ".join(str(err).split())
    return text if isinstance(err, UserError) else f"{type(err).__name__}: {text}"
