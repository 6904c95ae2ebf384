"""`SpadeExitForCausalLM`, and the default model on real prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from test_lm import model
from test_lm_exit import lens, lens_of_another_model
from transformers import AutoTokenizer
from zoo import byte_tokenizer, random_ids, tiny

import spade_eval
from spade_eval.batching import collate, cut
from spade_eval.causal_lm import SpadeExitForCausalLM
from spade_eval.decoders import Linear, Spade
from spade_eval.errors import UnsupportedModelError, UserError
from spade_eval.exits import ExitRule
from spade_eval.scoring import Layout, Request, plan
from spade_eval.trace import score_with_exits

if TYPE_CHECKING:
    from pathlib import Path

EVERY = {"lens": "identity", "interval": 1, "min_layer": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model().save_pretrained(path)
    return path


def tokenized(*texts: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "left"
    return tokenizer(list(texts), padding=True, return_tensors="pt")


def test_it_loads_generates_and_tells_the_exits(folder: Path) -> None:
    assert spade_eval.SpadeExitForCausalLM is SpadeExitForCausalLM
    assert {*spade_eval.__all__} <= {*dir(spade_eval)}
    assert all(getattr(spade_eval, name) for name in spade_eval.__all__)
    loaded = SpadeExitForCausalLM.from_pretrained(folder, threshold=4.0, dtype="float64", **EVERY)
    assert loaded.model.dtype == torch.float64
    asked = tokenized("the cat sleeps", "a dog")
    ids = loaded.generate(**asked, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert ids.shape == (2, 26)
    assert [len(layers) for layers in loaded.last_exits] == [12, 12]
    assert {*loaded.last_exits[0], *loaded.last_exits[1]} > {4}
    alone = loaded.generate(tokenized("a dog").input_ids, max_new_tokens=12, do_sample=False)
    assert alone[0].tolist() == ids[1, 9:].tolist()
    assert loaded.last_run is not None
    assert loaded.last_run.tokens == [ids[1, 14:].tolist()]


def test_settings_reach_the_policy(folder: Path) -> None:
    maps = lens()
    loaded = SpadeExitForCausalLM.from_pretrained(folder, threshold=0.5, lens=maps, confidence="max_prob", readout="lens", min_layer=2, interval=1)  # fmt: skip
    policy = loaded.policy
    assert policy.stops == (2, 3, 4)
    assert policy.rule == ExitRule(0.5, "max_prob", 1, 2, readout="lens")
    assert isinstance(policy.decoder, Linear)
    loaded = SpadeExitForCausalLM(model(), threshold=0.5, positions="keep", **EVERY)
    assert loaded.policy.decoder == Spade(positions="keep")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 1.0}, "lens is missing: give the folder or hub id of a lens for"),
        ({"threshold": None, **EVERY}, "threshold is missing"),
        ({"threshold": 1.0, **EVERY, "interval": 9}, "interval=9 is too large"),
        ({"threshold": 1.0, **EVERY, "confidence": "entropie"}, "Did you mean 'entropy'"),
        ({"threshold": 1.0, **EVERY, "readout": "spad"}, "Did you mean 'spade'"),
        ({"threshold": 1.0, "lens": lens_of_another_model()}, "was not fitted for"),
        ({"threshold": 1.0, **EVERY, "confidence": "choice_entropy"}, "needs answer choices"),
    ],
)
def test_bad_arguments_are_named(folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SpadeExitForCausalLM.from_pretrained(folder, **arguments)


def test_other_bad_input(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere cannot be loaded"):
        SpadeExitForCausalLM.from_pretrained(tmp_path / "nowhere", threshold=1.0, lens="identity")
    with pytest.raises(UnsupportedModelError):
        SpadeExitForCausalLM(tiny("mamba"), threshold=1.0, **EVERY)
    loaded = SpadeExitForCausalLM(tiny("llama"), threshold=1.0, **EVERY)
    with pytest.raises(UserError, match="Nothing has been generated yet"):
        _ = loaded.last_exits
    with pytest.raises(UserError, match="60 tokens and up to 5 are to follow"):
        loaded.generate(random_ids(1, 60), max_new_tokens=5)
    with pytest.raises(UserError, match="num_beams=2"):
        loaded.generate(random_ids(1, 6), max_new_tokens=5, num_beams=2)


# ---------------------------------------------------------------- the default model

PROMPTS = [
    "Question: Which gas do plants take in?\nAnswer:",
    "The train to the coast leaves at eight in the morning, and it takes about two hours to",
    "def mean(values):\n",
    "Once upon a time",
]


@pytest.fixture(scope="module")
def default_model(default_model_dir: Path) -> SpadeExitForCausalLM:
    """With exits."""
    return SpadeExitForCausalLM.from_pretrained(threshold=3.0, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(default_model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(default_model_dir, padding_side="left")


@pytest.mark.parametrize(
    ("texts", "new"),
    [
        (PROMPTS, 8),
        pytest.param(PROMPTS, 64, marks=pytest.mark.slow),
        pytest.param(PROMPTS[:1], 64, marks=pytest.mark.slow),
    ],
    ids=["4-8", "4-64", "1-64"],
)
def test_the_default_model_without_exits_is_itself(
    default_model: SpadeExitForCausalLM, tokenizer: Any, texts: list[str], new: int
) -> None:
    loaded = SpadeExitForCausalLM(default_model.model, threshold=-1, lens="identity")
    asked = tokenizer(texts, padding=True, return_tensors="pt")
    ids = loaded.generate(**asked, max_new_tokens=new, do_sample=False)
    theirs = loaded.model.generate(**asked, max_new_tokens=new, do_sample=False)
    assert ids.tolist() == theirs.tolist()


@pytest.mark.parametrize("new", [8, pytest.param(64, marks=pytest.mark.slow)])
def test_the_default_model_exits_as_in_scoring(
    default_model: SpadeExitForCausalLM, tokenizer: Any, new: int
) -> None:
    exits = default_model
    asked = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    exits.generate(**asked, max_new_tokens=new, do_sample=False)
    run, policy = exits.last_run, exits.policy
    assert run is not None
    assert policy.rule is not None
    assert policy.lens is not None
    rule = ExitRule(3.0, exit_scope="token")
    asked_for = [
        Request(tuple(tokenizer.encode(text)), tuple(new)) for text, new in zip(PROMPTS, run.tokens, strict=True)
    ]  # fmt: skip
    seen = set()
    with torch.no_grad():
        for request, layers in zip(asked_for, run.exit_layers, strict=True):
            (batch,) = [collate(rows) for rows in cut(plan([request], Layout(2048)).rows, 1)]
            (trace,) = score_with_exits(exits.backbone, [batch], policy.decoder, policy.lens, rule, {})  # fmt: skip
            assert trace.exit_layers.tolist() == layers
            assert all(trace.answers.greedy)
            seen.update(layers)
    assert len(seen) > 3
