"""The figures of a report: layer curves, accuracy against speed, generalisation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spade_eval.report.compute import curves
from spade_eval.report.extra import needs_report_extra
from spade_eval.report.styles import MAP, Plot, curve_styles, legend_below, markers, panels, plain
from spade_eval.report.sweeps import (
    FULL,
    PERPLEXITIES,
    decoder_name,
    is_exit,
    main_metric,
    slug,
    task_name,
)
from spade_eval.report.tables import generalisation, series

with needs_report_extra():
    import matplotlib as mpl
    from matplotlib.colors import BoundaryNorm
    from matplotlib.lines import Line2D

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from matplotlib.axes import Axes

    from spade_eval.report.compute import Curve
    from spade_eval.report.sweeps import Sweep

_TICKS = 12  # thresholds named beside a colour bar
_BANDS = 5  # curves with bands in a panel, at most: more would lie on each other as one slab
_SPAN = 0.1  # of a heat map's colours, at least
_HIGHEST = 10_000  # perplexities are shown up to so many times the full model's


def sweep_figures(sweep: Sweep) -> Iterator[Plot]:
    """All figures of one model that its sweep has the numbers for."""
    for perplexity in (False, True):
        yield from layer_figure(sweep, perplexity)
    yield from exit_figures(sweep)
    yield from generalisation_figure(sweep)


def layer_figure(sweep: Sweep, perplexity: bool) -> Iterator[Plot]:
    """Value by layer, a panel per task (the paper's figures 3, 4, 7 and 8).

    Args:
        sweep: The sweep.
        perplexity: Whether to show perplexities, on a logarithmic axis, or accuracies.
    """
    rows = _main_rows(sweep.cells[~is_exit(sweep.cells)], perplexity)
    rows = rows[~np.isinf(rows["value"])]  # a perplexity that has overflowed has no place
    if rows.empty:
        return
    tasks = list(rows.groupby(["task", "adapter"]))
    by_task = [(key, dict(series(part))) for key, part in tasks]
    full = decoder_name(FULL)
    groups = {
        name: points["decoder"].iloc[0]
        for _, found in by_task
        for name, points in found.items()
        if name != full
    }
    styles = curve_styles(groups)
    figure, axes = panels(len(tasks))
    handles: dict[str, Any] = {}
    for ax, (key, found) in zip(axes, by_task, strict=True):
        metric = next(iter(found.values()))["metric"].iloc[0]
        for name in groups:
            if name in found:
                points = found[name].sort_values("layer")
                (handles[name],) = ax.plot(
                    points["layer"], points["value"], label=name, **styles[name]
                )
                if len(found) - (full in found) <= _BANDS:
                    _band(ax, points["layer"], points, styles[name]["color"])
        if full in found:
            value, stderr = found[full][["value", "stderr"]].iloc[0]
            handles[full] = ax.axhline(value, color="black", linestyle=(0, (6, 3)), linewidth=1)
            if math.isfinite(stderr):
                ax.axhspan(value - stderr, value + stderr, color="black", alpha=0.08, linewidth=0)
        ax.set_title(plain(task_name(*key)))
        ax.set_xlabel("layer")
        ax.set_ylabel(plain(metric))
        if perplexity:
            ax.set_yscale("log")
            if full in found and ax.get_ylim()[1] > _HIGHEST * value:
                # A logit lens of early layers would press all other curves into one line.
                lowest = np.nanmin([points["value"].min() for points in found.values()])
                ax.set_ylim(lowest / 2, _HIGHEST * value)
    legend_below(figure, handles)
    kind = "perplexity" if perplexity else "accuracy"
    caption = "Dashed: the full model."
    if rows["stderr"].notna().any():
        most = max(len(found) - (full in found) for _, found in by_task)
        crowded = f", the full model's alone where there are over {_BANDS} curves."
        caption += " Bands are one standard error to both sides"
        caption += "." if most <= _BANDS else crowded
    if perplexity:
        caption += f" The axis ends at {_HIGHEST:,} times the full model's."
    yield Plot(
        slug("layers", sweep.model, kind),
        f"{sweep.model}: {kind} by layer",
        caption,
        figure,
        rows[
            ["task", "adapter", "metric", "decoder", "lens_data", "layer", "value", "stderr", "n"]
        ],
    )


def _band(ax: Axes, x: pd.Series, points: pd.DataFrame, colour: str) -> None:
    value, stderr = points["value"], points["stderr"]
    if stderr.notna().any():
        ax.fill_between(x, value - stderr, value + stderr, color=colour, alpha=0.15, linewidth=0)


def _main_rows(cells: pd.DataFrame, perplexity: bool) -> pd.DataFrame:
    """Rows of each task's main metric: of its perplexities, or of what is better the higher."""
    rows = cells[cells["metric"].isin(PERPLEXITIES) if perplexity else ~cells["lower"]]
    main = rows.groupby("task")["metric"].agg(main_metric)
    return rows[rows["metric"] == rows["task"].map(main)]


def exit_figures(sweep: Sweep) -> Iterator[Plot]:
    """Accuracy against speed at every threshold (figures 5 and 9).

    A figure per confidence, and per scope where there are several.
    """
    cells = sweep.cells[~sweep.cells["lower"]]
    exits = cells[is_exit(cells) & cells["gain"].notna()]
    several = exits["exit_scope"].nunique() > 1
    for (confidence, scope), part in exits.groupby(["confidence", "exit_scope"]):
        mine = cells["confidence"].eq(confidence) & cells["exit_scope"].eq(scope)
        kept = cells[mine | cells["decoder"].eq(FULL)]
        kept = _main_rows(kept[kept["task"].isin(part["task"])], perplexity=False)
        yield _exit_figure(sweep, str(confidence), str(scope) if several else "", kept)


def _exit_figure(sweep: Sweep, confidence: str, scope: str, rows: pd.DataFrame) -> Plot:
    found: dict[tuple[str, str], list[Any]] = {}
    for adapter, task, _, curve in curves(rows):
        found.setdefault((task, adapter), []).append(curve)
    label = _labels([curve for group in found.values() for curve in group])
    kinds = markers(list(dict.fromkeys(label.values())))
    thresholds = np.sort(rows["threshold"].dropna().unique())
    # Thresholds are ranked: one that never exits and one that always does may be far from the rest.
    colour_map = mpl.colormaps[MAP].resampled(max(256, len(thresholds)))
    colours = BoundaryNorm(np.arange(len(thresholds) + 1) - 0.5, colour_map.N)
    figure, axes = panels(len(found))
    handles: dict[str, Any] = {}
    points: Any = None
    for ax, ((task, adapter), curves_here) in zip(axes, found.items(), strict=True):
        for curve in curves_here:
            at, name = curve.points, label[curve.decoder, curve.rule]
            points = ax.scatter(
                at["gain"],
                at["value"],
                c=np.searchsorted(thresholds, at["threshold"]),
                cmap=colour_map,
                norm=colours,
                marker=kinds[name],
                s=22,
                linewidths=0.4,
                edgecolors="black",
            )
            ax.plot(at["gain"], at["value"], color="0.75", linewidth=0.7, zorder=0)
            handles[name] = Line2D([], [], color="0.4", linestyle="", marker=kinds[name])
        full, stderr = curves_here[0].full, curves_here[0].full_stderr
        if math.isfinite(full):
            handles[decoder_name(FULL)] = ax.axhline(
                full, color="black", linestyle=(0, (6, 3)), linewidth=1
            )
            if math.isfinite(stderr):
                ax.axhspan(full - stderr, full + stderr, color="black", alpha=0.08, linewidth=0)
        ax.axvline(1, color="0.6", linewidth=0.8)
        ax.set_title(plain(task_name(task, adapter)))
        ax.set_xlabel("token-layer gain")
        ax.set_ylabel(plain(curves_here[0].metric))
    _colour_bar(figure, axes, points, thresholds, confidence)
    legend_below(figure, handles)
    return Plot(
        slug("exits", sweep.model, confidence, scope),
        f"{sweep.model}: accuracy against speed, {confidence}{scope and f' by {scope}'}",
        "Token-layers of the full model through those of the run, tails and checks counted; left "
        "of the grey line a run computes more than the full model. Colour: threshold, by rank. "
        "Band: one standard error of the full model to both sides.",
        figure,
        rows.drop(columns=["model", "layer", "seconds"]),
    )


def _labels(found: Sequence[Curve]) -> dict[tuple[str, str], str]:
    """Names of exit rules: the decoder, with scope and read-out if it comes with several."""
    rules: dict[str, set[str]] = {}
    for curve in found:
        rules.setdefault(curve.decoder, set()).add(curve.rule)
    return {
        (curve.decoder, curve.rule): curve.decoder
        if len(rules[curve.decoder]) == 1
        else ", ".join([curve.decoder, *curve.rule.split(", ")[1:]])
        for curve in found
    }


def _colour_bar(figure: Any, axes: list[Axes], points: Any, thresholds: Any, name: str) -> None:
    ranks = np.unique(np.linspace(0, len(thresholds) - 1, min(_TICKS, len(thresholds))).round())
    bar = figure.colorbar(points, ax=axes, ticks=ranks, pad=0.02, aspect=30)
    bar.ax.set_yticklabels([f"{thresholds[int(rank)]:g}" for rank in ranks])
    bar.minorticks_off()
    bar.set_label(plain(f"threshold of {name}" if name else "threshold"))


def generalisation_figure(sweep: Sweep) -> Iterator[Plot]:
    """Training set against test set, a panel per decoder (figures 6, 10 and 11).

    Of a single training set there is nothing to compare, and its numbers stand in the table.
    """
    matrices = [matrix for matrix in generalisation(sweep) if len(matrix.frame) > 1]
    if not matrices:
        return
    figure, axes = panels(len(matrices), columns=2, width=3.6, height=2.6)
    for ax, matrix in zip(axes, matrices, strict=True):
        values = matrix.frame.to_numpy(dtype=float)
        # Test sets are compared with nothing: a column has its own lightest and darkest. A narrower
        # span would make a difference of a thousandth look like a gulf.
        low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
        shares = (values - low) / np.maximum(high - low, _SPAN)
        ax.imshow(np.ma.masked_invalid(shares), cmap=MAP, vmin=0, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            # Dark numbers on the light half of the map.
            dark = not math.isfinite(value) or shares[i, j] > 0.5
            text = f"{value:.3f}" if math.isfinite(value) else "–"  # noqa: RUF001
            ax.text(
                j, i, text, ha="center", va="center", color="black" if dark else "white", fontsize=7
            )
        ax.grid(False)
        ax.set_xticks(
            range(values.shape[1]),
            [plain(str(name)) for name in matrix.frame],
            rotation=30,
            ha="right",
        )
        ax.set_yticks(range(values.shape[0]), [plain(str(name)) for name in matrix.frame.index])
        ax.set_title(plain(matrix.title))
        ax.set_ylabel("trained on")
    long = [
        matrix.frame.rename_axis("trained on")
        .reset_index()
        .melt("trained on", var_name="test")
        .assign(panel=matrix.title)
        for matrix in matrices
    ]
    yield Plot(
        slug("generalisation", sweep.model),
        f"{sweep.model}: generalisation of lenses",
        "Rows: training set of the lens; columns: test set, each with its own span of colours. "
        "Main metric of each task. " + " ".join(dict.fromkeys(matrix.note for matrix in matrices)),
        figure,
        pd.concat(long, ignore_index=True),
    )
