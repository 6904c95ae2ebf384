"""What `spade-eval sweep` is asked for, and what its output folder may hold."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spade_eval.errors import UserError
from spade_eval.lm.cache import differences
from spade_eval.sweep.grid import Ask

CONFIG, TABLE = "sweep.json", "sweep"


@dataclass(frozen=True)
class SweepSettings:
    """What to sweep.

    Attributes:
        output: Folder of the table.
        tasks: lm-eval tasks.
        ask: Decoders, layers, thresholds.
        model_args: As on the command line.
        lenses: (name, folder or hub id).
        limit: Documents per task, as lm-eval's `--limit`; None takes all.
        num_fewshot: Examples in the prompt; None is the task's own number.
        apply_chat_template: Whether prompts go through the model's chat template.
        log_samples: Whether each cell's log-likelihoods are written too.
        batch_size: As in lm-eval.
        seed: For few-shot examples.
    """

    output: Path
    tasks: tuple[str, ...]
    ask: Ask = field(default_factory=Ask)
    model_args: str = ""
    lenses: tuple[tuple[str, str], ...] = ()
    limit: float | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    log_samples: bool = False
    batch_size: str = "16"
    seed: int = 1234

    @property
    def work(self) -> Path:
        """The folder of a sweep that has not ended."""
        output = self.output.absolute()  # "." has no name
        return output.parent / f".{output.name}.sweep"

    def describe(self) -> dict[str, Any]:
        """All that cells depend on, as JSON holds it."""
        found = {**asdict(self), "output": None}
        return json.loads(json.dumps(found, default=str))


def check_output(settings: SweepSettings, resume: bool, overwrite: bool) -> None:
    """Refuse to mix sweeps, before anything is loaded.

    Raises:
        UserError: Says what is there, what differs, and what to do.
    """
    output, work = settings.output, settings.work
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file: give another --output.")
    if output.exists() and any(output.iterdir()) and not overwrite:
        if not (output / CONFIG).is_file():
            raise UserError(f"{output} holds files of something else: give another --output.")
        raise UserError(f"{output} holds a finished sweep{_apart(output, settings)}. Give another "
                        "--output, or --overwrite to replace it.")  # fmt: skip
    if overwrite and output.exists() and any(output.iterdir()) and not (output / CONFIG).is_file():
        raise UserError(f"{output} holds files of something else: give another --output.")
    if work.exists() and not (resume or overwrite):
        raise UserError(
            f"{work} holds a sweep that has not ended{_apart(work, settings)}: --resume goes on "
            "with it, --overwrite begins anew."
        )
    if resume and not work.exists():
        raise UserError(f"There is nothing to resume: {work} does not exist. Leave --resume out.")
    if resume and (apart := _apart(work, settings)):
        raise UserError(
            f"{work} holds another sweep{apart}. Give the same arguments, another --output, or "
            "--overwrite instead of --resume."
        )


def claim(settings: SweepSettings, fingerprint: dict[str, Any], overwrite: bool) -> None:
    """Begin the work folder, or make sure that it is of the same model.

    Raises:
        UserError: It is of another model.
    """
    work = settings.work
    if overwrite:
        shutil.rmtree(work, ignore_errors=True)
    now = json.loads(json.dumps(fingerprint, default=str))
    was = _read(work / CONFIG)
    if was and was.get("fingerprint") != now:
        raise UserError(
            f"{work} holds a sweep of another model or version "
            f"({differences(was.get('fingerprint') or {}, now)}). Give another --output, or "
            "--overwrite instead of --resume."
        )
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / CONFIG, {"settings": settings.describe(), "fingerprint": now})


def write_json(path: Path, content: Any) -> None:
    """Write JSON under a temporary name and rename it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
    Path(temporary).chmod(0o644)
    Path(temporary).rename(path)


def _apart(folder: Path, settings: SweepSettings) -> str:
    """How the settings of a folder differ from these, for a message."""
    was = (_read(folder / CONFIG) or {}).get("settings")
    if was is None:
        return ""
    apart = differences(_flat(was), _flat(settings.describe()))
    return f" of another configuration ({apart})" if apart else ""


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    ask = settings.get("ask") or {}
    return {**{k: v for k, v in settings.items() if k != "ask"}, **ask}


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
