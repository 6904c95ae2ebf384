"""The tables of a report: data frames with a title, and a note that says how they came about."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spade_eval.report.compute import curves
from spade_eval.report.cost_tables import equal_compute, speed
from spade_eval.report.files import number_or_none
from spade_eval.report.formats import Table
from spade_eval.report.sweeps import (
    FULL,
    decoder_name,
    decoder_order,
    is_exit,
    main_metric,
    series_name,
    slug,
    task_name,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from spade_eval.report.runs import Run
    from spade_eval.report.sweeps import Sweep

_EXIT_COLUMNS = [
    "decoder",
    "rule",
    "threshold",
    "value",
    "± stderr",
    "- full",
    "exit layer",
    "gain",
]
_SETTING = ["layer", "threshold", "confidence", "exit_scope", "readout"]


def sweep_tables(sweep: Sweep, chosen_on: Sweep | None = None) -> list[Table]:
    """All tables of one model.

    Args:
        sweep: Its cells.
        chosen_on: Cells of other documents, on which settings are chosen.
    """
    found = [*layer_tables(sweep), *exit_tables(sweep)]
    for matrix in generalisation(sweep):
        found.append(
            Table(
                slug("generalisation", matrix.model, matrix.name),
                f"{matrix.model}: {matrix.title}, by training set (rows) and test set",
                matrix.note,
                matrix.frame.rename_axis("trained on").reset_index(),
            )
        )
    found += [first_layers(sweep), equal_compute(sweep), speed(sweep, chosen_on)]
    return [table for table in found if not table.frame.empty]


def layer_tables(sweep: Sweep) -> Iterator[Table]:
    """Value by layer and decoder, of each task and metric."""
    model = sweep.model
    fixed = sweep.cells[~is_exit(sweep.cells)]
    for (adapter, task, metric), rows in fixed.groupby(["adapter", "task", "metric"]):
        columns: dict[str, pd.Series] = {}
        for name, points in series(rows):
            by_layer = points.drop_duplicates("layer").set_index("layer")
            columns[name] = by_layer["value"]
            columns[f"± {name}"] = by_layer["stderr"]
        frame = pd.DataFrame(columns).sort_index()
        frame.index = frame.index.astype(int)
        n = rows["n"].max()
        yield Table(
            slug("layers", model, task, adapter, metric),
            f"{model}: {metric} of {task_name(task, adapter)} by layer",
            (f"{n:.0f} documents; " if n > 0 else "") + "± one standard error.",
            frame.rename_axis("layer").reset_index(),
        )


def series(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Fixed-layer decoders of one task and metric, in a fixed order, the full model first."""
    groups = sorted(
        rows.groupby(["decoder", "lens_data"]),
        key=lambda group: (decoder_order(group[0][0]), group[0]),
    )
    for (decoder, data), points in groups:
        yield series_name(decoder, data), points


def exit_tables(sweep: Sweep) -> Iterator[Table]:
    """Value and cost at every threshold, of each task and metric."""
    model = sweep.model
    frames: dict[tuple[str, str, str], list[pd.DataFrame]] = {}
    for adapter, task, metric, curve in curves(sweep.cells):
        if curve.by_layer:
            continue
        points = curve.points.rename(
            columns={
                "stderr": "± stderr",
                "mean_exit_layer": "exit layer",
            }
        )
        points = points.assign(decoder=curve.decoder, rule=curve.rule)
        points["- full"] = points["value"] - curve.full
        frames.setdefault((task, adapter, metric), []).append(points[_EXIT_COLUMNS])
    for (task, adapter, metric), parts in frames.items():
        yield Table(
            slug("exits", model, task, adapter, metric),
            f"{model}: {metric} of {task_name(task, adapter)} against cost, by threshold",
            "gain: token-layers of the full model through those of the run, tails and checks "
            "counted. No threshold was chosen on these documents; whoever chooses one should do it "
            "on others.",
            pd.concat(parts, ignore_index=True),
        )


@dataclass(frozen=True)
class Matrix:
    """Values by training set of the lens (rows) and test set (columns)."""

    model: str
    name: str
    title: str
    note: str
    frame: pd.DataFrame


def generalisation(sweep: Sweep) -> Iterator[Matrix]:
    """How lenses do on tasks that they were not trained on, for every decoder with a lens.

    A single number, of one training set and one test set, is none.
    """
    return (matrix for matrix in _matrices(sweep) if matrix.frame.size > 1)


