"""Tables as CSV, Markdown and LaTeX."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from spade_eval.atomic import replacing_file
from spade_eval.report.extra import needs_report_extra

with needs_report_extra():
    from tabulate import tabulate

if TYPE_CHECKING:
    from pathlib import Path


_PAGE = 40  # rows that fit one in LaTeX


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        name: Stem of its files.
        title: What it shows.
        note: How its numbers came about.
        frame: The numbers; a column "± x" holds the standard errors of the column x before it.
    """

    name: str
    title: str
    note: str
    frame: pd.DataFrame


def write_table(table: Table, folder: Path) -> None:
    """Write NAME.csv with the numbers, NAME.md and NAME.tex with them rounded for reading."""
    with replacing_file(folder / f"{table.name}.csv") as new:
        table.frame.to_csv(new, index=False)
    with replacing_file(folder / f"{table.name}.md") as new:
        new.write_text(f"## {table.title}\n\n{markdown(table)}\n\n{table.note}\n", encoding="utf-8")
    with replacing_file(folder / f"{table.name}.tex") as new:
        new.write_text(latex(table), encoding="utf-8")


def markdown(table: Table) -> str:
    """The table in Markdown."""
    shown = readable(table.frame)
    align = ["right" if numeric(table.frame, column) else "left" for column in shown]
    shown = shown.map(_no_bars).rename(columns=_no_bars)
    text = tabulate(shown, "keys", "pipe", disable_numparse=True, colalign=align, showindex=False)
    return str(text)


def latex(table: Table) -> str:
    """The table in LaTeX, for the packages booktabs and, where it is long, longtable."""
    shown = readable(table.frame)
    align = "".join("r" if numeric(table.frame, column) else "l" for column in shown)
    text = shown.to_latex(
        index=False,
        escape=True,
        caption=_escape(table.title),
        label=f"tab:{table.name}",
        column_format=align,
        position="tbp",
        longtable=len(shown) > _PAGE,
    )
    return str(text).replace("±", r"$\pm$")


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """Numbers as text, each with the standard error that stands in the column behind it."""
    shown = pd.DataFrame(index=frame.index)
    for column in frame:
        if column.startswith("± ") and column != "± stderr":
            continue
        values = frame[column].map(number if numeric(frame, column) else str)
        error = "± stderr" if column == "value" else f"± {column}"
        if error in frame:
            errors = frame[error].map(number)
            values = values.where(errors == "", values + " ± " + errors)
        if column != "± stderr":
            shown[column] = values
    return shown


def numeric(frame: pd.DataFrame, column: str) -> bool:
    """Whether a column holds numbers."""
    return pd.api.types.is_numeric_dtype(frame[column])


def number(value: float) -> str:
    """A number with three digits behind the point, or four significant ones; NaN is empty."""
    if value is None or math.isnan(value):
        return ""
    if math.isinf(value) or value == round(value):
        return f"{value:g}" if abs(value) < 1e6 else f"{value:.3e}"
    return f"{value:.3f}" if 0.001 <= abs(value) < 1000 else f"{value:.4g}"


def _no_bars(text: str) -> str:
    return text.replace("|", r"\|")


def _escape(text: str) -> str:
    """Escape a caption, which pandas leaves as it is."""
    for character, escaped in (("\\", r"\textbackslash "), *((c, f"\\{c}") for c in "&%$#_{}")):
        text = text.replace(character, escaped)
    return text.replace("~", r"\textasciitilde ").replace("^", r"\textasciicircum ")
