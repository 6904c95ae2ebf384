"""A GPU finds what the CPU finds, on tiny models: scores, exits, costs, texts, sweeps, maps, adapters.

Left out where there is no GPU.
"""

from __future__ import annotations

import copy
import json
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file
from test_lm import MAX_LENGTH, close, instances, model, task_pairs, text
from test_sweep import ask, lens
from torch import nn
from zoo import SUPPORTED, byte_tokenizer, random_ids, tiny

from spade_eval.arguments import tasks_path
from spade_eval.backbone import Backbone
from spade_eval.fit.documents import load_tasks
from spade_eval.fit.lora_run import finetune
from spade_eval.fit.lora_settings import LoraSettings
from spade_eval.fit.precision import bf16_is_fast
from spade_eval.fit.run import fit
from spade_eval.fit.settings import FitSettings
from spade_eval.lm.base import SpadeLM
from spade_eval.lm.exit import LensExitLM, SpadeExitLM
from spade_eval.lm.layer import LogitLensLM, LSpadeLM, SpadeLayerLM
from spade_eval.sweep.lm import SweepLM
from spade_eval.sweep.run import sweep
from spade_eval.sweep.settings import SweepSettings
from spade_eval.transfer import put

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU of NVIDIA's here"),
    pytest.mark.usefixtures("few_tasks"),
]

CPU, GPU = "cpu", "cuda"
EVERY = {"interval": 1, "min_layer": 1}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rng = random.Random(0)
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(text(rng, rng.randint(4, 9)) for _ in range(30)))
    return path


