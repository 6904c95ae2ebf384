"""Sweep tables: one row per task, decoder, layer or threshold, and metric."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from spade_eval.errors import UserError
from spade_eval.report.files import load_json
from spade_eval.splits import Split

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_TEXT = (
    "model", "adapter", "decoder", "lens_data", "task", "confidence", "exit_scope", "readout",
    "metric",
)  # fmt: skip
_NUMBERS = (
    "layer", "threshold", "value", "stderr", "n", "mean_exit_layer", "token_layer_ratio", "seconds",
)  # fmt: skip
_TABLES = ("sweep.parquet", "sweep.csv")
DOCUMENTS = ("split", "limit")  # what decides which documents of a task are swept
FULL = "full"  # the decoder that is the whole model

_KNOWN = {
    FULL: "full model",
    "logit_lens": "logit lens",
    "tuned_lens": "tuned lens",
    "spade_nos": "SPADE-NoS",
    "spade": "SPADE",
    "l_spade": "L-SPADE",
    "lens_exit": "lens exit",
    "spade_exit": "SPADE-EXIT",
}
EXPONENTIALS = ("perplexity", "word_perplexity", "byte_perplexity")  # of a mean over documents
PERPLEXITIES = (*EXPONENTIALS, "bits_per_byte")
_MAIN = ("acc", "acc_norm", "exact_match", "word_perplexity", "byte_perplexity", "bits_per_byte")


@dataclass(frozen=True)
class Sweep:
    """One folder of `spade-eval sweep`.

    Attributes:
        source: The folder.
        cells: The table, columns as in sweep.csv, but `gain` for 1 / token_layer_ratio, and `lower`
            for whether less is better; texts are never missing, numbers may be NaN.
        n_layers: L.
        about: What sweep.json tells about the run.
        states: Files of hidden states, by task.
    """

    source: str
    cells: pd.DataFrame
    n_layers: int
    about: dict[str, Any] = field(default_factory=dict)
    states: dict[str, Path] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """The model's name."""
        return str(self.cells["model"].iloc[0])

    def shares(self, other: Sweep, task: str) -> bool:
        """Whether both may have swept the same documents of a task, as far as sweep.json tells."""
        return any(a.overlaps(b) for a in self._documents(task) for b in other._documents(task))

    def _documents(self, task: str) -> Iterator[Split]:
        """What was swept of a split: by our name, and by that which the data set gives it."""
        own, limit = _entry(self.about, "tasks", task), _entry(self.about, "settings").get("limit")
        if "split" not in own:
            return
        split = Split.parse(str(own["split"]))
        if isinstance(limit, (int, float)) and limit >= 1:
            end = split.start + int(limit)
            split = replace(split, stop=end if split.stop is None else min(split.stop, end))
        yield split
        if "rows" in own:
            yield replace(split, name=f"data set's {own['rows']}")

    @property
    def subjects(self) -> set[tuple[str, str]]:
        """Adapters, and the tasks that were swept under them."""
        return set(zip(self.cells["adapter"], self.cells["task"], strict=True))

    def made(self, task: str) -> dict[str, str]:
        """What decides about a task's questions and answers, as far as sweep.json tells."""
        own, settings = _entry(self.about, "tasks", task), _entry(self.about, "settings")
        told = {
            "split": own,
            "version": own,
            "num_fewshot": own,
            "limit": settings,
            "apply_chat_template": settings,
            "positions": _entry(self.about, "sweep"),
        }
        made = {name: str(found[name]) for name, found in told.items() if name in found}
        if "adapter_fingerprint" in self.about:
            made["adapter_fingerprint"] = str(self.about["adapter_fingerprint"])
        if isinstance(arguments := settings.get("model_args"), str):
            given = dict(part.partition("=")[::2] for part in arguments.split(","))
            made["dtype"] = given.get("dtype", "auto")
            made["revision"] = given.get("revision", "main")
        if is_exit(self.cells[self.cells["task"] == task]).any() and "interval" in settings:
            least = settings.get("min_layer")
            made["interval"] = str(settings["interval"])
            made["min_layer"] = str((self.n_layers + 1) // 2 if least is None else least)
        for name in _entry(self.about, "sweep", "lenses"):
            lens = _entry(self.about, "sweep", "lenses", name)
            made[f"lens {name}"] = str(lens.get("lens_weights", ""))
        return made

    def apart(self, other: Sweep, task: str, but: Sequence[str] = ()) -> list[str]:
        """How another sweep of the task was made, for a message, where that is not like this one.

        Args:
            other: The other sweep.
            task: The task.
            but: What may differ.
        """
        was, now = self.made(task), other.made(task)
        both = [name for name in was if name in now and name not in but]
        return [f"{name} {was[name]} and {now[name]}" for name in both if was[name] != now[name]]


def is_sweep(folder: Path) -> bool:
    """Whether a folder holds a sweep table."""
    return any((folder / name).is_file() for name in _TABLES)


def read_sweep(folder: Path) -> list[Sweep]:
    """Read a folder of `spade-eval sweep`, by model.

    Raises:
        UserError: The table cannot be read, is empty, or lacks columns.
    """
    path = next(folder / name for name in _TABLES if (folder / name).is_file())
    try:
        raw = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except (OSError, ValueError) as err:  # pandas and pyarrow raise kinds of ValueError
        raise UserError(f"{path} cannot be read as a table ({err}). Run the sweep again.") from err
    if lacking := [name for name in (*_TEXT, *_NUMBERS) if name not in raw]:
        raise UserError(
            f"{path} lacks the columns {', '.join(lacking)}. Is it a table of `spade-eval sweep`?"
        )
    if raw.empty:
        raise UserError(f"{path} has no rows. Run the sweep again.")
    if path.suffix == ".csv" and not path.read_bytes().endswith(b"\n"):
        raise UserError(f"{path} ends in the middle of a line. Is it cut off? Run the sweep again.")
    cells = pd.DataFrame({name: raw[name].astype("object").fillna("").map(str) for name in _TEXT})
    for name in _NUMBERS:
        try:
            cells[name] = pd.to_numeric(raw[name]).astype("float64")
        except (ValueError, TypeError) as err:
            raise UserError(
                f"{path}: the column {name} holds something else than numbers ({err})."
            ) from err
    # How many times as much the full model computes: what speed is read against.
    share = cells.pop("token_layer_ratio")
    cells["gain"] = 1 / share.where(share > 0)
    about = load_json(folder / "sweep.json") if (folder / "sweep.json").is_file() else {}
    better = {task: _entry(about, "tasks", task, "higher_is_better") for task in set(cells["task"])}
    cells["lower"] = [
        not better[task].get(metric, metric not in PERPLEXITIES)
        for task, metric in zip(cells["task"], cells["metric"], strict=True)
    ]
    states = {
        path.name.removeprefix("states_").removesuffix(".safetensors"): path
        for path in sorted(folder.glob("states_*.safetensors"))
    }
    found = []
    for _, part in cells.groupby("model"):
        n_layers = about.get("n_layers", part["layer"].max())
        if not (isinstance(n_layers, (int, float)) and n_layers > 0):
            raise UserError(f"{folder}: neither sweep.json nor a row tells the number of layers.")
        found.append(Sweep(str(folder), part, int(n_layers), about, states))
    return found


def by_model(sweeps: Sequence[Sweep]) -> tuple[list[Sweep], list[str]]:
    """Put sweeps of the same model together, such as those of different tasks.

    Returns:
        One sweep per model, and remarks on what was measured twice and came out differently.

    Raises:
        UserError: Sweeps of one model disagree about its layers, or about how a task was swept.
    """
    merged: list[Sweep] = []
    remarks = []
    models: dict[str, list[Sweep]] = {}
    for sweep in sweeps:
        models.setdefault(sweep.model, []).append(sweep)
    for model, parts in models.items():
        if len({part.n_layers for part in parts}) > 1:
            raise UserError(
                f"{', '.join(part.source for part in parts)}: sweeps of {model} with "
                f"{', '.join(str(part.n_layers) for part in parts)} layers. Report them apart."
            )
        _require_alike(parts)
        cells = pd.concat([part.cells for part in parts], ignore_index=True)
        names = [*_TEXT, "layer", "threshold"]
        kept = cells.drop_duplicates(names, keep="last", ignore_index=True)
        # Machines differ in the last digits.
        values = cells.assign(value=cells["value"].map("{:.5g}".format))
        if other := len(values.drop_duplicates([*names, "value"])) - len(kept):
            again = f"{other} cells were measured twice, with other values"
            remarks.append(f"{model}: {again}; the last one is shown.")
        states = {name: path for part in parts for name, path in _named_states(part, parts)}
        source = ", ".join(dict.fromkeys(part.source for part in parts))
        merged.append(replace(parts[0], source=source, cells=kept, states=states))
    return merged, remarks


def _named_states(part: Sweep, parts: Sequence[Sweep]) -> Iterator[tuple[str, Path]]:
    """Files of states; the adapter is in the name where several have states of a task."""
    for task, path in part.states.items():
        of = {str(p.cells["adapter"].iloc[0]) for p in parts if task in p.states}
        yield (task_name(task, str(part.cells["adapter"].iloc[0])) if len(of) > 1 else task), path


def _require_alike(parts: Sequence[Sweep]) -> None:
    """Refuse sweeps of a task that were not made alike: their cells cannot stand in one table."""
    first: dict[tuple[str, str], Sweep] = {}
    for part in parts:
        for key in part.subjects:
            other, task = first.setdefault(key, part), key[1]
            if apart := other.apart(part, task):
                choose = ", or choose settings on the one and report the other (--chosen-on)"
                only = other.apart(part, task, but=DOCUMENTS)
                raise UserError(
                    f"{other.source} and {part.source}: sweeps of {part.model} on {task} with "
                    f"{', '.join(apart)}. Report them apart{'' if only else choose}."
                )


def _entry(content: Any, *names: str) -> dict[str, Any]:
    """An object inside of JSON; an empty one where there is something else."""
    for name in names:
        content = content.get(name) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else {}


def main_metric(metrics: pd.Series) -> str:
    """The metric that figures show of a task, out of those that it has."""
    found = set(metrics)
    return next((name for name in _MAIN if name in found), min(found))


def short_adapters(sweeps: Sequence[Sweep]) -> list[Sweep]:
    """Name adapters by the last parts of their paths, as few as tell all of them apart."""
    paths = {path for sweep in sweeps for path in sweep.cells["adapter"]}
    parts = {path: re.split(r"[/\\]+", path.rstrip("/\\")) for path in paths}
    names = {path: path for path in paths}
    for n in range(max(map(len, parts.values()), default=1), 0, -1):
        shorter = {path: "/".join(own[-n:]) for path, own in parts.items()}
        if len(set(shorter.values())) < len(paths):
            break
        names = shorter
    return [
        replace(sweep, cells=sweep.cells.assign(adapter=sweep.cells["adapter"].map(names)))
        for sweep in sweeps
    ]


def is_exit(cells: pd.DataFrame) -> pd.Series:
    """Which rows belong to early exits: those with a threshold."""
    return cells["threshold"].notna()


def decoder_name(decoder: str) -> str:
    """A decoder's name in print; an unknown one keeps its own."""
    return _KNOWN.get(decoder, decoder)


def decoder_order(decoder: str) -> tuple[int, str]:
    """Sorts decoders: known ones as in `_KNOWN`, then the others by name."""
    known = list(_KNOWN)
    return (known.index(decoder) if decoder in known else len(known), decoder)


def series_name(decoder: str, lens_data: str) -> str:
    """A curve's name: "L-SPADE (arc)"."""
    return f"{decoder_name(decoder)} ({lens_data})" if lens_data else decoder_name(decoder)


def task_name(task: str, adapter: str) -> str:
    """A task's name, with the adapter that the model wore."""
    return f"{task} [{adapter}]" if adapter else task


def slug(*parts: str) -> str:
    """A file name of a few words."""
    return "-".join(re.sub(r"[^\w.]+", "-", part).strip("-.") for part in parts if part)
