"""Sweep: for each task one pass that computes, then every cell through lm-eval's metrics."""

from __future__ import annotations

import json
import platform
import re
import time
from importlib import metadata
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from spade_eval import __version__
from spade_eval.atomic import replacing_folder, write_json
from spade_eval.cost import Account
from spade_eval.errors import UserError
from spade_eval.fingerprint import adapter_fingerprint
from spade_eval.fit import work
from spade_eval.fit.rows import rows_of, source_of
from spade_eval.lm.cache import configuration
from spade_eval.machine import machine
from spade_eval.memory import peak_memory
from spade_eval.splits import Split
from spade_eval.sweep import contexts, table
from spade_eval.sweep.compute import compute, configure, quiet, unbounded
from spade_eval.sweep.replay import Replay, metrics, requests_kept
from spade_eval.sweep.samples import samples_of
from spade_eval.sweep.settings import CONFIG, OWN, SAMPLES, STATES, TABLE, check_output

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd

    from spade_eval.sweep.collected import Collected
    from spade_eval.sweep.lm import SweepLM
    from spade_eval.sweep.settings import SweepSettings


def sweep(
    lm: SweepLM,
    tasks: Mapping[str, Any],
    settings: SweepSettings,
    *,
    resume: bool = False,
    overwrite: bool = False,
    command: str = "",
) -> pd.DataFrame | None:
    """Sweep the tasks and write the table.

    Args:
        lm: The model.
        tasks: lm-eval's tasks by name.
        settings: What was asked for.
        resume: Whether to go on in the work folder.
        overwrite: Whether to replace what is there.
        command: For the folder's record.

    Returns:
        The table; None on all processes but the first.

    Raises:
        UserError: Bad input; what has been computed stays in the work folder.
    """
    check_output(settings, resume, overwrite)
    if settings.split is not None:  # a task without such rows is told before hours of others
        for name, task in tasks.items():
            rows_of(name, task, settings.split)
    lm.barrier()  # or a slow process would find the first one's work folder
    with work.at_work(settings.work, main=lm.rank == 0):
        return _sweep(lm, tasks, settings, resume, overwrite, command)


def _sweep(
    lm: SweepLM,
    tasks: Mapping[str, Any],
    settings: SweepSettings,
    resume: bool,
    overwrite: bool,
    command: str,
) -> pd.DataFrame | None:
    about_model = json.loads(json.dumps(configuration(lm, lm._settings()), default=str))
    work.claim(
        settings.work,
        {**settings.describe(), **{f"model's {k}": v for k, v in about_model.items()}},
        anew=overwrite and not resume,
        main=lm.rank == 0,
        wait=lm.barrier,
    )
    rows: list[dict[str, Any]] = []
    samples: list[pd.DataFrame] = []
    states: dict[str, Any] = {}
    about: dict[str, Any] = {}
    begin = time.perf_counter()
    for name, task in tasks.items():
        configure(name, task, settings)
        truncated = lm.account.truncated_requests
        folder = settings.work / _file(name)
        collected = compute(lm, name, task, folder, settings)
        seconds = max(lm.gather_object(collected.seconds) or [0.0])
        found = _replay(lm, name, task, collected, settings)
        if lm.rank == 0:
            fixed = {"model": lm._model_source, "adapter": lm.peft or "", "task": name}
            rows += [{**fixed, **row, "seconds": round(seconds, 3)} for row in found]
            about[name] = _about(task, settings, seconds, lm.account.truncated_requests - truncated)
        if settings.log_samples:
            samples.append(samples_of(lm, name, task, collected))
        if collected.states is not None:
            states[name] = _states(lm, task, collected)
    if settings.log_samples:
        samples = [frame for part in lm.gather_object(samples) or [] for frame in part]
    if lm.rank != 0:
        return None
    whole = table.frame(rows)
    record = {
        "spade_eval": __version__,
        "command": command,
        "model": lm._model_source,
        "adapter": lm.peft or None,
        "adapter_fingerprint": adapter_fingerprint(lm.model),
        "n_layers": lm.backbone.n_layers,
        "tasks": about,
        "seed": settings.seed,
        # The seconds and the machine are then those of the last process; the tasks' are whole.
        "resumed": resume,
        "seconds": round(time.perf_counter() - begin, 1),
        **peak_memory(),
        "machine": machine(lm.device),
        "versions": _versions(),
        "settings": settings.describe(),
        "sweep": lm._settings(),
    }
    _write(whole, samples, states, record, settings, overwrite)
    return whole


