"""A comparison as text: a Markdown table, which reads well in a terminal and in a CI summary."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from spade_eval.report.extra import needs_report_extra
from spade_eval.report.stats import least_p

with needs_report_extra():
    from tabulate import tabulate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from spade_eval.report.check import Compared, Comparison

_WIDEST = 40  # characters of a setting's value
_TEXT = {"task", "metric", "test", "verdict"}


def comparison_text(found: Comparison) -> str:
    """Everything that `compare` prints."""
    rows = [
        _cells(row, "a", "b")
        | {"test": _test(row), "p": _p(row.difference.p), "p (Holm)": _p(row.p)}
        for row in found.rows
    ]
    return "\n\n".join([_runs(found, "a", "b"), _table(rows), *_remarks(found)])


def check_text(found: Comparison, tolerance: float, alpha: float) -> str:
    """Everything that `check` prints.

    Args:
        found: The baseline, then the run.
        tolerance: Largest loss that is let pass.
        alpha: Chance of a false alarm.
    """
    words: dict[str, str] = {"same": "ok", "worse": "REGRESSION"}
    rows = []
    for row in found.rows:
        verdict = row.verdict(tolerance, alpha)
        shown = words.get(verdict, "group" if row.group else verdict)
        cells = _cells(row, "baseline", "run")
        rows.append(cells | {"test": _test(row), "p (Holm)": _p(row.p), "verdict": shown})
    worse = found.regressions(tolerance, alpha)
    rule = f"tolerance {tolerance:g}, alpha {alpha:g}, {_tests(found)}"
    end = [f"{row.task} {row.metric}: {_told(row)}" for row in worse]
    outcome = f"FAILED: {len(worse)} regression{'s'[: len(worse) > 1]}" if worse else "PASSED"
    parts = [_runs(found, "baseline", "run"), _table(rows), *_remarks(found)]
    parts += _blind(found, alpha)
    return "\n\n".join([*parts, "\n".join([f"{outcome} ({rule})", *end])])


def _blind(found: Comparison, alpha: float) -> list[str]:
    """A remark on tasks of so few documents that no difference of theirs could be significant."""
    tests = _tested(found)
    few = {
        row.task: row.difference.n
        for row in found.rows
        if not math.isnan(row.p) and least_p(row.difference) * tests >= alpha
    }
    if not few:
        return []
    told = ", ".join(f"{task} ({n})" for task, n in few.items())
    return [
        f"note: too few documents for {tests} test{'s'[: tests != 1]} to fail at alpha {alpha:g}, "
        f"whatever they lose: {told}."
    ]


def _runs(found: Comparison, a: str, b: str) -> str:
    """Which runs they are, and in what they differ."""
    width = max(len(a), len(b)) + 1
    lines = []
    for label, run in ((a, found.a), (b, found.b)):
        lines.append(f"{f'{label}:':<{width}} {run.name}, {run.source}")
        if computed := _computed(run.account):
            lines.append(f"{'':<{width}} {computed}")
    for key, values in found.settings.items():
        if None not in values:
            lines.append(f"differs: {key} {_short(values[0])} -> {_short(values[1])}")
    for label, side in ((a, 0), (b, 1)):
        # Models of other classes have settings of their own, twenty of them.
        own = [
            (key, values[side])
            for key, values in found.settings.items()
            if values[1 - side] is None
        ]
        if own:
            told = ", ".join(f"{key}={_short(value)}" for key, value in own)
            lines.append(f"only {label}: {told}")
    lines += [f"differs: {text}" for texts in found.conflicts.values() for text in texts]
    return "\n".join(lines)


def _computed(account: Mapping[str, Any]) -> str:
    """What a run's account says, in a line; empty for models that keep none."""
    known = {k: v for k, v in account.items() if isinstance(v, (int, float))}
    told = {
        "mean_exit_layer": "mean exit layer {:.2f}",
        "token_layer_ratio": "{:.1%} of full depth computed",
        "seconds": "{:.1f} s of scoring",
    }
    return ", ".join(text.format(known[key]) for key, text in told.items() if key in known)


def _remarks(found: Comparison) -> list[str]:
    notes = list(found.notes)
    tests = {row.difference.test for row in found.rows if not row.group}
    if "z" in tests:
        notes.append(
            "z tests compare averages by their standard errors and overlook small differences; "
            "with --log_samples in both runs documents are paired, where a metric is a mean over "
            "them or a perplexity."
        )
    if "none" in tests:
        notes.append("Without samples or a standard error there is no test.")
    if any(row.group for row in found.rows):
        notes.append("Groups are shown; their tasks are tested.")
    return ["\n".join(f"note: {note}" for note in notes)] if notes else []


def _table(rows: list[dict[str, str]]) -> str:
    align = ["left" if column in _TEXT else "right" for column in rows[0]]
    # Numbers are formatted here already; tabulate would read and round them again.
    return str(tabulate(rows, "keys", "pipe", disable_numparse=True, colalign=align))


def _cells(row: Compared, a: str, b: str) -> dict[str, str]:
    found = row.difference
    return {
        "task": row.task,
        "metric": row.metric,
        "n": "" if found.n is None else str(found.n),
        a: _number(found.a),
        b: _number(found.b),
        f"{b} - {a}": _number(found.b - found.a, sign=True),
        "95 % interval": _interval(found.low, found.high),
    }


def _test(row: Compared) -> str:
    return "" if row.group else row.difference.test


def _tested(found: Comparison) -> int:
    return sum(not math.isnan(row.p) for row in found.rows)


def _tests(found: Comparison) -> str:
    n = _tested(found)
    return f"{n} test{'s'[: n != 1]}"


def _told(row: Compared) -> str:
    a, b = row.difference.a, row.difference.b
    if not math.isfinite(b):
        return f"{_number(a)} before, now {b}"
    share = not row.higher_is_better and math.isfinite(row.loss)
    amount = f"{row.loss:.1%}" if share else f"{abs(a - b):.4g}"
    return f"{_number(a)} -> {_number(b)}, {amount} worse (p {_p(row.p)})"


def _number(value: float, sign: bool = False) -> str:
    if math.isnan(value):
        return "nan"
    digits = 4 if abs(value) < 10 else 2
    return f"{value:{'+' if sign else ''}.{digits}f}"


def _interval(low: float, high: float) -> str:
    return "" if math.isnan(low) else f"{_number(low, sign=True)} .. {_number(high, sign=True)}"


def _p(value: float) -> str:
    if math.isnan(value):
        return ""
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 3]}..."
