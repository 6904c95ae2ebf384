"""Accuracy against compute: what a decoder reaches with a given share of the full model's work.

A curve is what one decoder reaches over its layers, or one exit rule over its thresholds. The cost
of a point is 1 / gain, tails and checks counted; the full model is (1, its value).
Choosing between two settings by lot, document by document, reaches every point on the straight line
between them in (cost, value), of perplexities in (cost, log value), as log-likelihoods are what is
averaged over documents: so curves are interpolated in cost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from spade_eval.report.sweeps import EXPONENTIALS, FULL, decoder_order, series_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pandas as pd

_RULE = ("confidence", "exit_scope", "readout")


@dataclass(frozen=True)
class Curve:
    """One decoder, or one exit rule, on one task.

    Attributes:
        decoder: Its name in print, with the data of its lens.
        rule: Confidence, scope and readout; empty for fixed layers.
        metric: What is measured.
        lower: Whether less of it is better.
        full: The full model's value; NaN if the sweep does not have it.
        full_stderr: Its standard error; NaN if unknown.
        points: Rows of the sweep, by layer or threshold.
    """

    decoder: str
    rule: str
    metric: str
    lower: bool
    full: float
    full_stderr: float
    points: pd.DataFrame

    @property
    def by_layer(self) -> bool:
        """Whether it runs over layers, not thresholds."""
        return not self.rule

    def losses(self) -> np.ndarray:
        """How much worse than the full model each point is, (N,)."""
        with np.errstate(invalid="ignore"):  # two perplexities that overflow do not compare
            loss = self.full - self.points["value"].to_numpy()
        return -loss if self.lower else loss

    def at_ratios(self, ratios: Sequence[float]) -> list[float]:
        """Values at 1 / ratio of the full model's compute; NaN out of the curve's reach."""
        points = {1.0: self.full} if math.isfinite(self.full) else {}
        best = min if self.lower else max
        known = self.points[self.points["gain"].gt(0) & np.isfinite(self.points["value"])]
        for cost, value in zip(1 / known["gain"], known["value"], strict=True):
            points[cost] = best(value, points.get(cost, value))
        if not points:
            return [math.nan] * len(ratios)
        x, y = (np.array(each) for each in zip(*sorted(points.items()), strict=True))
        logs = self.metric in EXPONENTIALS and bool((y > 0).all())
        found = np.interp(
            1 / np.array(ratios), x, np.log(y) if logs else y, left=math.nan, right=math.nan
        )
        return (np.exp(found) if logs else found).tolist()

    def fastest(self, loss: float) -> pd.Series | None:
        """The cheapest point that loses at most `loss`; None if none does."""
        kept = self.points[(self.losses() <= loss + 1e-9) & self.points["gain"].notna()]
        return None if kept.empty else kept.loc[kept["gain"].idxmax()]

    def at(self, setting: float) -> pd.Series | None:
        """The point at a layer or a threshold; None if there is none."""
        found = self.points[
            np.isclose(self.points["layer" if self.by_layer else "threshold"], setting)
        ]
        return None if found.empty else found.iloc[0]


def curves(cells: pd.DataFrame) -> Iterator[tuple[str, str, str, Curve]]:
    """All curves of one model.

    Args:
        cells: Rows of a sweep.

    Yields:
        Adapter, task, metric, and a curve, in a fixed order.
    """
    for (adapter, task, metric), rows in cells.groupby(["adapter", "task", "metric"]):
        full = rows[rows["decoder"] == FULL]
        value, stderr = full[["value", "stderr"]].iloc[0] if len(full) else (math.nan, math.nan)
        groups = list(rows[rows["decoder"] != FULL].groupby(["decoder", "lens_data", *_RULE]))
        for (decoder, data, *rule), points in sorted(
            groups, key=lambda group: (decoder_order(group[0][0]), group[0][1:])
        ):
            setting = "threshold" if points["threshold"].notna().any() else "layer"
            name = ", ".join(part for part in rule if part)
            yield (
                adapter,
                task,
                metric,
                Curve(
                    series_name(decoder, data),
                    name or ("exits" if setting == "threshold" else ""),
                    metric,
                    bool(points["lower"].iloc[0]),
                    float(value),
                    float(stderr),
                    points.sort_values(setting),
                ),
            )