def _replay(
    lm: SweepLM, name: str, task: Any, collected: Collected, settings: SweepSettings
) -> list[dict[str, Any]]:
    """Every cell's metrics, as rows without model and task."""
    replay = Replay(lm, collected.calls)
    rows: list[dict[str, Any]] = []
    known: dict[bytes, Any] = {}
    cells = table.cells(lm.grid, task.OUTPUT_TYPE == "loglikelihood_rolling")
    bar = tqdm(cells, desc=f"{name}: metrics", disable=lm.rank != 0)
    with requests_kept(task), quiet(), unbounded(task):
        for columns, replay.cell in bar:
            # Cells with the same answers have the same metrics; of several processes each knows
            # only its own.
            alone = lm.world_size == 1
            same = collected.answers(replay.cell) if alone else str(replay.cell).encode()
            if same not in known:
                known[same] = metrics(
                    replay, name, task, settings.limit, bootstrap_iters=settings.bootstrap_iters
                )
            account = Account()
            account.merge(lm.gather_object(collected.accounts[replay.cell]) or [])
            if known[same] is None:
                continue
            found, n, _ = known[same]
            cost = table.cost(account, columns)
            rows += [
                {**columns, "metric": metric, "value": value, "stderr": error, "n": n, **cost}
                for metric, (value, error) in found.items()
            ]
    return rows


def _states(
    lm: SweepLM, task: Any, collected: Collected
) -> tuple[dict[int, Any], dict[int, tuple[int, str]]]:
    """Of all processes: each document's states, and its right answer."""
    instances = (i for call in collected.calls for i in call.instances)
    own = collected.states or {}, contexts.right_answers(task, instances)
    states: dict[int, Any] = {}
    answers: dict[int, tuple[int, str]] = {}
    for some, right in lm.gather_object(own) or []:
        states |= some
        answers |= right
    return states, answers


def _file(task: str) -> str:
    """A task's name as part of a file's."""
    return re.sub(r"[^\w.-]+", "_", task)


def _about(task: Any, settings: SweepSettings, seconds: float, truncated: int) -> dict[str, Any]:
    split = settings.split or ("test" if task.has_test_docs() else "validation")
    return {
        "version": task.VERSION if task.VERSION is not None else task.get_config("metadata"),
        "split": split,
        "rows": source_of(task, Split.parse(split).name),  # the data set's name of the split
        "num_fewshot": task.get_config("num_fewshot"),
        "higher_is_better": task.higher_is_better(),
        "truncated_requests": truncated,
        "seconds": round(seconds, 3),
    }


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "lm_eval", "peft")
    return {"python": platform.python_version(), **{n: metadata.version(n) for n in names}}


def _write(
    whole: pd.DataFrame,
    samples: list[pd.DataFrame],
    states: Mapping[str, tuple[Any, Any]],
    record: dict[str, Any],
    settings: SweepSettings,
    overwrite: bool,
) -> None:
    import pandas as pd

    output = settings.output.absolute()
    if work.taken(output) and not overwrite:
        raise UserError(
            f"{output} has been made by another run meanwhile. Move it away and --resume this one."
        )
    with replacing_folder(output, "sweep", OWN.fullmatch) as new:
        table.write(whole, new, TABLE)
        if samples:
            every = pd.concat(samples, ignore_index=True).drop_duplicates()
            table.write(every, new, SAMPLES, csv=False)
        for name, found in states.items():
            contexts.write(new / STATES.format(_file(name)), *found)
        write_json(new / CONFIG, record)
    work.clear(settings.work)
