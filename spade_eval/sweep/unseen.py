"""Whether documents may stand for new ones: each is there once, and the model has not seen it.

Lenses and adapters are trained on documents, and more of them choose when to stop. Documents may be
shared through a group of tasks, or through another task's prompts.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

from spade_eval import adapters
from spade_eval.errors import UserError
from spade_eval.fit.documents import load_tasks
from spade_eval.fit.rows import data_of, rows_of, source_of
from spade_eval.splits import Split

if TYPE_CHECKING:
    from collections.abc import Mapping

    from spade_eval.sweep.lm import SweepLM

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Documents:
    """Documents by their tasks, a, b, and their split."""

    tasks: tuple[str, ...]
    split: Split

    def among(self, tasks: Mapping[str, Any], split: Split, include_path: Any) -> list[str]:
        """The tasks of which a split may hold some of these documents.

        Args:
            tasks: lm-eval's tasks by name.
            split: Of these.
            include_path: Folders of further tasks, in which our own are looked up.
        """
        if not self.tasks:
            return []
        try:
            loaded = load_tasks(self.tasks, include_path)
        except UserError:  # data or a task that are not here: their names have to do
            return [name for name in tasks if name in self.tasks and self.split.overlaps(split)]

        def same(name: str, own: str) -> bool:
            data = data_of(tasks[name])
            return name == own or (bool(data) and data == data_of(loaded[own]))

        return [
            name
            for name, task in tasks.items()
            if any(
                same(name, own) and rows(task, split).overlaps(rows(learned, self.split))
                for own, learned in loaded.items()
            )
        ]


def rows(task: Any, split: Split) -> Split:
    """A split under the name that the task's data set gives it: several may be the same rows."""
    return replace(split, name=source_of(task, split.name) or "")


def require_once(tasks: Mapping[str, Any], split: str) -> None:
    """Refuse tasks that ask about the same documents: their outcomes are not independent.

    Args:
        tasks: lm-eval's tasks by name.
        split: Whose documents are used.

    Raises:
        UserError: Names two such tasks.
    """
    part = Split.parse(split)
    texts = {
        name: {json.dumps(row, sort_keys=True, default=str) for row in rows_of(name, task, split)}
        for name, task in tasks.items()
    }
    for (one, first), (other, second) in combinations(tasks.items(), 2):
        data = bool(data_of(first)) and data_of(first) == data_of(second)
        # Functions of their own may leave two tasks with other rows of the data, or change them.
        made = first.config.process_docs and second.config.process_docs
        same = data and rows(first, part) == rows(second, part) and not made
        if same or texts[one] & texts[other]:
            raise UserError(
                f"{one} and {other} ask about the same documents, which would count twice and make "
                "the bound surer than it is. Leave one of them out."
            )


def require_unseen(lm: SweepLM, tasks: Mapping[str, Any], split: Split, include_path: Any) -> None:
    """Refuse documents that trained a lens or the adapter; warn of those that chose something.

    Args:
        lm: The model with its lenses and adapter.
        tasks: lm-eval's tasks by name.
        split: Of these.
        include_path: Folders of further tasks, in which those of the training are looked up.

    Raises:
        UserError: Names the tasks, and what they trained.
    """
    trained = [
        (f"the lens {name}", lens.config.tasks, lens.config.split)
        for name, lens in lm.maps.values()
        if lens.config.tasks and lens.config.split
    ]
    made = adapters.record(lm.peft, lm.revision) if lm.peft else {}
    learned = tuple(made.get("tasks", ()))
    unknown = [
        f"the lens {name}"
        for name, lens in lm.maps.values()
        if lens.config.decoder != "identity" and not (lens.config.tasks and lens.config.split)
    ]
    if lm.peft and not learned:
        unknown.append(f"the adapter {lm.peft}")
    if unknown:
        log.warning(
            "Which documents trained %s is not known here: the guarantee holds only if those of "
            "--split were not among them.",
            " and ".join(unknown),
        )
    for what, names, whose in [*trained, (f"the adapter {lm.peft}", learned, "train")]:
        if shared := Documents(names, Split.parse(whose)).among(tasks, split, include_path):
            raise UserError(
                f"the {whose} documents of {', '.join(shared)} trained {what}: a guarantee needs "
                "documents that it has not seen. Give another --split."
            )
    chosen = Split.parse(str((made.get("settings") or {}).get("validation_split", "validation")))
    if shared := Documents(learned, chosen).among(tasks, split, include_path):
        log.warning(
            "%s validation documents, of %s among others, chose the step of the adapter %s: on "
            "them it is a little too good.",
            made.get("validation_documents", "Some"), ", ".join(shared), lm.peft,
        )  # fmt: skip
    for name, task in tasks.items():
        own = Split("test" if task.has_test_docs() else "validation")
        if rows(task, own).overlaps(rows(task, split)):
            log.warning(
                "Calibrating on %s documents of %s, which lm_eval evaluates: results on them are "
                "then no longer a test. Give --split validation[N:] and evaluate with --limit N, "
                "or documents of another split.",
                own.name, name,
            )  # fmt: skip
