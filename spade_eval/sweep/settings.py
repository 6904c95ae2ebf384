"""What `spade-eval sweep` is asked for, and what its output folder may hold."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from spade_eval.atomic import require_replaceable
from spade_eval.errors import UserError, differences
from spade_eval.fit import work
from spade_eval.sweep.grid import Ask

if TYPE_CHECKING:
    from pathlib import Path

CONFIG, TABLE, SAMPLES = "sweep.json", "sweep", "samples"
STATES = "states_{}.safetensors"  # of a task
OWN = re.compile(rf"{TABLE}\.(json|csv|parquet)|{SAMPLES}\.parquet|{STATES.format('.*')}")


@dataclass(frozen=True)
class SweepSettings:
    """What to sweep.

    Attributes:
        output: Folder of the table.
        tasks: lm-eval tasks.
        ask: Decoders, layers, thresholds.
        model_args: As on the command line.
        lenses: (name, folder or hub id).
        split: Whose documents are taken; None takes those that the task evaluates.
        limit: Documents per task, as lm-eval's `--limit`; None takes all.
        num_fewshot: Examples in the prompt; None is the task's own number.
        apply_chat_template: Whether prompts go through the model's chat template.
        log_samples: Whether each cell's log-likelihoods are written too.
        keep_states: Whether the hidden states where contexts end are written too.
        batch_size: As in lm-eval.
        seed: For few-shot examples.
        bootstrap_iters: As lm-eval's.
    """

    output: Path
    tasks: tuple[str, ...]
    ask: Ask = field(default_factory=Ask)
    model_args: str = ""
    lenses: tuple[tuple[str, str], ...] = ()
    split: str | None = None
    limit: float | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    log_samples: bool = False
    keep_states: bool = False
    batch_size: str = "16"
    seed: int = 1234
    bootstrap_iters: int = 1000

    @property
    def work(self) -> Path:
        """The folder of a sweep that has not ended."""
        output = self.output.absolute()  # "." has no name
        return output.parent / f".{output.name}.sweep"

    def describe(self) -> dict[str, Any]:
        """All that cells depend on, as JSON holds it."""
        entries = {**asdict(self), **asdict(self.ask)}
        del entries["ask"], entries["output"]
        return json.loads(json.dumps(entries))


def check_output(settings: SweepSettings, resume: bool, overwrite: bool) -> None:
    """Refuse to mix sweeps, before anything is loaded.

    Raises:
        UserError: Says what is there, what differs, and what to do.
    """
    output, work_folder = settings.output, settings.work
    if work.taken(output) and not (output / CONFIG).is_file():
        raise UserError(f"{output} is no sweep's folder: give another --output.")
    if overwrite:
        require_replaceable(output, "sweep", OWN.fullmatch)
    elif work.taken(output):
        raise UserError(
            f"{output} holds a sweep{_apart(output / CONFIG, settings)}. Give another --output, or "
            "--overwrite to replace it."
        )
    apart = _apart(work_folder / work.SETTINGS, settings) if work_folder.exists() else ""
    if apart and not overwrite:
        raise UserError(
            f"{work_folder} holds a sweep that has not ended,{apart}. Give the same arguments and "
            "--resume, another --output, or --overwrite."
        )
    work.require_free(output, work_folder, resume, overwrite)


def _apart(path: Path, settings: SweepSettings) -> str:
    """How the settings of a file differ from these, for a message."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        was = found.get("settings", found)
    except (OSError, ValueError, AttributeError):
        return ""
    now = settings.describe()
    apart = differences({name: was.get(name) for name in now}, now)
    return f" of another configuration ({apart})" if apart else ""
