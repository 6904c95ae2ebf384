"""A baseline: one small file that holds a run's scores and every document's outcome.

It pairs documents by hash, so a check needs no samples of the old run. Outcomes of 0 and 1 take a
character each, keys of documents twelve.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from spade_eval import __version__
from spade_eval.atomic import replacing_file
from spade_eval.errors import UserError
from spade_eval.report.files import find_results, load_json, results_run
from spade_eval.report.runs import Run, Score, TaskScores

if TYPE_CHECKING:
    from pathlib import Path

    from spade_eval.report.stats import Values

_MARK = "spade_eval_baseline"
_FORMAT = 1


def read_run(path: Path) -> tuple[Run, str | None]:
    """Read a run from a results file, a folder of lm-eval, or a baseline.

    Returns:
        The run, and a remark if the folder left a choice.

    Raises:
        UserError: The file is missing, damaged, or something else.
    """
    file, of = find_results(path)
    raw = load_json(file)
    run = _from_json(raw, file) if _MARK in raw else results_run(raw, file)
    return run, f"{path} holds {of} results files; took the newest, {file}." if of > 1 else None


def write_baseline(run: Run, path: Path) -> None:
    """Write a baseline, in place of the one that may be there.

    Raises:
        UserError: `path` is something else than a baseline, or cannot be written.
    """
    if path.exists() and (path.is_dir() or _MARK not in load_json(path)):
        raise UserError(f"{path} exists and is no baseline. Give another name.")
    for name, task in run.tasks.items():
        for metric, score in task.scores.items():
            if not math.isfinite(score.value):
                raise UserError(
                    f"{name} {metric} is {score.value}: later runs cannot be checked against that. "
                    "Leave the task out, or repair the model first."
                )
    text = json.dumps(_to_json(run), indent=1, ensure_ascii=False)
    with replacing_file(path) as new:
        new.write_text(text + "\n", encoding="utf-8")


def _to_json(run: Run) -> dict[str, Any]:
    return {
        _MARK: _FORMAT,
        "spade_eval": __version__,
        "settings": dict(run.settings),
        "tasks": {name: _task_to_json(task) for name, task in run.tasks.items()},
    }


def _task_to_json(task: TaskScores) -> dict[str, Any]:
    return {
        "version": task.version,
        "n_shot": task.n_shot,
        "n": task.n,
        "scores": {
            metric: {
                "value": score.value,
                "stderr": score.stderr,
                "higher_is_better": score.higher_is_better,
                "outcomes": None if score.outcomes is None else _pack(score.outcomes),
            }
            for metric, score in task.scores.items()
        },
        "documents": " ".join(task.documents),
    }


def _from_json(raw: dict[str, Any], path: Path) -> Run:
    if raw[_MARK] != _FORMAT:
        raise UserError(
            f"{path} is a baseline of format {raw[_MARK]!r}, and this version reads {_FORMAT}. "
            "Write it again with --write-baseline."
        )
    try:
        tasks = {name: _task_from_json(task) for name, task in raw["tasks"].items()}
        return Run(str(path), dict(raw["settings"]), tasks)
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise UserError(
            f"{path} is a damaged baseline ({type(err).__name__}: {err}). Write it again with "
            "--write-baseline."
        ) from err


def _task_from_json(raw: dict[str, Any]) -> TaskScores:
    documents = tuple(raw["documents"].split())
    scores = {}
    for metric, score in raw["scores"].items():
        outcomes = None if score["outcomes"] is None else _unpack(score["outcomes"])
        if outcomes is not None and len(outcomes) != len(documents):
            raise ValueError(f"{len(outcomes)} outcomes of {metric}, {len(documents)} documents")
        value, stderr = float(score["value"]), score["stderr"]
        stderr = None if stderr is None else float(stderr)
        scores[metric] = Score.with_outcomes(value, stderr, score["higher_is_better"], outcomes)
    return TaskScores(scores, raw["version"], raw["n_shot"], raw["n"], documents)


def _pack(outcomes: Values) -> str | list[Any]:
    if outcomes.ndim == 1 and np.isin(outcomes, (0.0, 1.0)).all():
        return "".join("01"[int(outcome)] for outcome in outcomes)
    return outcomes.tolist()


def _unpack(packed: str | list[Any]) -> Values:
    return np.array(list(packed), dtype=np.float64)
