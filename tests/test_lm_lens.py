"""`--model l_spade` and `--model tuned_lens`: a linear map, then the model's own norm and head; a lens
that does not fit is refused in a sentence."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from test_lm import MAX_LENGTH, build, close, instances, model, task_pairs
from test_lm_errors import answer
from zoo import BYTES, byte_tokenizer, tiny

from spade_eval import lenses
from spade_eval.errors import UserError
from spade_eval.fingerprint import fingerprint
from spade_eval.lens import LinearLens
from spade_eval.lens_config import LensConfig
from spade_eval.lm.exit import SpadeExitLM
from spade_eval.lm.layer import LinearLensLM, LogitLensLM, LSpadeLM, SpadeLayerLM, TunedLensLM
from spade_eval.sweep.lm import SweepLM

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

D, L = 32, 4
LAYERS = (0, 2, 3)
NAMES = {LSpadeLM: "l_spade", TunedLensLM: "tuned_lens"}


def lens_for(
    decoder: Any = "l_spade", family: str = "llama", seed: int = 0, **more: Any
) -> LinearLens:
    """A random lens, small enough to leave answers apart and large enough to change them."""
    about = {
        "decoder": decoder,
        "base_model": f"someone/tiny-{family}",
        "n_layers": L,
        "width": D,
        "layers": LAYERS,
        "fingerprint": fingerprint(model(family)),
        "teacher": "spade" if decoder == "l_spade" else "model",
        "tasks": ("arc_easy", "boolq"),
        "positions": "answer",
    }
    lens = LinearLens(LensConfig(**(about | more)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lens.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return lens


def saved(folder: Path, *args: Any, **kwargs: Any) -> str:
    lens_for(*args, **kwargs).save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def naive(
    lm: Any, lens: LinearLens, layer: int, pair: tuple[str, str], family: str
) -> tuple[float, bool]:
    """One request by transformers' own hidden states and the formula, one position at a time."""
    net = model(family)
    context, continuation = lm._encode_pair(*pair) if pair[0] else (
        [lm.prefix_token_id], lm.tok_encode(pair[1])
    )  # fmt: skip
    whole = (context + continuation)[-(MAX_LENGTH + 1) :]
    out = net(torch.tensor([whole[:-1]]), output_hidden_states=True, use_cache=False)
    total, greedy = 0.0, True
    for i, target in enumerate(continuation):
        at = len(whole) - 1 - len(continuation) + i
        if layer == L or at == 0:
            logits = out.logits[0, at]  # position 0 attends to itself alone: the model's own answer
        else:
            h = out.hidden_states[layer][0, at]
            m = lens.layers[str(layer)]
            a = m.weight if lens.config.rank is None else m.up @ m.down
            logits = head(net, h + a @ h + m.bias)
        total += float(logits.double().log_softmax(-1)[target])
        greedy &= int(logits.argmax()) == target
    return total, greedy


def head(net: Any, h: Tensor) -> Tensor:
    inner = net.get_decoder()
    norm = inner.ln_f if hasattr(inner, "ln_f") else inner.norm
    return net.get_output_embeddings()(norm(h))


@pytest.mark.parametrize(
    ("cls", "family", "rank"),
    [(LSpadeLM, "llama", None), (TunedLensLM, "gpt2", None), (TunedLensLM, "llama", 3)],
)
def test_answers_are_the_models_head_on_the_mapped_states(
    cls: type, family: str, rank: int | None
) -> None:
    lens = lens_for(NAMES[cls], family, rank=rank)
    pairs = [*task_pairs(seed=1)[:9], ("", "xyz"), ("ab" * 50, " c")]
    for layer in (0, 3, L):
        lm = build(cls, family, lens=lens, layer=layer)
        ours = lm.loglikelihood(instances(pairs))
        close(ours, [naive(lm, lens, layer, pair, family) for pair in pairs])


@pytest.mark.parametrize("cls", NAMES)
@pytest.mark.parametrize("layer", [L, -1])
def test_the_last_layer_is_the_model(cls: type, layer: int) -> None:
    requests = instances(task_pairs())
    lm = build(cls, lens=lens_for(NAMES[cls]), layer=layer)
    assert lm.layer == L
    close(lm.loglikelihood(requests), build(HFLM).loglikelihood(requests))


