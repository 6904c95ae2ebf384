"""A threshold with a guarantee: the file that `spade-eval calibrate` writes and models read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from spade_eval import __version__
from spade_eval.errors import UserError
from spade_eval.exits import DEFAULTS

NAME = "calibration.json"
WORD = "calibrated"  # threshold=calibrated


@dataclass(frozen=True)
class Calibration:
    """What was certified, and for what.

    Attributes:
        threshold: The largest cost saving that is certified.
        rule: The exit rule's other arguments, as `spade_exit` takes them.
        tasks: The tasks whose documents were used; the guarantee holds for more of the same.
        split: Of the tasks.
        documents: n.
        documents_by_task: The same of each task: the bound is on documents in these proportions.
        max_drop: Bound on the risk, the share of documents that the full model answers right and
            the exit run wrong.
        confidence: Probability, over the draw of the documents, that the bound holds.
        harmed: Documents for which that happened, at this threshold.
        net_drop: Accuracy of the full model less that of the exit run; no guarantee.
        model: What the model is recognised by.
        num_fewshot: Examples in the prompts; None is each task's own number.
        apply_chat_template: Whether the prompts went through the model's chat template.
        curve: Every threshold that was looked at: risk, p-value, accuracy, cost.
        command: The command that made it.
        package_version: The version of spade_eval that made it.
    """

    threshold: float
    rule: dict[str, Any]
    tasks: tuple[str, ...]
    split: str
    documents: int
    max_drop: float
    confidence: float
    harmed: int
    net_drop: float
    model: dict[str, Any]
    documents_by_task: dict[str, int] = field(default_factory=dict)
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    curve: list[dict[str, Any]] = field(default_factory=list)
    command: str = ""
    package_version: str = __version__

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**asdict(self), "tasks": list(self.tasks)}

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a file.

        Raises:
            UserError: There is none, or it is something else.
        """
        path = Path(path)
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as err:
            raise UserError(
                f"threshold={WORD}: there is no {path}. Make it with `spade-eval calibrate --tasks "
                "... --max-drop 0.03`, or say where it is: calibration=FILE."
            ) from err
        except (OSError, ValueError) as err:
            raise UserError(f"{path} is not readable JSON ({err}). Calibrate again.") from err
        names = {f.name for f in fields(cls)}
        if not isinstance(raw, dict) or not {"threshold", "rule", "tasks", "model"} <= set(raw):
            raise UserError(f"{path} is not what `spade-eval calibrate` writes. Calibrate again.")
        known = {k: v for k, v in raw.items() if k in names}
        if not isinstance(raw["rule"], dict) or raw["rule"].keys() != DEFAULTS.keys():
            raise UserError(f"{path} is incomplete: its rule needs {', '.join(sorted(DEFAULTS))}.")
        try:
            return cls(**{**known, "tasks": tuple(raw["tasks"])})
        except TypeError as err:
            raise UserError(f"{path} is incomplete ({err}). Calibrate again.") from err

    def arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """The exit rule's arguments: what the user gave has to be what was calibrated.

        Args:
            given: Arguments by name; None was not given.

        Raises:
            UserError: Names those that differ.
        """
        apart = [
            f"{name}={value}, calibrated with {self.rule.get(name)}"
            for name, value in given.items()
            if value is not None and value != self.rule.get(name)
        ]
        if apart:
            raise UserError(
                f"threshold={WORD}: {'; '.join(apart)}. Leave the argument out, or calibrate again."
            )
        return {**self.rule, "threshold": self.threshold}

    @property
    def holds_for(self) -> str:
        """What a model cannot check: lm_eval's arguments about prompts, and how many documents."""
        shots = self.num_fewshot
        few = "without --num_fewshot" if shots is None else f"with --num_fewshot {shots}"
        chat = "with" if self.apply_chat_template else "without"
        runs = f"runs {few}, {chat} --apply_chat_template"
        if len(self.documents_by_task) < 2:
            return runs
        parts = ", ".join(f"{task}: {n}" for task, n in self.documents_by_task.items())
        return f"{runs}, and documents of its tasks in the proportions of calibration ({parts})"

    def require_model(self, found: dict[str, Any]) -> None:
        """Make sure that a model is the one that was calibrated.

        Args:
            found: What it is recognised by.

        Raises:
            UserError: Names what differs.
        """
        apart = [name for name in self.model if found.get(name) != self.model[name]]
        if apart:
            raise UserError(
                f"threshold={WORD}: the calibration is of another {' and '.join(apart)} "
                f"({self.command or 'unknown command'}); the same model in another dtype is "
                "another one. Calibrate this one."
            )

    def require_tasks(self, tasks: set[str], whole: bool) -> None:
        """Make sure that tasks are those that were calibrated, all together.

        Args:
            tasks: Of a run.
            whole: Whether these are all of its tasks.

        Raises:
            UserError: Names those that are not, or those that lack: a bound on the documents of
                several tasks says nothing of one of them.
        """
        others = sorted(tasks - set(self.tasks))
        if others:
            raise UserError(
                f"threshold={WORD} holds for {', '.join(self.tasks)}, not for {', '.join(others)}: "
                "its guarantee is about documents of the same kind. Calibrate on the task, or give "
                f"threshold={self.threshold} without a guarantee."
            )
        lacks = sorted(set(self.tasks) - tasks)
        if whole and lacks:
            raise UserError(
                f"threshold={WORD} holds for the documents of {', '.join(self.tasks)} together; "
                f"without {', '.join(lacks)} it says nothing of the others. Run all of them, "
                f"calibrate on {','.join(sorted(tasks))}, or give threshold={self.threshold} "
                "without a guarantee."
            )
