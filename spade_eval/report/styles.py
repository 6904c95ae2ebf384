"""How curves and points look: apart in colour, in greyscale, and in print."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spade_eval.report.extra import needs_report_extra

with needs_report_extra():
    import matplotlib as mpl
    from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import pandas as pd

MAP = "cividis"  # even in lightness, and the same for colour-blind readers
# Okabe and Ito's colours, which colour-blind readers tell apart, less the yellow.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p", "h")
_LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
_LETTER = 0.058  # mean width of a letter in a legend, inches
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


@contextmanager
def styled() -> Iterator[None]:
    """Draw inside in the report's style."""
    with mpl.rc_context(_RC):
        yield


def panels(
    count: int, *, columns: int = 3, width: float = 2.9, height: float = 2.4
) -> tuple[Figure, list[Any]]:
    """A figure of panels in a grid, and as many axes, row by row."""
    columns = 2 if count == 4 else min(columns, count)
    rows = -(-count // columns)
    with styled():
        figure = Figure(figsize=(width * columns + 0.4, height * rows + 0.2), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def curve_styles(groups: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """A line and a marker for each curve, and a colour for each group of curves.

    Args:
        groups: The group of each curve, by the curve's name.
    """
    colours = list(dict.fromkeys(groups.values()))
    return {
        name: {
            "color": _COLOURS[colours.index(group) % len(_COLOURS)],
            "linestyle": _LINES[i % len(_LINES)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "markersize": 3.5,
            "linewidth": 1.2,
        }
        for i, (name, group) in enumerate(groups.items())
    }


def markers(names: Sequence[str]) -> dict[str, str]:
    """A marker for each kind of point, whose colour says something else."""
    return {name: _MARKERS[i % len(_MARKERS)] for i, name in enumerate(names)}


def plain(text: str) -> str:
    """Text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")


def legend_below(figure: Figure, handles: Mapping[str, Any]) -> None:
    """One legend for all panels; the figure grows by it."""
    if not handles:
        return
    width, height = figure.get_size_inches()
    entry = max(map(len, handles)) * _LETTER + 0.5
    columns = max(1, min(len(handles), int(width / entry)))
    figure.set_size_inches(width, height + 0.17 * -(-len(handles) // columns))
    figure.legend(
        handles.values(),
        [plain(name) for name in handles],
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=7.5,
    )


def save(figure: Figure, path: Path) -> None:
    """Write a PNG or PDF that is the same each time: it carries neither date nor versions."""
    metadata = (
        {"Software": None} if path.suffix == ".png" else {"CreationDate": None, "Producer": None}
    )
    with styled():
        figure.savefig(path, dpi=200, metadata=metadata)
