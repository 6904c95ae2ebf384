"""Calibrate: all thresholds from one pass over a task's documents, one of them certified."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spade_eval import lenses
from spade_eval.calibration import Calibration
from spade_eval.confidence import CONFIDENCES
from spade_eval.cost import Account
from spade_eval.errors import UserError
from spade_eval.fit.rows import rows_of
from spade_eval.lens import LinearLens
from spade_eval.splits import Split
from spade_eval.sweep.certify import certify, least_drop, p_values
from spade_eval.sweep.compute import compute, configure, quiet
from spade_eval.sweep.replay import Replay, metrics, requests_kept
from spade_eval.sweep.settings import SweepSettings
from spade_eval.sweep.unseen import require_once, require_unseen

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    from numpy.typing import NDArray

    from spade_eval.confidence import Name
    from spade_eval.sweep.lm import SweepLM

METRIC = "acc"


@dataclass(frozen=True)
class CalibrateSettings:
    """What to calibrate.

    Attributes:
        tasks: lm-eval tasks with the metric acc.
        split: Whose documents are used.
        max_drop: Bound on the risk.
        confidence: Probability that it holds.
        rule: The exit rule's arguments but the threshold, as `spade_exit` takes them.
        limit: Documents per task.
        num_fewshot: As in a sweep.
        apply_chat_template: As in a sweep.
    """

    tasks: tuple[str, ...]
    split: str
    max_drop: float
    confidence: float
    rule: dict[str, Any]
    limit: float | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False


def grid_of_thresholds(confidence: Name) -> tuple[float, ...]:
    """Thresholds to test, ascending, fixed before any document is seen.

    Entropies in steps of 0.05 nats up to 12.6, which is above ln V for V up to 290,000; over
    choices in steps of 0.02 up to ln 32; probabilities in steps of 0.01.
    """
    if not CONFIDENCES[confidence].low:
        return tuple(i / 100 for i in range(101))
    top, step = (3.48, 0.02) if confidence == "choice_entropy" else (12.6, 0.05)
    return tuple(round(i * step, 2) for i in range(round(top / step) + 1))


def calibrate(
    lm: SweepLM,
    tasks: Mapping[str, Any],
    settings: CalibrateSettings,
    command: str = "",
    include_path: Any = None,
) -> tuple[Calibration | None, pd.DataFrame]:
    """Find the threshold.

    Args:
        lm: The model, which reads one exit rule at many thresholds.
        tasks: lm-eval's tasks by name.
        settings: What was asked for.
        command: For the file.
        include_path: Folders of further tasks, in which those of trainings are looked up.

    Returns:
        The calibration, None if no threshold meets the bound; and the curve, most cautious first,
        whose `attrs` have the number of documents.

    Raises:
        UserError: Documents that trained the lens or the adapter or are there twice, a task without
            the metric, too few documents.
    """
    import pandas as pd

    if lm.world_size > 1:
        raise UserError("calibrate runs in one process: start it without accelerate launch.")
    require_once(tasks, settings.split)
    by_task = _documents(tasks, settings)
    n = sum(by_task.values())
    smallest = least_drop(n, settings.confidence)
    if smallest > settings.max_drop:
        raise UserError(
            f"{n} documents are too few: with a confidence of {settings.confidence} they can "
            f"certify a drop of {smallest:.4f} at best, and --max-drop {settings.max_drop} was "
            "asked for. Give more documents, a larger drop or a lower confidence."
        )
    require_unseen(lm, tasks, Split.parse(settings.split), include_path)
    watched = lm.grid.exits[0].lens
    if watched in lm.maps:
        lens = lm.maps[watched][1]
    else:
        lens = LinearLens.identity(lm.backbone.n_layers, lm.backbone.width)
    outcomes: list[NDArray[np.bool_]] = []
    accounts = [Account() for _ in lm.grid.exits]
    with tempfile.TemporaryDirectory() as folder:
        for name, task in tasks.items():
            outcomes.append(_outcomes(lm, name, task, settings, Path(folder), accounts))
    right = np.concatenate(outcomes, axis=1)  # (1 + thresholds, documents)
    if right.shape[1] != n:
        raise UserError(
            f"lm-eval scored {right.shape[1]} of {n} documents: a guarantee needs every one. Leave "
            "tasks with filters or repeats out."
        )
    harmed = (right[0] & ~right[1:]).sum(1).tolist()
    reports = [account.total.report(account.start_token_layers) for account in accounts]
    curve = pd.DataFrame(
        {
            "threshold": [exit_.rule.threshold for exit_ in lm.grid.exits],
            "harmed": harmed,
            "risk": [k / n for k in harmed],
            "p_value": p_values(harmed, n, settings.max_drop),
            "acc": right[1:].mean(1),
            "net_drop": right[0].mean() - right[1:].mean(1),
            "mean_exit_layer": [report["mean_exit_layer"] for report in reports],
            "token_layer_ratio": [report["token_layer_ratio"] for report in reports],
        }
    )
    curve.attrs["documents"] = n
    if not CONFIDENCES[lm.grid.exits[0].rule.confidence].low:
        # The most cautious first: probabilities from above.
        curve = curve.iloc[::-1].reset_index(drop=True)
    found = certify(curve["harmed"].tolist(), n, settings.max_drop, settings.confidence)
    if found is None:
        return None, curve
    row = curve.iloc[found]
    return Calibration(
        threshold=float(row["threshold"]),
        rule=settings.rule,
        tasks=tuple(tasks),
        split=settings.split,
        documents=n,
        documents_by_task=by_task,
        max_drop=settings.max_drop,
        confidence=settings.confidence,
        harmed=int(row["harmed"]),
        net_drop=round(float(row["net_drop"]), 6),
        model=lenses.recognise(lm.model, lens),
        curve=curve.round(6).to_dict("records"),
        num_fewshot=settings.num_fewshot,
        apply_chat_template=settings.apply_chat_template,
        command=command,
    ), curve


def _documents(tasks: Mapping[str, Any], settings: CalibrateSettings) -> dict[str, int]:
    """How many documents of each task there are to calibrate on.

    Raises:
        UserError: A task has no such documents, or not the metric.
    """
    found = {}
    for name, task in tasks.items():
        if METRIC not in task.higher_is_better():
            raise UserError(
                f"task {name} has no metric {METRIC}: calibration counts documents that are "
                "answered right. Leave it out."
            )
        rows, limit = len(rows_of(name, task, settings.split)), settings.limit
        if limit is not None:  # a share, or a number, as lm-eval has it
            rows = min(rows, math.ceil(rows * limit) if limit < 1 else int(limit))
        found[name] = rows
    return found


def _outcomes(
    lm: SweepLM,
    name: str,
    task: Any,
    settings: CalibrateSettings,
    folder: Path,
    accounts: list[Account],
) -> NDArray[np.bool_]:
    """Which documents are answered right, by the full model and at every threshold.

    Returns:
        (1 + thresholds, documents).
    """
    asked = SweepSettings(
        output=folder,
        tasks=(name,),
        split=settings.split,
        limit=settings.limit,
        num_fewshot=settings.num_fewshot,
        apply_chat_template=settings.apply_chat_template,
    )
    configure(name, task, asked)
    collected = compute(lm, name, task, folder / name, asked)
    first = len(lm.grid.readings)
    for account, part in zip(accounts, collected.accounts[first:], strict=True):
        account.merge([part])
    replay = Replay(lm, collected.calls)
    rows: list[list[bool]] = []
    known: dict[bytes, list[bool]] = {}
    with requests_kept(task), quiet():
        for replay.cell in (0, *range(first, first + len(lm.grid.exits))):
            same = collected.answers(replay.cell)
            if same in known:
                rows.append(known[same])
                continue
            found = metrics(replay, name, task, settings.limit, samples=True)
            samples = sorted(found[2] if found else [], key=lambda sample: sample["doc_id"])
            if any(sample[METRIC] not in (0, 1) for sample in samples):
                raise UserError(
                    f"task {name}: its {METRIC} is a share of an answer, not right or wrong, and a "
                    "guarantee counts documents. Leave it out."
                )
            known[same] = [bool(sample[METRIC]) for sample in samples]
            rows.append(known[same])
    return np.array(rows)
