"""What one evaluation found: scores by task, outcomes by document, and the settings behind them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spade_eval.report.stats import aggregation_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from spade_eval.report.stats import Values

# Settings that tell runs apart at a glance, by the names that lm-eval and our models give them.
_HEADLINE = ("layer", "threshold", "confidence", "exit_scope", "readout", "lens", "peft")


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        value: As reported.
        stderr: Its standard error; None if none is reported.
        higher_is_better: None if unknown.
        outcomes: Per document, (N,), or (N, 2) for log-likelihoods and their weights; None unless
            samples were logged and give `value`.
    """

    value: float
    stderr: float | None = None
    higher_is_better: bool | None = None
    outcomes: Values | None = None

    @classmethod
    def with_outcomes(
        cls,
        value: float,
        stderr: float | None,
        higher_is_better: bool | None,
        outcomes: Values | None,
    ) -> Score:
        """Keep the outcomes if they give the value; scores of a whole corpus have no such parts."""
        if outcomes is not None and aggregation_of(outcomes, value) is None:
            outcomes = None
        return cls(value, stderr, higher_is_better, outcomes)


@dataclass(frozen=True)
class TaskScores:
    """The scores of one task.

    Attributes:
        scores: By metric: "acc", or "exact_match,strict-match" behind a filter with a name.
        version: Of the task.
        n_shot: Examples in the prompt.
        n: Documents scored.
        documents: A key for each document, in the order of the outcomes; empty without samples.
    """

    scores: Mapping[str, Score]
    version: object = None
    n_shot: int | None = None
    n: int | None = None
    documents: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """One evaluation.

    Attributes:
        source: The file it was read from.
        settings: What another run may do otherwise, flat.
        tasks: By name, without groups.
        groups: Averages over several of the tasks, by name.
        account: What was computed (`spade_eval.cost`); empty for other models.
        notes: What the reader of a comparison should know about the files.
    """

    source: str
    settings: Mapping[str, Any]
    tasks: Mapping[str, TaskScores]
    groups: Mapping[str, TaskScores] = field(default_factory=dict)
    account: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        """The language model's name."""
        return str(self.settings.get("pretrained") or "unknown model")

    @property
    def name(self) -> str:
        """The run in a few words: lm-eval's model, its main settings, the language model."""
        found = {key: self.settings.get(key) for key in _HEADLINE}
        given = [f"{key}={value}" for key, value in found.items() if value is not None]
        return " ".join([str(self.settings.get("model", "?")), *given, f"({self.model})"])


def differing(a: Run, b: Run) -> dict[str, tuple[Any, Any]]:
    """The settings that are not the same in both runs, with both values; None where unset."""
    keys = dict.fromkeys([*a.settings, *b.settings])
    both = {key: (a.settings.get(key), b.settings.get(key)) for key in keys}
    return {key: values for key, values in both.items() if values[0] != values[1]}
