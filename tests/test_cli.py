"""The `spade-eval` command: lm-eval's own command line, our tasks, and errors in one line."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import ROOT

from spade_eval import __version__
from spade_eval.arguments import tasks_path
from spade_eval.cli import main
from spade_eval.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from argparse import Namespace
    from pathlib import Path

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(autouse=True)
def _logging_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval would tie its log to this test's standard error, which is closed afterwards."""
    monkeypatch.setattr("lm_eval.utils.setup_logging", lambda: None)


@pytest.fixture
def user_tasks(tmp_path: Path) -> Path:
    """A folder with a task of the user's own, `mine`."""
    folder = tmp_path / "user_tasks"
    folder.mkdir()
    (folder / "data.jsonl").write_text('{"question": "Is it?"}\n' * 3)
    (folder / "mine.yaml").write_text(TASK.format(name="mine", data=folder / "data.jsonl"))
    return folder


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Namespace]:
    """What lm-eval is about to execute; nothing is executed."""
    from lm_eval._cli import HarnessCLI

    seen: list[Namespace] = []
    monkeypatch.setattr(HarnessCLI, "execute", lambda self, args: seen.append(args))
    return seen


def register(name: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give lm-eval a model whose construction fails."""
    from lm_eval.api.model import LM
    from lm_eval.api.registry import model_registry

    from spade_eval.plugin import register

    class Failing(LM):
        def __init__(self, **kwargs: Any) -> None:
            raise error

        loglikelihood = loglikelihood_rolling = generate_until = lambda self, requests: []

    register()
    monkeypatch.setitem(model_registry._objs, name, Failing)


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_help_lists_the_commands(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    out = capsys.readouterr().out
    commands = out.split("commands:\n")[1].split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in commands] == [
        "run",
        "fit",
        "finetune",
        "sweep",
        "calibrate",
        "report",
        "compare",
        "check",
        "tasks-path",
    ]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"spade-eval {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["task-path"], "unknown command 'task-path'. Did you mean 'tasks-path'? Commands: run,"),
        (["RUN"], "Did you mean 'run'?"),
        (
            ["zzz"],
            "unknown command 'zzz'. Commands: run, fit, finetune, sweep, calibrate, report, "
            "compare, check, tasks-path",
        ),
        (["--model", "hf"], "to evaluate: spade-eval run --model ..."),
        (["tasks-path", "x"], "tasks-path takes no arguments, got x"),
    ],
)
def test_a_wrong_command_is_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_tasks_path_prints_the_folder_of_the_tasks() -> None:
    command = [sys.executable, "-m", "spade_eval", "tasks-path"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == f"{tasks_path()}\n"
    assert (tasks_path() / "spade_mini_science.yaml").is_file()


def test_tasks_path_without_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spade_eval.arguments.__file__", str(tmp_path / "spade_eval" / "a.py"))
    with pytest.raises(UserError, match="install it again"):
        tasks_path()


def test_run_alone_shows_the_arguments_of_lm_eval(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["run"])
    assert stop.value.code == 0
    assert "--model_args" in capsys.readouterr().out


def test_run_passes_everything_on(parsed: list[Namespace], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["spade-eval", "untouched"])
    assert main(["run", "--model", "simlens", "-a", "layer=3", "-t", "a,b", "-L", "5"]) == 0
    (args,) = parsed
    assert (args.command, args.model, args.tasks, args.limit) == ("run", "simlens", ["a", "b"], 5)
    assert args.model_args == {"layer": 3}
    assert args.include_path == [str(tasks_path())]
    assert sys.argv == ["spade-eval", "untouched"]


def test_run_keeps_the_users_own_task_folders(parsed: list[Namespace], tmp_path: Path) -> None:
    ours = str(tasks_path())
    config = tmp_path / "config.yaml"
    config.write_text("tasks: [mine]\ninclude_path: from_config\n")

    main(["run", "--tasks", "mine", "--include_path", "from_line"])
    main(["run", "--config", str(config)])
    main(["run", "--config", str(config), "--include_path", "from_line"])
    main(["run", "--tasks", "mine", "--include_path", str(ROOT / "tests" / ".." / "tasks")])
    config.write_text("include_path: [one, two]\n")
    main(["run", "--config", str(config)])

    assert [args.include_path for args in parsed] == [
        [ours, "from_line"],
        [ours, "from_config"],
        [ours, "from_line"],  # as in lm-eval, the command line wins
        [ours],
        [ours, "one", "two"],
    ]


def test_run_evaluates_our_tasks_beside_the_users(
    user_tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: dummy\ntasks: [mine, spade_mini_science]\nlimit: 2\ninclude_path: {user_tasks}\n"
    )
    assert main(["run", "--config", str(config)]) == 0
    out = capsys.readouterr().out
    assert "|mine " in out
    assert "|spade_mini_science" in out


def test_bad_input_to_a_model_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    register("failing", UserError("layer=31 is out of range 0..30"), monkeypatch)
    assert main(["run", "--model", "failing", "--tasks", "spade_mini_science"]) == 2
    assert capfd.readouterr().err == "error: layer=31 is out of range 0..30\n"


def test_memory_that_runs_out_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    told = "CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has a total capacity of ..."
    register("failing", torch.OutOfMemoryError(told), monkeypatch)
    assert main(["run", "--model", "failing", "--tasks", "spade_mini_science"]) == 2
    assert capfd.readouterr().err.startswith("error: CUDA out of memory. Give a smaller --batch")


def test_what_is_stopped_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def stopped(argv: list[str]) -> int:
        raise KeyboardInterrupt

    for name, target in (("fit", "fit.command.main"), ("compare", "report.command.compare_main")):
        monkeypatch.setattr(f"spade_eval.{target}", stopped)
        assert main([name]) == 130
        told = capfd.readouterr().err
        assert told.startswith(f"\nspade-eval {name} was stopped")
        assert ("--resume" in told) == (name == "fit")


def test_a_bug_in_a_model_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    register("failing", ValueError("not about the input"), monkeypatch)
    with pytest.raises(ValueError, match="not about the input"):
        main(["run", "--model", "failing", "--tasks", "spade_mini_science"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "dummy", "--tasks", "no_such_task"], "Tasks not found: no_such_task"),
        (["--model", "spade_layr", "--tasks", "spade_mini_science"], "spade_layer"),
        (["--tasks", "spade_mini_science"], "HFLM.__init__() missing"),
        (["--config", "no_such_file.yaml"], "Config file not found"),
        (["--model", "dummy", "--tasks", "spade_mini_science", "--log_samples"], "--output_path"),
    ],
)
def test_lm_evals_own_input_errors_are_readable(
    argv: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *argv]) == 2
    last_line = capfd.readouterr().err.splitlines()[-1]
    assert last_line.startswith("error: ")
    assert message in last_line


def test_did_you_mean() -> None:
    valid = ["layer", "positions", "start"]
    assert did_you_mean("layers", valid) == " Did you mean 'layer'?"
    assert did_you_mean("Position", valid) == " Did you mean 'positions'?"
    assert did_you_mean("trust_remote_code", valid) == ""
    assert did_you_mean("layer", []) == ""
