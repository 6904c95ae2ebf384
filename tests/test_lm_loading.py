"""HFLM's ways of loading a model keep working: each gives HFLM's own answers at the last layer."""

from __future__ import annotations

import ctypes
import resource
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model
from test_lm import MAX_LENGTH, build, close, instances, model, task_pairs
from zoo import BYTES, byte_tokenizer, tiny

from spade_eval.lm.layer import SpadeLayerLM

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a LoRA adapter and a set of weight differences."""
    root = tmp_path_factory.mktemp("models")
    for name in ("base", "base/inner"):
        model().save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    other = tiny("llama", seed=11, vocab_size=BYTES, max_position_embeddings=256)
    other.save_pretrained(root / "delta")
    base = tiny("llama", seed=12, vocab_size=BYTES, max_position_embeddings=256)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(root / "adapter")
    return root


def answers(cls: type, folder: Path, **kwargs: Any) -> list:
    # HFLM sends its tokens to `device`, and `parallelize` the model to a GPU if there is one.
    gpu = "parallelize" in kwargs and torch.cuda.is_available()
    settings = {"device": "cuda" if gpu else "cpu", "batch_size": 4, "max_length": MAX_LENGTH}
    settings |= kwargs
    return cls(pretrained=str(folder), **settings).loglikelihood(instances(task_pairs()))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"peft": "adapter"},
        {"delta": "delta"},
        {"subfolder": "inner"},
        {"parallelize": True},
        {"device_map": "auto"},
        {"attn_implementation": "eager"},
        {"batch_size": "2"},
        {"revision": "main", "use_fast_tokenizer": True, "trust_remote_code": False},
    ],
    ids=lambda arguments: ",".join(arguments) or "plain",
)
def test_loading(saved: Path, arguments: dict) -> None:
    paths = {k: str(saved / v) for k, v in arguments.items() if k in ("peft", "delta")}
    arguments = arguments | paths
    theirs = answers(HFLM, saved / "base", **arguments)
    close(answers(SpadeLayerLM, saved / "base", layer=-1, **arguments), theirs)
    if paths:
        plain = answers(HFLM, saved / "base")
        assert max(abs(a - b) for (a, _), (b, _) in zip(plain, theirs, strict=True)) > 0.1


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt") or sys.platform != "linux", reason="glibc's malloc"
)
def test_large_tensors_come_without_new_pages() -> None:
    build(SpadeLayerLM, layer=1)

    def new_pages() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)  # 64 MB, freed at once
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    # Each of the first few leaves a splinter of its alignment behind it, which bars its way back.
    for _ in range(16):
        new_pages()
    assert new_pages() < 2**24 * 4 / resource.getpagesize() / 4


def test_parallelize_needs_no_device(saved: Path) -> None:
    arguments = {"batch_size": 4, "max_length": MAX_LENGTH, "parallelize": True}
    lm = SpadeLayerLM(pretrained=str(saved / "base"), layer=-1, **arguments)
    close(lm.loglikelihood(instances(task_pairs())), answers(HFLM, saved / "base"))


def test_bf16_gives_what_hf_gives_to_its_precision(saved: Path) -> None:
    theirs = answers(HFLM, saved / "base", dtype="bfloat16")
    ours = answers(SpadeLayerLM, saved / "base", dtype="bfloat16", layer=-1)
    for (a, _), (b, _) in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, abs=0.5, rel=0.05)


def test_weights_on_disk_are_read_layer_by_layer(saved: Path, tmp_path: Path) -> None:
    """accelerate's hooks sit on the real layers, which we call."""
    device_map = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "lm_head": "cpu",
        "model.rotary_emb": "cpu",
    }
    device_map |= {f"model.layers.{i}": "cpu" if i < 2 else "disk" for i in range(4)}
    kwargs = {"device_map": device_map, "offload_folder": str(tmp_path)}
    theirs = answers(SpadeLayerLM, saved / "base", layer=2)
    close(answers(SpadeLayerLM, saved / "base", layer=2, **kwargs), theirs)
