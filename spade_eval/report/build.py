"""Make a report: find the inputs, write tables and figures, put them into one page."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from tqdm import tqdm

from spade_eval.atomic import replacing_file
from spade_eval.errors import UserError
from spade_eval.report.baseline import read_run
from spade_eval.report.figures import sweep_figures
from spade_eval.report.files import dated_results
from spade_eval.report.formats import write_table
from spade_eval.report.page import source_rows, write_page
from spade_eval.report.spaces import read_states, space_figures
from spade_eval.report.styles import save, styled
from spade_eval.report.sweeps import (
    DOCUMENTS,
    by_model,
    is_sweep,
    read_sweep,
    short_adapters,
    task_name,
)
from spade_eval.report.tables import leaderboard, sweep_tables

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from spade_eval.report.formats import Table
    from spade_eval.report.runs import Run
    from spade_eval.report.styles import Plot
    from spade_eval.report.sweeps import Sweep


@dataclass(frozen=True)
class Made:
    """What a report holds."""

    tables: int
    figures: int
    remarks: list[str]


def make_report(inputs: Sequence[Path], output: Path, chosen_on: Sequence[Path] = ()) -> Made:
    """Write tables/, figures/ and report.html.

    Args:
        inputs: Folders of `spade-eval sweep`, results files or folders of lm-eval, or folders that
            hold such.
        output: Folder of the report; files of the same names in it are replaced, others stay and
            are remarked on.
        chosen_on: Folders of sweeps of other documents, on which settings are chosen.

    Raises:
        UserError: An input is missing, damaged, or something else; `output` cannot be written.
    """
    sweeps, runs, skipped = _read(inputs)
    others = _read(chosen_on)[0]
    named = short_adapters([*sweeps, *others])
    sweeps, others = named[: len(sweeps)], named[len(sweeps) :]
    choosers = _choosers(others, sweeps, chosen_on) if chosen_on else {}
    skipped += [
        f"{other.source} has no sweep.json: whether it is of other documents cannot be seen."
        for other in others
        if not other.about
    ]
    sources = source_rows(sweeps)
    sweeps, remarks = by_model(sweeps)
    for path in (path for sweep in sweeps for path in sweep.states.values()):
        read_states(path)  # a damaged file is told before anything is written
    tables: list[Table] = [leaderboard(runs, sweeps)]
    for sweep in sweeps:
        tables += sweep_tables(sweep, choosers.get(sweep.model))
    tables = [table for table in tables if not table.frame.empty]
    for table in tables:
        write_table(table, output / "tables")
    plots: list[tuple[Plot, Path]] = []
    for sweep in sweeps:
        with styled():
            for plot in tqdm(_figures(sweep), desc="Figures", unit="figure", disable=None):
                plots.append((plot, _write_plot(plot, output / "figures")))
    write_page(output / "report.html", sources, remarks, plots, tables)
    remarks += skipped
    remarks += _left(output / "tables", [table.name for table in tables])
    remarks += _left(output / "figures", [plot.name for plot, _ in plots])
    return Made(len(tables), len(plots), remarks)


def _left(folder: Path, names: Sequence[str]) -> list[str]:
    """A remark on files of other names, which may be an earlier report's."""
    found = (
        sorted(p.name for p in folder.iterdir() if p.stem not in names) if folder.exists() else []
    )
    if not found:
        return []
    more = f" and {len(found) - 4} more" if len(found) > 4 else ""
    return [f"{folder} also holds files not of this report: {', '.join(found[:4])}{more}."]


