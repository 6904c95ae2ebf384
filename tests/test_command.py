"""The unmodified `lm_eval` command, as a user types it, on the default model and a built-in task."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT


def lm_eval(folder: Path, model_args: str, *more: str, launcher: tuple[str, ...] = ()) -> str:
    """Run the command in `folder`; returns what it printed."""
    command = [
        *(launcher or (str(Path(sys.executable).parent / "lm_eval"),)),
        *("--model", "spade_layer", "--model_args", model_args),
        *("--include_path", str(ROOT / "tasks"), "--tasks", "spade_mini_yesno", "--limit", "3"),
        *("--output_path", str(folder / "out"), *more),
    ]
    env = os.environ | {"LM_HARNESS_CACHE_PATH": str(folder / "requests"), "HF_HOME": str(folder)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def newest(folder: Path, pattern: str) -> Path:
    return max((folder / "out").rglob(pattern), key=lambda path: path.stat().st_mtime_ns)


def block(folder: Path) -> dict[str, Any]:
    return json.loads(newest(folder, "results_*.json").read_text())["config"]["spade"]


@pytest.mark.usefixtures("default_model_dir")
def test_the_plain_command_with_its_own_options(tmp_path: Path) -> None:
    options = (
        "--log_samples",
        "--cache_requests",
        "true",
        "--use_cache",
        str(tmp_path / "answers"),
    )
    printed = lm_eval(tmp_path, "layer=24", *options)
    assert "|spade_mini_yesno|" in printed, printed[-2000:]
    first = block(tmp_path)
    assert (first["decoder"], first["layer"], first["layers"]) == ("spade", 24, 30)
    assert first["model"] == "SmolLM2-135M-Instruct"
    assert first["account"]["requests"] == 6
    assert first["account"]["token_layer_ratio"] < 0.85
    samples = newest(tmp_path, "samples_*.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["resps"]) for line in samples] == [2, 2, 2]
    # The same again is answered from the cache; another layer is refused by name.
    lm_eval(tmp_path, "layer=24", *options)
    assert block(tmp_path)["account"]["requests"] == 0
    assert newest(tmp_path, "samples_*.jsonl").read_text().splitlines() == samples
    refused = lm_eval(tmp_path, "layer=20", *options)
    assert "layer was 24, is 20" in refused.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.usefixtures("default_model_dir")
def test_under_accelerate_launch(tmp_path: Path) -> None:
    launcher = (
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "-m",
        "lm_eval",
    )
    printed = lm_eval(tmp_path, "layer=24", launcher=launcher)
    assert "|spade_mini_yesno|" in printed, printed[-2000:]
    assert block(tmp_path)["account"]["requests"] == 6


@pytest.mark.slow
@pytest.mark.usefixtures("default_model_dir")
def test_from_a_gguf_file(tmp_path: Path) -> None:
    from spade_eval.default_model import _find_gguf

    gguf, _ = _find_gguf()
    printed = lm_eval(tmp_path, f"pretrained={gguf.parent},gguf_file={gguf.name},layer=24")
    assert "|spade_mini_yesno|" in printed, printed[-2000:]
    ours = newest(tmp_path, "results_*.json").read_text()
    lm_eval(tmp_path, "layer=24")
    theirs = newest(tmp_path, "results_*.json").read_text()
    read = [json.loads(text)["results"]["spade_mini_yesno"]["acc,none"] for text in (ours, theirs)]
    assert read[0] == read[1]
