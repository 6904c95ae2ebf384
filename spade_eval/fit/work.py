"""The work folder of a run that can be killed and resumed; it belongs to one configuration."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from spade_eval.atomic import write_json
from spade_eval.errors import UserError, differences

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SETTINGS = "settings.json"
LOCK = "lock"


def require_free(output: Path, work: Path, resume: bool, overwrite: bool) -> None:
    """Refuse to overwrite an output, or what a run that was stopped has left of it.

    Args:
        output: The folder to be.
        work: The folder of a run that has not ended.
        resume: Whether to go on there.
        overwrite: Whether to replace what is there.

    Raises:
        UserError: Says what is there and what to do.
    """
    if taken(output) and not overwrite:
        raise UserError(f"{output} exists. Give another --output, or --overwrite to replace it.")
    if work.exists() and not (resume or overwrite):
        raise UserError(
            f"{work} holds a run that has not ended: --resume goes on with it, --overwrite begins "
            "anew."
        )
    if resume and not work.exists():
        raise UserError(f"There is nothing to resume: {work} does not exist. Leave --resume out.")


def taken(output: Path) -> bool:
    """Whether there is anything at `output` but an empty folder.

    A rename will take the folder's place, so the one that the user stands in is taken, too.
    """
    if not output.is_dir() or output.samefile(Path.cwd()):
        return output.exists()
    return any(output.iterdir())


@contextmanager
def at_work(work: Path, main: bool) -> Iterator[None]:
    """Keep other runs out of the work folder, which is made; what is empty at the end is removed.

    Args:
        work: The folder.
        main: Whether this is the process that writes.

    Raises:
        UserError: Another run is at work there, or the folder cannot be written.
    """
    if not main:
        yield
        return
    lock = FileLock(work / LOCK, timeout=0)  # the system frees it if this process is killed
    with _writing(work):
        work.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as err:
            raise UserError(
                f"Another run is at work in {work}. Wait until it has ended, or stop it and go on "
                "with --resume."
            ) from err
    try:
        yield
    finally:
        lock.release()
        if all(path.name == LOCK for path in work.iterdir()):
            shutil.rmtree(work)


def clear(work: Path) -> None:
    """Remove everything but the lock."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def claim(
    work: Path, about: dict[str, Any], *, anew: bool, main: bool, wait: Callable[[], None]
) -> None:
    """Make sure that the work folder is of the same configuration.

    Args:
        work: The folder.
        about: The configuration; JSON.
        anew: Whether to remove what is there.
        main: Whether this is the process that writes.
        wait: Returns when all processes have called it.

    Raises:
        UserError: The folder is of another configuration, or cannot be written.
    """
    path = work / SETTINGS
    if main:
        with _writing(work):
            if anew:
                clear(work)
            if not path.exists():
                write_json(path, about)
    wait()
    if differs := differences(json.loads(path.read_text()), about):
        raise UserError(
            f"{work} holds a run with other settings ({differs}). Resume with the same ones, or "
            "begin anew with --overwrite."
        )


@contextmanager
def _writing(work: Path) -> Iterator[None]:
    """Tell the user what the system refuses."""
    try:
        yield
    except OSError as err:
        raise UserError(f"{work} cannot be written: {err.strerror}.") from err