def _matrices(sweep: Sweep) -> Iterator[Matrix]:
    model, cells = sweep.model, sweep.cells
    trained = cells[~cells["lens_data"].isin(["", "logit_lens"]) & ~cells["lower"]]
    # Classical exits watch lenses of several kinds, KIND:NAME but for L-SPADE's.
    watched = trained["lens_data"].str.extract(r"^(?:(\w+):)?(.*)$").fillna("")
    trained = trained.assign(kind=watched[0], lens_data=watched[1])
    half, at = math.ceil(sweep.n_layers / 2), round(sweep.n_layers * 3 / 4)
    groups = trained.groupby(["decoder", "kind"])
    for (decoder, kind), rows in sorted(groups, key=lambda group: decoder_order(group[0][0])):
        kind_shown = kind or ("l_spade" if decoder == "lens_exit" else "")
        shown = decoder_name(decoder) + (f" by {decoder_name(kind_shown)}" if kind_shown else "")
        if is_exit(rows).any():
            note = "Means over the exit rules and thresholds that all training sets have."
            for what, label in (("value", "accuracy"), ("gain", "token-layer gain")):
                frame = _by_training_set(rows, what)
                name = slug(decoder, kind, what)
                yield Matrix(model, name, f"{label} of {shown}", note, frame)
            continue
        upper = rows[rows["layer"].between(half, sweep.n_layers - 1)]
        layer = min(rows["layer"], key=lambda found: (abs(found - at), found))
        among = sorted(set(upper["layer"].astype(int)))
        span = f"{len(among)} layers, {among[0]} to {among[-1]}" if among else "no layer"
        for name, part, title in (
            ("upper", upper, f"{shown}, mean over {span}"),
            ("layer", rows[rows["layer"] == layer], f"{shown}, layer {layer:.0f}"),
        ):
            note = "Layers that all training sets have; none was chosen by its result."
            frame = _by_training_set(part, "value")
            yield Matrix(model, slug(decoder, name), title, note, frame)


def _by_training_set(rows: pd.DataFrame, what: str) -> pd.DataFrame:
    """Means by training set and test set, of the main metric of each task.

    Only over settings that all training sets of a test set have: means over different thresholds
    would not compare.
    """
    tests = [task_name(*pair) for pair in zip(rows["task"], rows["adapter"], strict=True)]
    rows = rows.assign(test=tests)
    rows = rows[rows["metric"] == rows["test"].map(rows.groupby("test")["metric"].agg(main_metric))]
    sets = rows.groupby("test")["lens_data"].transform("nunique")
    alike = rows.groupby(["test", *_SETTING], dropna=False)["lens_data"].transform("nunique")
    return rows[alike == sets].pivot_table(
        index="lens_data", columns="test", values=what, aggfunc="mean"
    )


def first_layers(sweep: Sweep) -> Table:
    """The first layer within one standard error of the full model, of each decoder."""
    rows = []
    for adapter, task, metric, curve in curves(sweep.cells):
        if not curve.by_layer:
            continue
        slack = curve.full_stderr if math.isfinite(curve.full_stderr) else 0.0
        layers = curve.points["layer"].to_numpy()
        reached = curve.losses() <= slack + 1e-9
        # Behind the last layer that falls short; all of them may.
        stays = layers[np.flatnonzero(~reached).max(initial=-1) + 1 :]
        rows.append(
            {
                "task": task_name(task, adapter),
                "metric": metric,
                "decoder": curve.decoder,
                "full model": curve.full,
                "± full model": curve.full_stderr,
                "first layer": layers[reached].min() if reached.any() else math.nan,
                "from then on": stays.min() if len(stays) else math.nan,
            }
        )
    return Table(
        slug("first-layer", sweep.model),
        f"{sweep.model}: first layer that reaches the full model",
        f"Within one standard error of the full model, {sweep.n_layers} layers; no worse than it "
        "where there is no standard error, as of perplexities. An early layer may get there by "
        "luck: from the layer under 'from then on' all swept layers do.",
        pd.DataFrame(rows),
    )


def leaderboard(runs: Sequence[Run], sweeps: Sequence[Sweep]) -> Table:
    """Runs of lm-eval, and the full models of the sweeps, by task."""
    rows = []
    for run in runs:
        counts = {task.n for task in run.tasks.values() if task.n is not None}
        cells: dict[str, Any] = {"run": run.name, "documents": _span(counts), "source": run.source}
        for scored in (run.tasks, run.groups):
            for task, found in scored.items():
                for metric, score in found.scores.items():
                    cells[f"{task} {metric}"] = score.value
                    cells[f"± {task} {metric}"] = score.stderr
        cells["exit layer"] = number_or_none(run.account.get("mean_exit_layer"))
        cells["gain"] = number_or_none(run.account.get("implied_speedup"))
        rows.append(cells)
    for sweep in sweeps:
        full = sweep.cells[sweep.cells["decoder"] == FULL]
        source, *more = sweep.source.split(", ")
        for adapter, part in full.groupby("adapter"):
            cells = {
                "run": f"{decoder_name(FULL)} ({task_name(sweep.model, adapter)})",
                "documents": _span(set(part["n"].dropna())),
                "source": source + (f" and {len(more)} more" if more else ""),
            }
            for row in part.itertuples():
                cells[f"{row.task} {row.metric}"] = row.value
                cells[f"± {row.task} {row.metric}"] = row.stderr
            rows.append(cells)
    frame = pd.DataFrame(rows)
    last = [name for name in ("exit layer", "gain") if name in frame]
    numbers = [name for name in frame if name not in ("run", "documents", "source")]
    frame[numbers] = frame[numbers].astype("float64")
    frame = frame[[name for name in frame if name not in last] + last]
    return Table(
        "leaderboard",
        "Leaderboard",
        "Numbers of different tasks, versions or limits do not compare; `spade-eval compare` tells "
        "two runs apart. documents: of a task, fewest and most. gain: the account's implied "
        "speed-up by token-layers, over all tasks of a run.",
        frame.dropna(axis="columns", how="all"),
    )


def _span(counts: Collection[float]) -> str:
    """Numbers as text, the smallest and the largest."""
    ends = (min(counts), max(counts)) if counts else ()
    return " to ".join(dict.fromkeys(f"{n:.0f}" for n in ends))
