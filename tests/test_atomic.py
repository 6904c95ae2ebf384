"""Files and folders appear whole, and the old ones stay if something fails."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from spade_eval.atomic import replacing_file, replacing_folder, require_replaceable, write_json
from spade_eval.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path


class Killed(BaseException):
    """Not an Exception: nothing may swallow it."""


def test_a_file_that_is_there_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(Killed), replacing_file(path) as new:
        new.write_text("half of i")
        raise Killed
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert list(path.parent.iterdir()) == [path]
    write_json(path, [])
    assert path.read_text() == "[]\n"
    assert list(path.parent.iterdir()) == [path]


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/a.json cannot be written"):
        write_json(tmp_path / "file" / "a.json", {})
    with (
        pytest.raises(UserError, match=r"The lens cannot be written to .*file/lens"),
        replacing_folder(tmp_path / "file" / "lens", "lens", {"a"}.__contains__),
    ):
        pass


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "lens"
    with replacing_folder(folder, "lens", {"a"}.__contains__) as new:
        (new / "a").write_text("old")
    (folder / "thesis.tex").write_text("")
    with (
        pytest.raises(UserError, match=r"holds other files \(thesis.tex\), and the lens replaces"),
        replacing_folder(folder, "lens", {"a"}.__contains__),
    ):
        pass
    (folder / "thesis.tex").unlink()
    with pytest.raises(Killed), replacing_folder(folder, "lens", {"a"}.__contains__) as new:
        (new / "a").write_text("new")
        raise Killed
    assert (folder / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]
    with pytest.raises(UserError, match="is a file; the lens is a folder"):
        require_replaceable(folder / "a", "lens", {"a"}.__contains__)
