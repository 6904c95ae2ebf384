"""Files and folders that are whole or not there: written under another name, and renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from spade_eval.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Hand out a new file's name beside `path`, and rename the file to that in the end.

    Raises:
        UserError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as work:
            new = Path(work) / path.name
            yield new
            os.replace(new, path)
    except (OSError, SafetensorError) as err:
        raise UserError(
            f"{path} cannot be written ({err}). Give a place that can be, with room for it."
        ) from err


def write_json(path: Path, content: object) -> None:
    """Write a file of JSON.

    Raises:
        UserError: It cannot be written.
    """
    with replacing_file(path) as new:
        new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def require_replaceable(folder: Path, what: str, owns: Callable[[str], object]) -> None:
    """Make sure that a folder holds nothing but what may go.

    Args:
        folder: The folder, which need not exist.
        what: What will take its place, for messages.
        owns: Whether a file of this name is part of such a thing.

    Raises:
        UserError: `folder` holds other files, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; the {what} is a folder. Give another name.")
    found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if others := [name for name in found if not owns(name)]:
        raise UserError(
            f"{folder} holds other files ({', '.join(others[:4])}), and the {what} replaces its "
            "folder. Move them away, or give another folder."
        )


@contextmanager
def replacing_folder(folder: Path, what: str, owns: Callable[[str], object]) -> Iterator[Path]:
    """Hand out an empty folder beside `folder`, and rename it to that in the end.

    An error in between leaves the old folder. Where there is none, it is one rename. Replacing one
    takes two: a process killed just between them leaves no `folder`, and both, whole, in the hidden
    folder beside it.

    Args:
        folder: The folder.
        what: What it holds, for messages.
        owns: See `require_replaceable`.

    Raises:
        UserError: `folder` holds other files, or cannot be written.
    """
    folder = folder.expanduser().resolve()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        require_replaceable(folder, what, owns)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            new, old = work / "new", work / "old"
            new.mkdir()
            yield new
            if folder.exists():
                os.replace(folder, old)
            try:
                os.replace(new, folder)
            except BaseException:
                if old.exists():
                    os.replace(old, folder)
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except (OSError, SafetensorError) as err:
        raise UserError(
            f"The {what} cannot be written to {folder} ({err}). Give a folder that can be, with "
            "room for it."
        ) from err