def test_a_zero_lens_is_the_logit_lens_but_for_the_start_token() -> None:
    lens = lens_for()
    with torch.no_grad():
        for parameter in lens.parameters():
            parameter.zero_()
    requests = instances([pair for pair in task_pairs() if pair[0]])
    ours = build(LSpadeLM, lens=lens, layer=2).loglikelihood(requests)
    close(ours, build(LogitLensLM, layer=2).loglikelihood(requests))


def test_a_one_token_context_is_answered_by_the_full_model() -> None:
    requests = instances([("a", "b"), ("", "b"), ("q", "x")])
    full = build(HFLM).loglikelihood(requests)
    for layer in LAYERS:
        close(build(LSpadeLM, lens=lens_for(), layer=layer).loglikelihood(requests), full)
    longer = instances([("ab", "c")])
    ours = build(LSpadeLM, lens=lens_for(), layer=2).loglikelihood(longer)[0][0]
    assert abs(ours - build(HFLM).loglikelihood(longer)[0][0]) > 0.01


def test_the_lens_and_the_layer_both_matter() -> None:
    requests = instances(task_pairs(3))
    runs = [
        [x for x, _ in build(LSpadeLM, lens=lens_for(seed=seed), layer=i).loglikelihood(requests)]
        for seed, i in [(0, 2), (1, 2), (0, 3), (0, 0)]
    ]
    for i, a in enumerate(runs):
        for b in runs[:i]:
            assert max(abs(x - y) for x, y in zip(a, b, strict=True)) > 0.1


def test_no_layer_above_runs_and_the_account_knows() -> None:
    lm = build(LSpadeLM, lens=lens_for(), layer=2)

    def fail(*_: object) -> None:
        raise AssertionError("layer 3 ran")

    handle = lm.backbone._layers[2].register_forward_hook(fail)
    lm.loglikelihood(instances([p for p in task_pairs(5) if len(p[0]) > 1]))
    handle.remove()
    account = lm.get_model_info()["spade"]["account"]
    assert account["main_token_layers"] == 2 * account["tokens"]
    assert account["tail_token_layers"] == 0


# ---------------------------------------------------------------- from a folder


@pytest.mark.parametrize("cls", NAMES)
def test_a_folder_gives_what_the_lens_gives(cls: type, tmp_path: Path) -> None:
    name = NAMES[cls]
    requests = instances(task_pairs())
    given = build(cls, lens=lens_for(name), layer=3).loglikelihood(requests)
    folder = saved(tmp_path / "lens", name)
    close(build(cls, lens=folder, layer=3).loglikelihood(requests), given)
    close(build(cls, lens=tmp_path / "lens", layer=3.0).loglikelihood(requests), given)


def test_a_saved_lens_in_bf16_is_used_in_the_models_precision(tmp_path: Path) -> None:
    lens = lens_for().to(torch.bfloat16)
    lens.save_pretrained(tmp_path / "lens")
    lm = build(LSpadeLM, lens=str(tmp_path / "lens"), layer=2)
    assert {p.dtype for p in lm._lens.parameters()} == {torch.float32}
    pairs = [("red cat", " runs"), ("Q: 7", " 12")]
    expected = [naive(lm, lens.float(), 2, pair, "llama") for pair in pairs]
    close(lm.loglikelihood(instances(pairs)), expected)


def test_the_results_name_lens_and_decoder(tmp_path: Path) -> None:
    folder = saved(tmp_path / "lens", "tuned_lens")
    told = build(TunedLensLM, lens=folder, layer=2).get_model_info()["spade"]
    assert (told["decoder"], told["layer"], told["layers"]) == ("tuned_lens", 2, 4)
    assert (told["lens"], told["lens_decoder"]) == (folder, "tuned_lens")
    assert (told["lens_tasks"], told["lens_positions"]) == (["arc_easy", "boolq"], "answer")
    json.dumps(told)
    again = build(TunedLensLM, lens=lens_for("tuned_lens"), layer=2).get_model_info()["spade"]
    other = build(TunedLensLM, lens=lens_for("tuned_lens", seed=1), layer=2).get_model_info()[
        "spade"
    ]
    assert again["lens"] == "given in Python"
    assert again["lens_weights"] == told["lens_weights"] != other["lens_weights"]


