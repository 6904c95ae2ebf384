"""Results files of lm-eval and the samples beside them, read with suspicion.

lm-eval writes `results_DATE.json`, and with `--log_samples` a `samples_TASK_DATE.jsonl` for each
task, one line per document and filter.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from spade_eval.errors import UserError
from spade_eval.report.runs import Run, Score, TaskScores

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from spade_eval.report.stats import Values

_DATED = re.compile(r"_(\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?)\.json$")
_HASH = 12  # hex digits: two of 100,000 documents share one with a chance of 2e-5

# What is the same in all runs of interest, differs in every run, or is read apart.
_UNTOLD = {"spade", "model_args", "model_num_parameters", "batch_sizes", "bootstrap_iters"}
_Sample = tuple[str, int, dict[str, object]]  # key, number of the document, outcomes by metric
_TOP_LEVEL = (
    "lm_eval_version", "transformers_version", "chat_template_sha", "system_instruction_sha",
    "fewshot_as_multiturn", "max_length",
)  # fmt: skip


def find_results(path: Path) -> tuple[Path, int]:
    """Find the results file that an argument means.

    Args:
        path: The file, or a folder that lm-eval wrote to.

    Returns:
        The file, the newest of a folder; and how many there were to choose from.

    Raises:
        UserError: There is none.
    """
    path = path.expanduser()
    if path.is_file():
        return path, 1
    if not path.is_dir():
        raise UserError(f"{path}: there is no such file or folder. Give a results file of lm-eval.")
    dated = dated_results(path)
    if not dated and (path / "sweep.json").is_file():
        raise UserError(f"{path} is a sweep: `spade-eval report {path} --output DIR` reads it.")
    if not dated:
        raise UserError(
            f"The folder {path} holds no results of lm-eval (results_DATE.json). They are written "
            "by `spade-eval run ... --output_path FOLDER`. A baseline is given by its own name."
        )
    return dated[-1], len(dated)


def dated_results(folder: Path) -> list[Path]:
    """The results files of lm-eval in a folder and below it, by date."""
    found = [
        (date[1], file) for file in folder.rglob("*.json") if (date := _DATED.search(file.name))
    ]
    return [file for _, file in sorted(found)]


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UserError: It cannot be read, or holds something else.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise UserError(
            f"{path} is not readable JSON ({err}). Is it cut off? Make the file again."
        ) from err
    if not isinstance(raw, dict):
        raise UserError(
            f"{path} holds a JSON {type(raw).__name__}, not an object with names and values. Is it "
            "the right file?"
        )
    return raw


def results_run(raw: dict[str, Any], path: Path) -> Run:
    """Read a run out of a results file of lm-eval, with the samples that lie beside it.

    Args:
        raw: What the file holds.
        path: The file.

    Raises:
        UserError: It is no results file, has no scores, or its samples are damaged.
    """
    rows = raw.get("results")
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise UserError(
            f"{path} is no results file of lm-eval: it has no table of tasks under 'results' "
            f"(found: {', '.join(map(repr, list(raw)[:5])) or 'nothing'}). Give the "
            "results_DATE.json that lm-eval wrote, or its folder."
        )
    parents = {name for name, tasks in _object(raw, "group_subtasks").items() if tasks}
    parents |= _object(raw, "groups").keys()
    found: dict[str, TaskScores] = {}
    missing, short = [], []
    for name, row in rows.items():
        file = None if name in parents else _samples_file(path, name)
        if file is None and name in _object(raw, "task_hashes"):
            missing.append(name)
        if (task := _task(raw, name, row, file)).scores:
            found[name] = task
        if file is not None and task.n not in (None, len(task.documents)):
            short.append(f"{name} ({len(task.documents)} of {task.n})")
    if not found.keys() - parents:
        raise UserError(
            f"{path} holds no scores of a task, keys such as 'acc,none' with a number (found: "
            f"{', '.join(list(next(iter(rows.values()), {}))[:5]) or 'nothing'}). Give the results "
            "of an evaluation that has ended, by lm-eval 0.4 or later and without --predict_only."
        )
    notes = [f"The samples of {', '.join(missing)} are not beside {path}."] if missing else []
    if short:
        notes.append(
            f"Beside {path} there are samples of only some documents, and averages are compared: "
            f"{', '.join(short)}. Was a file cut off?"
        )
    return Run(
        source=str(path),
        settings=_settings(raw),
        tasks={name: task for name, task in found.items() if name not in parents},
        groups={name: task for name, task in found.items() if name in parents},
        account=_object(_object(_object(raw, "config"), "spade"), "account"),
        notes=tuple(notes),
    )


def _object(raw: dict[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key)
    return value if isinstance(value, dict) else {}


def _task(raw: dict[str, Any], name: str, row: dict[str, Any], samples: Path | None) -> TaskScores:
    """Read the scores of one task, or of a group."""
    documents, outcomes = _samples(samples) if samples else ((), {})
    better = _object(_object(raw, "higher_is_better"), name)
    scores = {}
    for key, value in row.items():
        metric, comma, filtered = key.partition(",")
        value = number_or_none(value)
        if not comma or metric.endswith("_stderr") or value is None:
            continue
        stderr = number_or_none(row.get(f"{metric}_stderr,{filtered}"))
        scores[metric if filtered == "none" else key] = Score.with_outcomes(
            value,
            None if stderr is None or math.isnan(stderr) else stderr,
            better.get(metric),
            outcomes.get(key),
        )
    n = _object(_object(raw, "n-samples"), name).get("effective", row.get("sample_len"))
    return TaskScores(
        scores,
        _object(raw, "versions").get(name),
        _object(raw, "n-shot").get(name),
        n if isinstance(n, int) else None,
        documents,
    )


def number_or_none(value: object) -> float | None:
    """The number, if it is one; lm-eval writes "N/A" for a standard error that it has not."""
    return float(value) if isinstance(value, (int, float)) else None


def _settings(raw: dict[str, Any]) -> dict[str, Any]:
    """What the run did that another may do otherwise."""
    config = _object(raw, "config")
    spade = {key: value for key, value in _object(config, "spade").items() if key != "account"}
    arguments = config.get("model_args")
    if isinstance(arguments, str):
        arguments = dict(part.partition("=")[::2] for part in arguments.split(",") if part)
    arguments = arguments if isinstance(arguments, dict) else {}
    # The default model's folder is named after a hash; our block knows its name.
    named = spade.pop("model", None) or arguments.get("pretrained") or raw.get("model_name")
    settings = {key: value for key, value in config.items() if key not in _UNTOLD}
    settings |= arguments | spade | {"pretrained": named}
    return settings | {key: raw[key] for key in _TOP_LEVEL if key in raw}


def _samples_file(results: Path, task: str) -> Path | None:
    """Find the samples of a task beside a results file: of the same date, if its name has one."""
    if dated := _DATED.search(results.name):
        file = results.with_name(f"samples_{task}_{dated[1]}.jsonl")
        return file if file.is_file() else None
    # Renamed by hand: the samples are its own only if there are no others.
    pattern = re.compile(re.escape(f"samples_{task}_") + r"\d{4}-[\dT.-]+\.jsonl$")
    found = [file for file in results.parent.glob("samples_*.jsonl") if pattern.match(file.name)]
    return found[0] if len(found) == 1 else None


def _samples(path: Path) -> tuple[tuple[str, ...], dict[str, Values]]:
    """Read a samples file.

    Returns:
        A key for each of N documents, in ascending order, and by "metric,filter" their outcomes,
        (N,) or (N, 2), unless they are no numbers.

    Raises:
        UserError: A line is not readable, or lacks what samples have.
    """
    by_filter: dict[str, list[_Sample]] = {}
    n = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                n += 1
                name, sample = _sample(json.loads(line))
                by_filter.setdefault(name, []).append(sample)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as err:
        raise UserError(
            f"{path}, line {n} is no sample of lm-eval ({type(err).__name__}: {err}). Is the file "
            "cut off? Log the samples again."
        ) from err
    keys: tuple[str, ...] = ()
    outcomes = {}
    for name, samples in by_filter.items():
        samples.sort(key=lambda sample: sample[:2])
        found = tuple(_numbered([key for key, _, _ in samples]))
        keys = keys or found
        for metric in samples[0][2]:
            values = _numbers([metrics.get(metric) for _, _, metrics in samples])
            if values is not None and found == keys:
                outcomes[f"{metric},{name}"] = values
    return keys, outcomes


def _sample(raw: dict[str, Any]) -> tuple[str, _Sample]:
    """The filter of a line of samples, and what the line says."""
    key = str(raw.get("doc_hash") or raw["doc_id"])[:_HASH]
    metrics = {str(metric): raw.get(metric) for metric in raw.get("metrics", ())}
    return str(raw.get("filter", "none")), (key, int(raw.get("doc_id", 0)), metrics)


def _numbered(keys: list[str]) -> Iterator[str]:
    """Tell documents with the same text apart: "k", "k#1", ..."""
    seen: dict[str, int] = {}
    for key in keys:
        count = seen.get(key, 0)
        seen[key] = count + 1
        yield f"{key}#{count}" if count else key


def _numbers(values: list[object]) -> Values | None:
    """Outcomes as an array (N,) or (N, 2); None if they are neither."""
    try:
        array = np.array(values, dtype=np.float64)
    except (ValueError, TypeError):
        return None
    return array if array.ndim == 1 or array.shape[1:] == (2,) else None
