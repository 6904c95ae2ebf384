"""The long table of a sweep: one line per cell and metric."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spade_eval.sweep.grid import Exit, Reading

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from spade_eval.cost import Account
    from spade_eval.sweep.grid import Grid

COLUMNS = (
    "model", "adapter", "decoder", "lens_data", "task", "layer", "threshold", "confidence",
    "exit_scope", "readout", "metric", "value", "stderr", "n", "mean_exit_layer",
    "token_layer_ratio", "seconds",
)  # fmt: skip


def cells(grid: Grid, whole_texts: bool) -> list[tuple[dict[str, Any], int]]:
    """The cells of a task's table: their columns, and the row of the kept arrays.

    Args:
        grid: The sweep's grid.
        whole_texts: Whether the task scores whole texts, where every token decides for itself.
    """
    found: list[tuple[dict[str, Any], int]] = []
    for reading in grid.table:
        found.append((_columns(reading), grid.index(reading)))
    seen = set()
    for number, exit_ in enumerate(grid.exits, len(grid.readings)):
        scope = "token" if whole_texts else exit_.rule.exit_scope
        columns = {**_columns(exit_), "exit_scope": scope}
        if whole_texts and exit_.rule.confidence == "choice_entropy":
            continue
        if (same := tuple(columns.values())) not in seen:
            seen.add(same)
            found.append((columns, number))
    return found


def _columns(cell: Reading | Exit) -> dict[str, Any]:
    if isinstance(cell, Reading):
        return {"decoder": cell.decoder, "lens_data": cell.lens, "layer": cell.layer}
    rule = cell.rule
    return {
        "decoder": "spade_exit" if rule.readout == "spade" else "lens_exit",
        "lens_data": cell.lens,
        "threshold": rule.threshold,
        "confidence": rule.confidence,
        "exit_scope": rule.exit_scope,
        "readout": rule.readout,
    }


def cost(account: Account, columns: dict[str, Any]) -> dict[str, Any]:
    """What a cell would have computed by itself."""
    report = account.total.report(account.start_token_layers)
    mean = columns["layer"] if "layer" in columns else report["mean_exit_layer"]
    return {"mean_exit_layer": mean, "token_layer_ratio": report["token_layer_ratio"]}


def frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The rows as a table with `COLUMNS`."""
    import pandas as pd

    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.astype({"layer": "Int64", "n": "Int64"})


def write(table: pd.DataFrame, folder: Path, name: str, csv: bool = True) -> None:
    """Write a table as parquet and CSV."""
    table.to_parquet(folder / f"{name}.parquet", index=False)
    if csv:
        table.to_csv(folder / f"{name}.csv", index=False)