def test_the_registered_names_are_the_classes() -> None:
    import lm_eval.models  # noqa: F401 - the registry fills on import
    from lm_eval.api.registry import get_model

    from spade_eval.plugin import register

    register()
    assert get_model("l_spade") is get_model("linear_simlens") is LSpadeLM
    assert get_model("tuned_lens") is TunedLensLM


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 1}, r"no map for layer 1; it has 0, 2, 3, 4 \(the last is the model itself\)"),
        ({"layer": -4}, r"no map for layer 1; it has 0, 2, 3, 4"),
        ({"layer": 5}, r"layer=5 is out of range: this model has 4 layers"),
        ({}, r"layer is missing: give layer=N"),
        ({"layr": 2}, r"layer is missing.*Did you mean 'layer'"),
        ({"layer": 2, "lense": "x"}, r"'lense' is not an argument. Did you mean 'lens'"),
        ({"layer": 2, "force": True}, r"'force' is not an argument"),
    ],
)
def test_bad_arguments(arguments: dict, message: str, tmp_path: Path) -> None:
    """Told before any weight is loaded: the folder of the model has none."""
    model().config.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    lens = saved(tmp_path / "lens")
    with pytest.raises(UserError, match=message):
        LSpadeLM(pretrained=str(tmp_path / "model"), device="cpu", lens=lens, **arguments)


@pytest.mark.parametrize("cls", NAMES)
def test_a_lens_of_the_other_kind_names_its_model(cls: type, tmp_path: Path) -> None:
    (other,) = {*NAMES.values()} - {NAMES[cls]}
    folder = saved(tmp_path / "lens", other)
    with pytest.raises(UserError, match=rf"lens={folder} is a {other} lens: use --model {other}"):
        build(cls, lens=folder, layer=2)


@pytest.mark.parametrize("cls", NAMES)
def test_the_identity_is_the_logit_lens(cls: type) -> None:
    with pytest.raises(UserError, match="lens=identity is the logit lens: use --model logit_lens"):
        build(cls, lens="identity", layer=2)


def test_a_missing_lens_names_the_command_that_makes_one(tmp_path: Path) -> None:
    for cls, name in NAMES.items():
        with pytest.raises(
            UserError, match=rf"{name} needs lens=FOLDER.*spade-eval fit --decoder {name} --tasks"
        ):
            build(cls, layer=2)
    # The lens that ships is L-SPADE's: for the default model too, a tuned lens must be given.
    with pytest.raises(UserError, match=r"tuned_lens needs lens=FOLDER.*--decoder tuned_lens"):
        TunedLensLM(layer=2)
    with pytest.raises(UserError, match=r"lens=.*nowhere"):
        build(LSpadeLM, lens=str(tmp_path / "nowhere"), layer=2)


@pytest.mark.parametrize("cls", NAMES)
def test_a_lens_of_another_model_is_refused_or_forced(
    cls: type, tmp_path: Path, caplog: Any
) -> None:
    other = tiny("llama", seed=5, vocab_size=BYTES, max_position_embeddings=256)
    folder = saved(tmp_path / "lens", NAMES[cls], fingerprint=fingerprint(other))
    both = f"{fingerprint(other)}.*{fingerprint(model())}"
    with pytest.raises(UserError, match=rf"was not fitted for .*{both}.*force_lens=True overrides"):
        build(cls, lens=folder, layer=2)
    assert "force_lens" not in caplog.text
    lm = build(cls, lens=folder, layer=2, force_lens=True)
    assert f"its fingerprint of norm and head is {fingerprint(other)}" in caplog.text
    assert fingerprint(model()) in caplog.text
    requests = instances(task_pairs())
    fitting = build(cls, lens=lens_for(NAMES[cls]), layer=2)
    close(lm.loglikelihood(requests), fitting.loglikelihood(requests))