def _read(inputs: Sequence[Path]) -> tuple[list[Sweep], list[Run], list[str]]:
    """Find and read everything that the inputs name.

    Returns:
        Sweeps, results of lm-eval, and remarks on those in folders that are none.
    """
    sweeps: list[Sweep] = []
    runs: list[Run] = []
    skipped: list[str] = []
    for path in dict.fromkeys(given.expanduser() for given in inputs):
        if is_sweep(path.parent) and path.name.startswith("sweep."):
            path = path.parent
        if path.is_file():
            runs.append(read_run(path)[0])
            continue
        if not path.is_dir():
            raise UserError(
                f"{path}: there is no such file or folder. Give folders of `spade-eval sweep`, or "
                "results of lm-eval."
            )
        folders = sorted(p for p in (path, *path.rglob("*")) if p.is_dir() and is_sweep(p))
        # What lies inside a sweep's folder is part of the sweep.
        files = [f for f in dated_results(path) if not any(s in f.parents for s in folders)]
        if not folders and not files:
            raise UserError(
                f"The folder {path} holds no sweep (sweep.csv or sweep.parquet, made by "
                "`spade-eval sweep`) and no results of lm-eval (results_DATE.json)."
            )
        for folder in folders:
            sweeps += read_sweep(folder)
        for file in files:
            try:
                runs.append(read_run(file)[0])
            except UserError as err:
                if len(files) == 1 and not folders:
                    raise
                skipped.append(f"left out: {err}")
    return sweeps, runs, skipped


def _choosers(
    others: Sequence[Sweep], sweeps: Sequence[Sweep], paths: Sequence[Path]
) -> dict[str, Sweep]:
    """Sweeps on which settings are chosen, by model.

    Args:
        others: Sweeps of other documents.
        sweeps: Those that are reported.
        paths: Where the others are from, for messages.

    Raises:
        UserError: There are none of a model, or they are of the documents that are reported, or
            made in another way.
    """
    for sweep, other in product(sweeps, others):
        if other.model != sweep.model:
            continue
        tasks = sorted(set(sweep.cells["task"]))
        if same := [
            f"{task}: {other.made(task)['split']}" for task in tasks if sweep.shares(other, task)
        ]:
            raise UserError(
                f"--chosen-on: {other.source} is of the same documents as {sweep.source} "
                f"({', '.join(same)}). Sweep others: spade-eval sweep --split, of one split as "
                "validation[:500] and validation[500:]."
            )
        for _, task in sorted(sweep.subjects & other.subjects):
            if apart := other.apart(sweep, task, but=DOCUMENTS):
                raise UserError(
                    f"--chosen-on: {other.source} and {sweep.source} are sweeps of {task} with "
                    f"{', '.join(apart)}. Choose settings on a sweep that was made like the one "
                    "that is reported."
                )
    for sweep in sweeps:
        alike = [other for other in others if other.model == sweep.model]
        if alike and not any(other.subjects & sweep.subjects for other in alike):
            raise UserError(
                f"--chosen-on: {', '.join(other.source for other in alike)} and {sweep.source} "
                f"have no task under the same adapter in common: {_subjects(alike)}, and "
                f"{_subjects([sweep])}. Sweep other documents of the tasks that are reported."
            )
    found = {sweep.model: sweep for sweep in by_model(others)[0]}
    for model in (sweep.model for sweep in sweeps if sweep.model not in found):
        raise UserError(
            f"--chosen-on: no sweep of {model} in {', '.join(map(str, paths))}, only of "
            f"{', '.join(found) or 'no model'}. Sweep its validation documents: spade-eval "
            "sweep --split validation."
        )
    return found


def _subjects(sweeps: Sequence[Sweep]) -> str:
    every = {subject for sweep in sweeps for subject in sweep.subjects}
    return ", ".join(sorted(task_name(task, adapter) for adapter, task in every))


def _figures(sweep: Sweep) -> Iterator[Plot]:
    yield from sweep_figures(sweep)
    yield from space_figures(sweep)


def _write_plot(plot: Plot, folder: Path) -> Path:
    """Write NAME.png, NAME.pdf and the numbers, NAME.csv; returns the PNG file."""
    for ending in ("png", "pdf"):
        with replacing_file(folder / f"{plot.name}.{ending}") as new:
            save(plot.figure, new)
        plot.figure.set_layout_engine("none")  # laid out by now, which takes as long as drawing
    with replacing_file(folder / f"{plot.name}.csv") as new:
        plot.frame.to_csv(new, index=False)
    return folder / f"{plot.name}.png"
