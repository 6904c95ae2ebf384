"""How curves and points look: apart in colour, in greyscale, and in print."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spade_eval.report.extra import needs_report_extra

with needs_report_extra():
    import matplotlib as mpl
    from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd

MAP = "cividis"  # even in lightness, and the same for colour-blind readers
# Okabe and Ito's colours, which colour-blind readers tell apart, less the yellow.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p", "h")
_LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
_RC: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "pdf.fonttype": 42,  # text stays text
    "svg.hashsalt": "spade_eval",
}


@dataclass(frozen=True)
class Plot:
    """One figure.

    Attributes:
        name: Stem of its files.
        title: What it shows.
        caption: How to read it.
        figure: The drawing.
        frame: The numbers behind it.
    """

    name: str
    title: str
    caption: str
    figure: Figure
    frame: pd.DataFrame


def panels(
    count: int, *, columns: int = 3, width: float = 2.9, height: float = 2.4
) -> tuple[Figure, list[Any]]:
    """A figure of panels in a grid, and as many axes, row by row."""
    columns = min(columns, count)
    rows = -(-count // columns)
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(width * columns + 0.4, height * rows + 0.7), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def curve_styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour, a line and a marker for each curve."""
    return {
        name: {
            "color": _COLOURS[i % len(_COLOURS)],
            "linestyle": _LINES[i % len(_LINES)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "markersize": 3.5,
            "linewidth": 1.2,
        }
        for i, name in enumerate(names)
    }


def markers(names: Sequence[str]) -> dict[str, str]:
    """A marker for each kind of point, whose colour says something else."""
    return {name: _MARKERS[i % len(_MARKERS)] for i, name in enumerate(names)}


def plain(text: str) -> str:
    """Text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")


def legend_below(figure: Figure, handles: dict[str, Any]) -> None:
    """One legend for all panels."""
    if handles:
        figure.legend(
            handles.values(),
            [plain(name) for name in handles],
            loc="outside lower center",
            ncols=min(4, len(handles)),
            frameon=False,
            fontsize=7.5,
        )


def save(figure: Figure, path: Path) -> None:
    """Write a PNG or PDF that is the same each time: it carries neither date nor versions."""
    metadata = (
        {"Software": None} if path.suffix == ".png" else {"CreationDate": None, "Producer": None}
    )
    with mpl.rc_context(_RC):
        figure.savefig(path, dpi=200, metadata=metadata)
