"""Tables of accuracy against compute: at equal cost, and how much is saved at a given loss."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pandas as pd

from spade_eval.report.compute import Curve, curves
from spade_eval.report.formats import Table
from spade_eval.report.sweeps import slug, task_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spade_eval.report.sweeps import Sweep

BUDGETS = (1.0, 1.05, 1.1, 1.15, 1.2, 1.3, 1.4, 1.5, 1.75, 2.0)
"""Token-layer gains at which decoders are compared."""

LOSSES = {"no loss": 0.0, "1 point": 0.01}

_UNKNOWN = "unknown"
_UPPER = (
    "They are chosen on the documents that they are measured on, so these are upper bounds; empty "
    "where no setting keeps the accuracy."
)
_HONEST = (
    "They are chosen on other documents, {}, and measured on these: what they lose here stands "
    "beside them. Empty where no setting keeps the accuracy there, {} where that setting, or all "
    "that is needed to choose one, was not swept."
)


def equal_compute(sweep: Sweep) -> Table:
    """Value of each decoder and exit rule at common token-layer gains."""
    rows = [
        _curve_cells(adapter, task, metric, curve)
        | dict(zip((f"{ratio:.2f}x" for ratio in BUDGETS), curve.at_ratios(BUDGETS), strict=True))
        for adapter, task, metric, curve in curves(sweep.cells)
        if curve.points["gain"].notna().any()
    ]
    frame = pd.DataFrame(rows)
    return Table(
        slug("equal-compute", sweep.model),
        f"{sweep.model}: value at equal compute",
        "Columns are token-layer gains (1.20x: the full model computes 1.2 times as much; 1.00x is "
        "the full model itself), tails and checks counted. Between settings the line in cost, "
        "1 / gain, is taken, of perplexities that of their logarithms, which a choice by lot "
        "reaches; empty out of a decoder's reach.",
        frame.dropna(axis="columns", how="all") if rows else frame,
    )


def speed(sweep: Sweep, chosen_on: Sweep | None = None) -> Table:
    """The best token-layer gain at no loss and at one point of loss, of accuracies.

    Args:
        sweep: What is measured.
        chosen_on: Other documents of the same tasks, on which settings are chosen; None chooses on
            the measured ones.
    """
    others: dict[tuple[Any, ...], Curve] = {}
    for found in _costed(chosen_on) if chosen_on else ():
        others[tuple(_curve_cells(*found).values())] = found[3]
    rows = []
    for adapter, task, metric, curve in _costed(sweep):
        cells = _curve_cells(adapter, task, metric, curve)
        chooser = curve if chosen_on is None else others.get(tuple(cells.values()))
        setting = "layer" if curve.by_layer else "threshold"
        for label, loss in LOSSES.items():
            at = None if chooser is None else chooser.fastest(loss)
            point = None if at is None else curve.at(at[setting])
            cells[label] = math.nan if point is None else point["gain"]
            known = chooser is not None and math.isfinite(chooser.full)
            known = known and (at is None or point is not None)
            place = "" if point is None else f"{setting} {point[setting]:g}"
            cells[f"{label}, at"] = place if known else _UNKNOWN
            if chosen_on is not None:
                lost = math.nan if point is None else point["value"] - curve.full
                cells[f"{label}, - full"] = lost
        rows.append(cells)
    return Table(
        slug("speed", sweep.model),
        f"{sweep.model}: token-layer gain without loss and at one point of loss",
        "Largest gain among the settings whose value is at most that much below the full model's. "
        + (_UPPER if chosen_on is None else _HONEST.format(chosen_on.source, _UNKNOWN)),
        pd.DataFrame(rows),
    )


def _costed(sweep: Sweep) -> Iterator[tuple[str, str, str, Curve]]:
    """Curves of accuracies whose costs are known."""
    for found in curves(sweep.cells):
        if not found[3].lower and found[3].points["gain"].notna().any():
            yield found


def _curve_cells(adapter: str, task: str, metric: str, curve: Curve) -> dict[str, Any]:
    return {
        "task": task_name(task, adapter),
        "metric": metric,
        "decoder": curve.decoder,
        "rule": curve.rule,
    }
