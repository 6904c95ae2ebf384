"""Compare two runs metric by metric, and say which metrics have regressed.

    outcomes per document -> paired test | values and standard errors -> z test -> Holm -> verdicts

A regression is a loss that is larger than the tolerance and significant over all that was tested.
Tasks are tested, groups of tasks are not: their documents would count twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from spade_eval.errors import UserError
from spade_eval.report.runs import Run, Score, TaskScores, differing
from spade_eval.report.stats import Difference, aggregation_of, holm, paired, unpaired

if TYPE_CHECKING:
    from collections.abc import Collection

Conflict = Literal["versions", "limit", "fewshot", "missing", "untested"]
Verdict = Literal["same", "better", "worse", "within chance", "not tested"]

_ROUNDING = 1e-9  # 0.50 - 0.49 is a little more than 0.01


@dataclass(frozen=True)
class Compared:
    """One metric in both runs.

    Attributes:
        task: Its task, or group.
        metric: Its name.
        difference: What changed from a to b, over the documents that both runs scored.
        p: Corrected for all that was tested; NaN if nothing was.
        higher_is_better: None if unknown.
        group: Whether it is a group's: shown, not tested.
    """

    task: str
    metric: str
    difference: Difference
    p: float
    higher_is_better: bool | None
    group: bool = False

    @property
    def loss(self) -> float:
        """How much worse b is.

        In the metric's own unit where higher is better, as a share of a's value where lower is:
        perplexities have no common scale. 0 if the direction is unknown.
        """
        a, b = self.difference.a, self.difference.b
        if self.higher_is_better is None or a == b:
            return 0.0
        return a - b if self.higher_is_better else (b - a) / abs(a) if a else math.inf

    def verdict(self, tolerance: float, alpha: float) -> Verdict:
        """Whether b is worse, or better, by more than the tolerance and more than chance.

        Args:
            tolerance: Largest loss that is let pass, in units of `loss`.
            alpha: Chance of a false alarm, over all that was tested.
        """
        if math.isfinite(self.difference.a) and not math.isfinite(self.difference.b):
            return "worse"  # a broken model has no value, and no test
        if math.isnan(self.p) or self.higher_is_better is None:
            return "not tested"
        if abs(self.loss) <= tolerance + _ROUNDING:
            return "same"
        if self.p >= alpha:
            return "within chance"
        return "worse" if self.loss > 0 else "better"

    def unknown(self, tolerance: float, alpha: float) -> bool:
        """Whether b may be worse by more than the tolerance, and nothing can tell by chance or not.

        So it is where a has no value, or where the direction of a change is not known.
        """
        if self.group or self.verdict(tolerance, alpha) != "not tested":
            return False
        a, b = self.difference.a, self.difference.b
        if not math.isfinite(a):
            return not math.isfinite(b)
        return a != b if self.higher_is_better is None else self.loss > tolerance + _ROUNDING


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side.

    Attributes:
        a: The first run, or the baseline.
        b: The second run.
        rows: Their common metrics.
        settings: The settings that differ, with both values.
        conflicts: By kind what makes the runs hard to compare, in sentences.
        notes: What else a reader should know.
    """

    a: Run
    b: Run
    rows: tuple[Compared, ...]
    settings: dict[str, tuple[Any, Any]]
    conflicts: dict[Conflict, list[str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def regressions(self, tolerance: float, alpha: float) -> list[Compared]:
        """The metrics that have become worse."""
        return [row for row in self.rows if row.verdict(tolerance, alpha) == "worse"]


def compare(a: Run, b: Run) -> Comparison:
    """Compare two runs on the tasks and documents that they share.

    Raises:
        UserError: They share no task or metric, or no document of a task.
    """
    common = [name for name in a.tasks if name in b.tasks]
    if not common:
        raise UserError(
            f"The runs have no task in common: {a.source} has {_names(a.tasks)}; {b.source} has "
            f"{_names(b.tasks)}. Evaluate the same tasks."
        )
    conflicts: dict[Conflict, list[str]] = {}
    rows: list[Compared] = []
    if missing := _missing(a, b):
        conflicts["missing"] = [f"Only in {a.source}: {', '.join(missing)}."]
    for name in common:
        for kind, text in _conflicts(a, b, name):
            conflicts.setdefault(kind, []).append(text)
        rows += _compare_task(name, a, b)
    if not rows:
        raise UserError(
            f"The runs have no metric in common, in {_names(common)}. Evaluate them with the same "
            "version of each task."
        )
    corrected = holm([row.difference.p for row in rows])
    rows = [replace(row, p=p) for row, p in zip(rows, corrected, strict=True)]
    for name in (name for name in a.groups if name in b.groups):
        rows += _compare_group(name, a.groups[name], b.groups[name])
    notes = [*a.notes, *b.notes]
    if added := _missing(b, a):
        notes.append(f"Only in {b.source}: {', '.join(added)}.")
    return Comparison(a, b, tuple(rows), differing(a, b), conflicts, tuple(notes))


def refuse(
    comparison: Comparison, allowed: Collection[str], tolerance: float, alpha: float
) -> None:
    """Refuse runs that were not made alike, or that cannot be told apart.

    Args:
        comparison: The runs.
        allowed: Kinds of conflict that are let pass.
        tolerance: Largest loss that is let pass.
        alpha: Chance of a false alarm.

    Raises:
        UserError: Names every conflict, and how to let it pass; or nothing can be tested.
    """
    kinds = [kind for kind in comparison.conflicts if kind not in allowed]
    if kinds:
        told = " ".join(text for kind in kinds for text in comparison.conflicts[kind])
        raise UserError(
            f"The run and the baseline were not made alike. {told} Evaluate as the baseline was, "
            f"or write a new baseline; --allow {','.join(kinds)} compares them all the same."
        )
    if comparison.regressions(tolerance, alpha):
        return
    if all(math.isnan(row.p) for row in comparison.rows):
        raise UserError(
            "Nothing can be tested: the files hold neither samples of the same documents nor "
            "standard errors. Evaluate with --log_samples."
        )
    unknown = [row for row in comparison.rows if row.unknown(tolerance, alpha)]
    if unknown and "untested" not in allowed:
        told = "; ".join(
            f"{row.task} {row.metric} was {row.difference.a:.6g} and is {row.difference.b:.6g}"
            for row in unknown
        )
        raise UserError(
            f"What has changed cannot be tested: {told}. Evaluate both runs with --log_samples; "
            "--allow untested lets such changes pass."
        )


def _names(tasks: Collection[str]) -> str:
    return ", ".join(list(tasks)[:5]) + (", ..." if len(tasks) > 5 else "")


def _missing(a: Run, b: Run) -> list[str]:
    """What the first run has and the second has not: tasks, and metrics of common tasks."""
    found = []
    for name, task in a.tasks.items():
        if name not in b.tasks:
            found.append(name)
        else:
            found += [f"{name} {m}" for m in task.scores if m not in b.tasks[name].scores]
    return found


def _conflicts(a: Run, b: Run, name: str) -> list[tuple[Conflict, str]]:
    """What is not alike in the two runs of a task."""
    one, other = a.tasks[name], b.tasks[name]
    found: list[tuple[Conflict, str]] = []
    if one.version != other.version:
        found.append(
            ("versions", f"{name}: the task has version {one.version}, then {other.version}.")
        )
    if one.n_shot != other.n_shot:
        found.append(("fewshot", f"{name}: {one.n_shot} shots, then {other.n_shot}."))
    elif one.n_shot:
        keys = ("fewshot_seed", "fewshot_as_multiturn")
        for key, values in differing(a, b).items():
            if key in keys:
                found.append(("fewshot", f"{name}: {key} is {values[0]}, then {values[1]}."))
    limits = tuple(run.settings.get("limit") for run in (a, b))
    if one.n != other.n:
        found.append(("limit", f"{name}: {one.n} documents, then {other.n}."))
    elif one.n is None and limits[0] != limits[1]:
        found.append(("limit", f"{name}: --limit {limits[0]}, then {limits[1]}."))
    elif one.documents and other.documents and set(one.documents) != set(other.documents):
        shared = len(set(one.documents) & set(other.documents))
        found.append(("limit", f"{name}: of {one.n} documents, {shared} are the same."))
    return found


def _compare_task(name: str, a: Run, b: Run) -> list[Compared]:
    one, other = a.tasks[name], b.tasks[name]
    where = {key: at for at, key in enumerate(other.documents)}
    pairs = [(at, where[key]) for at, key in enumerate(one.documents) if key in where]
    if one.documents and other.documents and not pairs:
        raise UserError(
            f"{name}: the samples of {a.source} and of {b.source} have no document in common "
            f"({len(one.documents)} and {len(other.documents)} documents). Compare runs over the "
            "same documents of the same data set."
        )
    rows = []
    for metric, score in one.scores.items():
        if metric in other.scores:
            found = _difference(score, other.scores[metric], pairs)
            rows.append(
                Compared(name, metric, found, found.p, _better(score, other.scores[metric]))
            )
    return rows


def _compare_group(name: str, a: TaskScores, b: TaskScores) -> list[Compared]:
    return [
        Compared(
            name,
            metric,
            Difference(score.value, b.scores[metric].value),
            math.nan,
            _better(score, b.scores[metric]),
            group=True,
        )
        for metric, score in a.scores.items()
        if metric in b.scores
    ]


def _better(a: Score, b: Score) -> bool | None:
    return b.higher_is_better if a.higher_is_better is None else a.higher_is_better


def _difference(a: Score, b: Score, pairs: list[tuple[int, int]]) -> Difference:
    """Compare document by document where that is possible, by standard errors elsewhere."""
    if pairs and a.outcomes is not None and b.outcomes is not None:
        ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
        left, right = a.outcomes[ours], b.outcomes[theirs]
        aggregate = aggregation_of(a.outcomes, a.value)
        # Weights, such as numbers of words, are the documents' own.
        alike = left.shape == right.shape and (left.ndim == 1 or (left[:, 1] == right[:, 1]).all())
        if aggregate is not None and alike:
            return paired(left, right, aggregate)
    return unpaired(a.value, b.value, a.stderr, b.stderr)
