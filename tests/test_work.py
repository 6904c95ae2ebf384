"""The work folder of a run: one run at a time, and nothing left when there was nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from spade_eval.errors import UserError
from spade_eval.fit import work

HOLDS = """
import sys
from pathlib import Path
from spade_eval.fit.work import at_work, claim
folder = Path(sys.argv[1])
with at_work(folder, main=True):
    claim(folder, {"seed": 0}, anew=False, main=True, wait=lambda: None)
    (folder / "half").mkdir()
    (folder / "half" / "done").touch()
    print("at work", flush=True)
    sys.stdin.read()
"""


def run(folder: Path, anew: bool, seed: int = 0) -> set[str]:
    """What a run finds in its work folder when it has claimed it."""
    with work.at_work(folder, main=True):
        work.claim(folder, {"seed": seed}, anew=anew, main=True, wait=lambda: None)
        return {path.name for path in folder.iterdir()} - {work.LOCK}


@pytest.mark.parametrize("anew", [False, True])
def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path: Path, anew: bool) -> None:
    folder = tmp_path / "new" / ".lens.fit"
    command = [sys.executable, "-c", HOLDS, str(folder)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "at work\n"
        with pytest.raises(UserError, match=r"Another run is at work in .*lens\.fit"):
            run(folder, anew)
        assert (folder / "half" / "done").exists()
        first.kill()
    assert run(folder, anew) == {work.SETTINGS} | (set() if anew else {"half"})


def test_a_run_that_fails_leaves_its_work_and_lets_go(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    run(folder, anew=False)
    with pytest.raises(UserError, match="other settings"):
        run(folder, anew=False, seed=1)
    assert run(folder, anew=False) == {work.SETTINGS}


def test_a_folder_without_work_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    with pytest.raises(UserError, match="too early"), work.at_work(folder, main=True):
        assert folder.exists()
        raise UserError("too early")
    assert not folder.exists()
    with work.at_work(folder, main=True):
        work.claim(folder, {}, anew=False, main=True, wait=lambda: None)
        work.clear(folder)
    assert not folder.exists()
    with work.at_work(folder, main=False):
        assert not folder.exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/work cannot be written: Not a directory"):
        run(tmp_path / "file" / "work", anew=False)