def network(device: str, family: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy: the models of the zoo are shared."""
    return copy.deepcopy(model(family)).to(device, dtype)


def build(cls: type[HFLM], device: str, family: str = "llama", dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:  # fmt: skip
    common = {"batch_size": 4, "max_length": MAX_LENGTH, "tokenizer": byte_tokenizer()}
    lm = cls(pretrained=network(device, family, dtype), **(common | kwargs))
    assert lm.device.type == device
    return lm


def pages() -> list[Any]:
    rng = random.Random(1)
    texts = [(text(rng, n),) for n in (40, 3, 25, 1, 60)]
    return instances([*texts, ("",)], "loglikelihood_rolling")


# ---------------------------------------------------------------- the model's own layers


@pytest.mark.parametrize("family", SUPPORTED)
@torch.no_grad()
def test_layer_by_layer_is_the_model(family: str) -> None:
    net, ids = copy.deepcopy(tiny(family)).to(GPU), random_ids(2, 9).to(GPU)
    backbone, on_cpu = Backbone(net), Backbone(tiny(family))
    for found in ("packs", "positions_inert", "keeps_keys"):
        assert getattr(backbone, found) == getattr(on_cpu, found)
    ours = backbone.hidden_states(ids)
    theirs = net(ids, output_hidden_states=True, use_cache=False)
    first = 1 if family == "mamba" else 0  # transformers' Mamba leaves out the embedding
    for layer, (a, b) in enumerate(zip(ours[first:-1], theirs.hidden_states, strict=False), first):
        torch.testing.assert_close(a, b, msg=f"layer {layer}")
    logits = backbone.logits(ours[-1].flatten(0, 1)).view_as(theirs.logits)
    torch.testing.assert_close(logits, theirs.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("n", [10, 10**4, 10**6])
def test_an_array_may_change_while_the_device_is_busy(n: int) -> None:
    torch.cuda._sleep(10**9)
    array = np.full(n, 7)
    found = put(array, torch.device(GPU))
    array[:] = 0
    assert (found == 7).all()


# ---------------------------------------------------------------- scores

DECODERS = {
    "spade": (SpadeLayerLM, {"layer": 2}),
    "spade-nos": (SpadeLayerLM, {"layer": 2, "start": "none"}),
    "full": (SpadeLayerLM, {"layer": -1}),
    "logit_lens": (LogitLensLM, {"layer": 2}),
    "l_spade": (LSpadeLM, {"layer": 2, "lens": lens("l_spade", 1)}),
    **{
        f"{name}-{scope}-{confidence}": (
            cls,
            {"exit_scope": scope, "confidence": confidence, "threshold": threshold, **rest},
        )
        for name, cls, rest in (
            ("spade_exit", SpadeExitLM, {"lens": lens("l_spade", 1), **EVERY}),
            ("lens_exit", LensExitLM, {"lens": lens("tuned_lens", 3), **EVERY}),
        )
        for scope, confidence, threshold in (
            ("context", "entropy", 4.2),
            ("token", "entropy", 4.2),
            ("request", "entropy", 4.2),
            ("context", "choice_entropy", 1.2),
        )
    },
}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", DECODERS)
def test_scores_exits_and_costs_are_those_of_the_cpu(name: str, packed: bool) -> None:
    cls, arguments = DECODERS[name]
    found, expected = (
        build(cls, device, logits_cache=packed, **arguments) for device in (GPU, CPU)
    )
    requests = instances(task_pairs())
    close(found.loglikelihood(requests), expected.loglikelihood(requests))
    ours, theirs = found.account.report(), expected.account.report()
    assert "threshold" not in arguments or 1 < ours["mean_exit_layer"] < 4
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


@pytest.mark.parametrize("name", ["spade", "logit_lens", "l_spade", "spade_exit-token-entropy"])
def test_whole_texts_are_those_of_the_cpu(name: str) -> None:
    cls, arguments = DECODERS[name]
    found, expected = (
        build(cls, device, **arguments).loglikelihood_rolling(pages()) for device in (GPU, CPU)
    )
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", ["llama", "mistral_sliding", "gemma3", "gpt2", "bloom"])
def test_at_full_depth_scores_are_those_of_hflm(family: str) -> None:
    requests = instances(task_pairs())
    theirs = build(HFLM, GPU, family).loglikelihood(requests)
    close(build(SpadeLayerLM, GPU, family, layer=-1).loglikelihood(requests), theirs)


def test_texts_are_those_of_the_cpu() -> None:
    rng = random.Random(0)
    contexts = [f"Q: {text(rng, 1 + i)}\nA:" for i in range(5)]
    settings = {"until": ["\n"], "max_gen_toks": 10, "do_sample": False}
    asked = instances([(context, settings) for context in contexts], "generate_until")  # type: ignore[misc]
    hf = build(HFLM, GPU).generate_until(asked)
    assert build(SpadeLayerLM, GPU, layer=-1).generate_until(asked) == hf
    for name in ("spade", "spade_exit-token-entropy"):
        cls, arguments = DECODERS[name]
        found, expected = (
            build(cls, device, **arguments).generate_until(asked) for device in (GPU, CPU)
        )
        assert found == expected != hf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_scores_are_those_of_hflm_to_its_precision(dtype: torch.dtype) -> None:
    requests = instances(task_pairs())
    theirs = build(HFLM, GPU, dtype=dtype).loglikelihood(requests)
    maps = {"lens": lens("l_spade", 1), **EVERY}
    full = build(SpadeLayerLM, GPU, dtype=dtype, layer=-1).loglikelihood(requests)
    never = build(SpadeExitLM, GPU, dtype=dtype, threshold=-1, **maps).loglikelihood(requests)
    early = build(SpadeExitLM, GPU, dtype=dtype, threshold=99, min_layer=2, interval=1, lens=maps["lens"])  # fmt: skip
    layer = build(SpadeLayerLM, GPU, dtype=dtype, layer=2)
    second = early.loglikelihood(requests), layer.loglikelihood(requests)
    for ours, expected in ((full, theirs), (never, theirs), second):
        for (a, _), (b, _) in zip(ours, expected, strict=True):
            assert a == pytest.approx(b, abs=0.5, rel=0.05)


# ---------------------------------------------------------------- where the weights lie


@pytest.mark.parametrize(
    "arguments",
    [
        {"device_map": "auto"},
        {"parallelize": True},
        {"device": GPU},
        {
            "device_map": {
                "model.embed_tokens": 0,
                "model.rotary_emb": 0,
                **{f"model.layers.{i}": 0 if i < 2 else "cpu" for i in range(4)},
                "model.norm": 0,
                "lm_head": 0,
            }
        },
    ],
    ids=["auto", "parallelize", "device", "half of the layers in main memory"],
)
def test_scores_do_not_depend_on_where_the_weights_lie(saved: Path, arguments: dict) -> None:
    common = {"batch_size": 4, "max_length": MAX_LENGTH}
    requests = instances(task_pairs())
    for cls, own in (
        (SpadeLayerLM, {"layer": 2}),
        (SpadeExitLM, {"lens": lens("l_spade", 1), "threshold": 4.2, **EVERY}),
    ):
        found = cls(pretrained=str(saved), **common, **own, **arguments)
        close(found.loglikelihood(requests), build(cls, CPU, **own).loglikelihood(requests))


# ---------------------------------------------------------------- sweeps, maps, adapters

TASKS = ("spade_mini_science", "spade_mini_articles")


def test_a_sweep_is_that_of_the_cpu(tmp_path: Path) -> None:
    few = ask(scopes=("context",), thresholds=(3.0, 4.2))
    maps = [("x", lens("l_spade", 1)), ("x", lens("tuned_lens", 3))]
    tables = []
    for device, name in ((GPU, "ours"), (CPU, "theirs")):
        wanted = SweepSettings(output=tmp_path / name, tasks=TASKS, ask=few, limit=6)
        lm = build(SweepLM, device, ask=few, maps=maps, max_length=255)
        tables.append(
            sweep(lm, load_tasks(TASKS, tasks_path()), wanted, command="spade-eval sweep")
        )
    ours, theirs = (table.drop(columns="seconds") for table in tables)
    pd.testing.assert_frame_equal(ours, theirs, check_exact=False, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("decoder", ["l_spade", "tuned_lens"])
def test_maps_are_those_of_the_cpu(decoder: Any, corpus: Path, tmp_path: Path) -> None:
    found = []
    for device, name in ((GPU, "ours"), (CPU, "theirs")):
        # Without descent: on a GPU it is in bfloat16, on most CPUs it is not.
        given = FitSettings(decoder, tmp_path / name, text=corpus, max_positions=150, epochs=0)
        fit(build(SpadeLM, device), given, command="spade-eval fit")
        found.append(load_file(tmp_path / name / "model.safetensors"))
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    for name, weights in ours.items():
        torch.testing.assert_close(weights, theirs[name], atol=1e-3, rtol=1e-3)


def test_training_a_map_repeats_itself(corpus: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        given = FitSettings("l_spade", tmp_path / name, text=corpus, max_positions=150, epochs=2)
        fit(build(SpadeLM, GPU), given, command="spade-eval fit")
    for name in ("a", "b"):
        bill = json.loads((tmp_path / name / "config.json").read_text())["bill"]
        assert 0 < bill["peak_gpu_memory_mb"] < bill["peak_memory_mb"]
        assert bill["gpu"] == torch.cuda.get_device_name()
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_an_adapter_is_trained_in_bf16_and_read_on_either_device(
    saved: Path, tmp_path: Path
) -> None:
    assert bf16_is_fast(torch.device(GPU))
    base = LogitLensLM(pretrained=str(saved), layer=-1, device=GPU, batch_size=8, max_length=255)
    given = LoraSettings(tmp_path / "adapter", tasks=("spade_mini_science",), batch_size=4, micro_batch_size=2, max_steps=6, rank=4, alpha=8, learning_rate=2e-2)  # fmt: skip
    finetune(base, given, include_path=tasks_path(), command="spade-eval finetune")
    requests = instances(task_pairs())
    plain = build(SpadeLayerLM, GPU, layer=2).loglikelihood(requests)
    found, expected = (
        SpadeLayerLM(pretrained=str(saved), peft=str(tmp_path / "adapter"), layer=2, device=device, batch_size=4, max_length=MAX_LENGTH).loglikelihood(requests)
        for device in (GPU, CPU)
    )  # fmt: skip
    close(found, expected)
    assert max(abs(a - b) for (a, _), (b, _) in zip(plain, found, strict=True)) > 0.01


def test_the_batch_size_is_found() -> None:
    requests = instances(task_pairs())
    found = build(SpadeLayerLM, GPU, layer=2, batch_size="auto")
    close(found.loglikelihood(requests), build(SpadeLayerLM, CPU, layer=2).loglikelihood(requests))