@pytest.mark.parametrize(
    ("size", "message"),
    [({"width": 16}, "its width is 16, the model's is 32"), ({"n_layers": 6}, "its number of layers is 6, the model's is 4")],
)  # fmt: skip
def test_a_lens_of_another_size_cannot_be_forced(size: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(LSpadeLM, lens=lens_for(**size), layer=2, force_lens=True)


def test_a_damaged_lens_is_one_sentence(tmp_path: Path) -> None:
    folder = saved(tmp_path / "lens")
    path = tmp_path / "lens" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model\.safetensors of .* is damaged"):
        build(LSpadeLM, lens=folder, layer=2)


@pytest.mark.parametrize(
    "use",
    [
        lambda own: (LSpadeLM, {"lens": own, "layer": 2}),
        lambda own: (SpadeExitLM, {"lens": own, "threshold": 1.0}),
        lambda own: (SweepLM, {"maps": [("own", own)]}),
    ],
)
def test_a_lens_of_the_callers_own_stays_as_it_is(use: Any) -> None:
    own = lens_for()
    before = {name: value.clone() for name, value in own.state_dict().items()}
    network = copy.deepcopy(tiny("llama")).to(torch.bfloat16)
    cls, arguments = use(own)
    cls(pretrained=network, tokenizer=byte_tokenizer(), force_lens=True, **arguments)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in own.parameters())
    torch.testing.assert_close(dict(own.state_dict()), before, rtol=0, atol=0)


# ---------------------------------------------------------------- --use_cache


def test_a_cache_is_not_shared_by_lenses(tmp_path: Path) -> None:
    path = tmp_path / "answers.db"
    first, lm = answer(build(LSpadeLM, lens=lens_for(), layer=2), path)
    assert lm.account.total.requests == 2
    again, lm = answer(build(LSpadeLM, lens=lens_for(), layer=2), path)
    assert again == first
    assert lm.account.total.requests == 0
    for other, differs in [
        (build(LSpadeLM, lens=lens_for(seed=1), layer=2), "lens_weights was"),
        (build(LSpadeLM, lens=lens_for(), layer=3), "layer was 2, is 3"),
        (build(TunedLensLM, lens=lens_for("tuned_lens"), layer=2), "decoder was 'l_spade', is"),
        (build(LogitLensLM, layer=2), "decoder was 'l_spade', is 'logit_lens'"),
    ]:
        with pytest.raises(UserError, match=f"answers of another configuration.*{differs}"):
            answer(other, path)


@pytest.fixture
def rescaled(tmp_path: Path) -> Any:
    """A model with an adapter whose config alone has been edited."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model().save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(model()), config).save_pretrained(adapter)

    def make(alpha: int) -> SpadeLayerLM:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": alpha}))
        return SpadeLayerLM(pretrained=str(base), peft=str(adapter), device="cpu", layer=2)

    return make


def test_a_cache_is_of_one_scaling_of_an_adapter(tmp_path: Path, rescaled: Any) -> None:
    path = tmp_path / "answers.db"
    first, _ = answer(rescaled(8), path)
    assert answer(rescaled(8), path)[0] == first
    with pytest.raises(UserError, match=r"answers of another configuration.*weights was"):
        answer(rescaled(64), path)


def test_a_cache_is_of_the_active_adapter(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    both = peft.get_peft_model(copy.deepcopy(model()), config).eval()
    both.add_adapter("other", config)
    path = tmp_path / "answers.db"

    def lm() -> Any:
        return SpadeLayerLM(pretrained=both, tokenizer=byte_tokenizer(), layer=2)

    first, _ = answer(lm(), path)
    both.set_adapter("other")
    with pytest.raises(UserError, match=r"answers of another configuration.*adapter was"):
        answer(lm(), path)
    both.set_adapter("default")
    assert answer(lm(), path)[0] == first


def test_a_model_is_recognised_by_the_scaling_of_its_adapter(rescaled: Any) -> None:
    identity = LinearLens.identity(L, D)
    a, b, again = (lenses.recognise(rescaled(alpha).model, identity) for alpha in (8, 64, 8))
    assert a == again
    assert {name for name in a if a[name] != b[name]} == {"model", "adapter"}


def test_both_classes_are_one() -> None:
    assert issubclass(LSpadeLM, LinearLensLM)
    assert issubclass(TunedLensLM, LinearLensLM)
    assert [cls.name for cls in NAMES] == [*NAMES.values()]
