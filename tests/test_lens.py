"""Lenses: the maps against naive loops, their files against damage, their owner against strangers."""

from __future__ import annotations

import copy
import json
import os
import stat
from pathlib import Path

import accelerate
import peft
import pytest
import torch
import transformers
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    Response,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from zoo import FAMILIES, tiny

from spade_eval import lens_files
from spade_eval.errors import UserError
from spade_eval.fingerprint import (
    adapter_fingerprint,
    adapter_scaling,
    fingerprint,
    head_rows,
    layers_fingerprint,
    same,
    weights_digest,
)
from spade_eval.lens import LensConfig, LinearLens, low_rank
from spade_eval.lens_match import check, owner

D, L = 32, 4  # as in the zoo
CONFIG = LensConfig(
    decoder="l_spade",
    base_model="someone/tiny-llama",
    revision="v1",
    fingerprint="0123456789abcdef-fedcba9876543210",
    adapter="aaaa-bbbb",
    n_layers=L,
    width=D,
    layers=(0, 2, 3),
    positions_mode="keep",
    positions="answer",
    tasks=("arc_easy", "boolq"),
    split="train",
    documents=7,
    n_positions=70,
    tokens=700,
    seed=3,
    metrics={0: {"kl": 1.25, "agreement": 0.5}, 3: {"kl": 0.0625}},
    bill={"seconds": 12.5, "note": "a | b"},
    command="spade-eval fit \\\n  --layers 0,2,3",
)


def random_lens(
    seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: object
) -> LinearLens:
    lens = LinearLens(LensConfig(**(vars(CONFIG) | overrides)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lens.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return lens.to(dtype)


def states(rows: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(1)).to(dtype)


def naive(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """h + A h + b, one number at a time, in float64."""
    h, weight, bias = h.double(), weight.double(), bias.double()
    out = h.clone()
    for p in range(len(h)):
        for i in range(h.shape[1]):
            out[p, i] += sum(weight[i, j] * h[p, j] for j in range(h.shape[1])) + bias[i]
    return out


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit, dtype included."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


# ---------------------------------------------------------------------- the maps


@torch.no_grad()
@pytest.mark.parametrize("rank", [None, 5])
def test_a_new_lens_is_the_logit_lens(rank: int | None) -> None:
    lens, h = LinearLens(LensConfig(**(vars(CONFIG) | {"rank": rank}))), states()
    for layer in lens.available:
        assert torch.equal(lens(h, layer), h)


@torch.no_grad()
def test_forward_is_the_formula_and_the_last_layer_the_identity() -> None:
    lens, h = random_lens(), states()
    for layer in CONFIG.layers:
        m = lens.layers[str(layer)]
        torch.testing.assert_close(
            lens(h, layer).double(), naive(h, m.weight, m.bias), rtol=1e-4, atol=1e-4
        )
    assert torch.equal(lens(h, L), h)
    torch.testing.assert_close(lens(h[:, None], 2)[:, 0], lens(h, 2))


@torch.no_grad()
def test_a_low_rank_map_is_the_product_of_its_factors() -> None:
    lens, h = random_lens(rank=3), states()
    m = lens.layers["2"]
    assert (m.up.shape, m.down.shape) == ((D, 3), (3, D))
    expected = naive(h, m.up.double() @ m.down.double(), m.bias)
    torch.testing.assert_close(lens(h, 2).double(), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_states_dtype_decides() -> None:
    lens = random_lens(dtype=torch.bfloat16)
    h = states()
    assert lens(h, 2).dtype == torch.float32
    # Computed in fp32, not computed in bf16 and converted.
    m = lens.layers["2"]
    torch.testing.assert_close(
        lens(h, 2).double(), naive(h, m.weight, m.bias), rtol=1e-4, atol=1e-4
    )
    assert random_lens()(h.bfloat16(), 2).dtype == torch.bfloat16


@pytest.mark.parametrize("layer", [1, -1, L + 1])
def test_a_layer_without_a_map_is_an_error_that_lists_the_others(layer: int) -> None:
    with pytest.raises(UserError, match=rf"layer {layer}; it has 0, 2, 3, 4\."):
        random_lens()(states(), layer)


def test_the_identity_is_there_at_every_layer() -> None:
    lens, h = LinearLens.identity(L, D), states()
    assert lens.available == tuple(range(L + 1))
    assert all(torch.equal(lens(h, layer), h) for layer in lens.available)
    assert not list(lens.parameters())
    with pytest.raises(UserError, match="layer 5"):
        lens(h, L + 1)
    with pytest.raises(UserError, match="lens=identity"):
        lens.save_pretrained("never-written")


@torch.no_grad()
def test_set_map_sets_one_layer_and_keeps_the_dtype() -> None:
    lens, h = LinearLens(CONFIG), states()
    weight, bias = torch.randn(D, D, dtype=torch.float64), torch.randn(D)
    lens.set_map(2, weight, bias)
    torch.testing.assert_close(lens(h, 2).double(), naive(h, weight, bias), rtol=1e-4, atol=1e-4)
    assert torch.equal(lens(h, 3), h)
    assert lens.layers["2"].weight.dtype == torch.float32
    assert lens.layers["2"].weight.requires_grad


@torch.no_grad()
def test_set_map_of_a_low_rank_lens_takes_a_matrix_or_its_factors() -> None:
    lens = random_lens(rank=3)
    weight, bias = torch.randn(D, D), torch.randn(D)
    up, down = low_rank(weight, 3)
    lens.set_map(0, weight, bias)
    lens.set_map(2, (up, down), bias)
    assert torch.equal(lens(states(), 0), lens(states(), 2))
    assert torch.equal(lens.layers["2"].up, up) and torch.equal(lens.layers["2"].down, down)


@pytest.mark.parametrize(
    ("layer", "weight", "bias", "says"),
    [
        (1, torch.zeros(D, D), torch.zeros(D), "for 0, 2, 3"),
        (L, torch.zeros(D, D), torch.zeros(D), "for 0, 2, 3"),
        (2, torch.zeros(D, D), torch.zeros(1), r"\(1,\)"),
        (2, torch.zeros(1, D), torch.zeros(D), r"\(1, 32\)"),
        (2, (torch.zeros(D, 3), torch.zeros(3, D)), torch.zeros(D), r"\(32, 3\)"),
    ],
)
def test_set_map_refuses_other_layers_and_shapes(
    layer: int, weight: object, bias: Tensor, says: str
) -> None:
    lens = random_lens()
    before = copy.deepcopy(lens.state_dict())
    with pytest.raises(UserError, match=says):
        lens.set_map(layer, weight, bias)
    assert equal(lens.state_dict(), before)


@given(d=st.integers(1, 12), r=st.integers(1, 12), seed=st.integers(0, 999))
def test_low_rank_is_the_best_approximation(d: int, r: int, seed: int) -> None:
    r = min(r, d)
    weight = torch.randn(d, d, generator=torch.Generator().manual_seed(seed))
    up, down = low_rank(weight, r)
    assert (up.shape, down.shape) == ((d, r), (r, d))
    error = torch.linalg.matrix_norm((weight - up @ down).double())
    left_out = torch.linalg.svdvals(weight.double())[r:].square().sum().sqrt()
    assert float(error) == pytest.approx(float(left_out), abs=1e-4)
    if r == d:
        torch.testing.assert_close(up @ down, weight, rtol=1e-4, atol=1e-4)


def test_low_rank_in_bf16_decomposes_in_fp32_and_balances_the_factors() -> None:
    weight = (torch.randn(D, D) * 1e-3).bfloat16()
    up, down = low_rank(weight, D)
    assert up.dtype == down.dtype == torch.bfloat16
    assert float(up.float().norm() / down.float().norm()) == pytest.approx(1, rel=0.02)
    error = (up.float() @ down.float() - weight.float()).norm() / weight.float().norm()
    assert float(error) < 0.02


@pytest.mark.parametrize("r", [0, D + 1])
def test_an_impossible_rank_is_an_error(r: int) -> None:
    with pytest.raises(UserError, match=f"rank={r}"):
        low_rank(torch.zeros(D, D), r)
    with pytest.raises(UserError, match=f"rank={r}"):
        LensConfig("l_spade", "m", L, D, (1,), rank=r)


# ---------------------------------------------------------------------- the config


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"layers": (2, 1)}, "ascending"),
        ({"layers": (1, 1)}, "ascending"),
        ({"layers": (1, L)}, r"within 0\.\.3"),
        ({"layers": (-1,)}, "within"),
        ({"layers": ("1",)}, "within"),
        ({"decoder": "lspade"}, "Did you mean 'l_spade'"),
        ({"teacher": "spad"}, "Did you mean 'spade'"),
        ({"positions_mode": "resets"}, "Did you mean 'reset'"),
        ({"positions": "some"}, "valid: all, answer"),
        ({"n_layers": "4"}, "n_layers='4'"),
        ({"width": 0}, "width=0"),
        ({"tokens": True}, "tokens=True"),
        ({"fingerprint": None}, "fingerprint=None"),
        ({"layers_fingerprint": None}, "layers_fingerprint=None"),
        ({"head_rows": 0}, "head_rows=0"),
    ],
)
def test_a_config_that_no_lens_can_have_is_an_error(wrong: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        LensConfig(**(vars(CONFIG) | wrong))


def test_a_config_survives_json() -> None:
    assert LensConfig.from_json(json.loads(json.dumps(CONFIG.to_json())), "x") == CONFIG


def test_a_config_may_lack_what_older_lenses_do_not_tell() -> None:
    config = LensConfig(
        **(vars(CONFIG) | {"layers_fingerprint": "a-b", "adapter_scaling": "c", "head_rows": 9})
    )
    raw = config.to_json()
    assert LensConfig.from_json(raw, "x") == config
    for name in ("layers_fingerprint", "adapter_scaling", "head_rows"):
        del raw[name]
    assert LensConfig.from_json(raw, "x") == CONFIG


# ---------------------------------------------------------------------- save and load


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [None, 3])
def test_round_trip_is_bitwise(tmp_path: Path, dtype: torch.dtype, rank: int | None) -> None:
    lens = random_lens(dtype=dtype, rank=rank)
    lens.save_pretrained(tmp_path / "deep" / "lens")
    again = LinearLens.from_pretrained(tmp_path / "deep" / "lens")
    assert equal(again.state_dict(), lens.state_dict())
    assert again.config == lens.config
    assert not again.training
    assert torch.equal(again(states(dtype=dtype), 2), lens(states(dtype=dtype), 2))


def test_the_folder_holds_the_files_and_nothing_else(tmp_path: Path) -> None:
    random_lens(rank=3).save_pretrained(tmp_path / "lens")
    assert os.listdir(tmp_path) == ["lens"]
    files = sorted((tmp_path / "lens").iterdir())
    assert [f.name for f in files] == ["README.md", "config.json", "model.safetensors"]
    assert len({stat.S_IMODE(f.stat().st_mode) for f in files}) == 1
    tensors = load_file(tmp_path / "lens" / "model.safetensors")
    assert sorted(tensors) == [f"layers.{n}.{t}" for n in (0, 2, 3) for t in ("bias", "down", "up")]
    assert json.loads((tmp_path / "lens" / "config.json").read_text())["layers"] == [0, 2, 3]


def test_the_card_says_what_it_is_and_how_to_use_it(tmp_path: Path) -> None:
    random_lens().save_pretrained(tmp_path / "lens")
    made = ModelCard.load(tmp_path / "lens" / "README.md")
    assert made.data.base_model == "someone/tiny-llama"
    assert made.data.library_name == "spade_eval"
    for line in (
        "    lm_eval --model l_spade \\",
        "--model_args pretrained=someone/tiny-llama,revision=v1,peft=ADAPTER,lens=LENS,layer=3",
        "| data | arc_easy, boolq |",
        "| tokens read by the model | 700 |",
        "| note | a \\| b |",
        "    spade-eval fit \\\n      --layers 0,2,3",
        "| layer | kl | agreement |\n| --- | --- | --- |\n| 0 | 1.25 | 0.5 |\n| 3 | 0.0625 |  |",
        CONFIG.fingerprint,
    ):
        assert line in made.content
    # The Hub refuses a card whose base model is no hub id.
    random_lens(base_model="/data/models/tiny").save_pretrained(tmp_path / "local")
    assert ModelCard.load(tmp_path / "local" / "README.md").data.base_model is None


def test_saving_again_replaces_weights_config_and_card(tmp_path: Path) -> None:
    random_lens(0).save_pretrained(tmp_path / "lens")
    new = random_lens(1, base_model="someone/else", layers=(1,))
    new.save_pretrained(tmp_path / "lens")
    again = LinearLens.from_pretrained(tmp_path / "lens")
    assert equal(again.state_dict(), new.state_dict()) and again.config == new.config
    assert "someone/else" in (tmp_path / "lens" / "README.md").read_text()


class Killed(BaseException):
    """Not an Exception: nothing may swallow it."""


@pytest.mark.parametrize("at", ["weights", "card", "first rename", "second rename"])
def test_a_save_that_dies_leaves_the_old_lens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    old = random_lens(0)
    old.save_pretrained(tmp_path / "lens")
    replace, renames = os.replace, []

    def die(*args: object, **kwargs: object) -> None:
        raise Killed

    def rename(source: Path, target: Path) -> None:
        renames.append(target)
        if len(renames) == (1 if at == "first rename" else 2):
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        if at == "weights":
            patch.setattr("spade_eval.lens.save_file", die)
        elif at == "card":
            patch.setattr("spade_eval.lens.card", die)
        else:
            patch.setattr(os, "replace", rename)
        with pytest.raises(Killed):
            random_lens(1).save_pretrained(tmp_path / "lens")
    assert os.listdir(tmp_path) == ["lens"]
    assert equal(LinearLens.from_pretrained(tmp_path / "lens").state_dict(), old.state_dict())


def test_no_reader_ever_sees_a_half_written_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def look(*args: object, **kwargs: object) -> None:
        seen.append((tmp_path / "lens").exists())
        save_file(*args, **kwargs)

    monkeypatch.setattr("spade_eval.lens.save_file", look)
    random_lens().save_pretrained(tmp_path / "lens")
    assert seen == [False]


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        random_lens().save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(UserError, match="cannot be written"):
        random_lens().save_pretrained(tmp_path / "thesis.tex" / "lens")


def test_a_lens_that_is_not_a_number_is_not_saved(tmp_path: Path) -> None:
    lens = random_lens()
    lens.layers["2"].bias.data[7] = torch.nan
    with pytest.raises(UserError, match=r"layers\.2\.bias of this lens holds NaN"):
        lens.save_pretrained(tmp_path / "lens")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("by", ["push_to_hub", "save_pretrained"])
def test_push_to_hub_uploads_what_save_pretrained_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    uploads: list[tuple[str, dict[str, bytes]]] = []

    def create(self: HfApi, repo_id: str, **kwargs: object) -> object:
        return type("Url", (), {"repo_id": repo_id})()

    def upload(self: HfApi, *, repo_id: str, folder_path: Path, **kwargs: object) -> str:
        uploads.append((repo_id, {f.name: f.read_bytes() for f in Path(folder_path).iterdir()}))
        return "address"

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    lens = random_lens()
    if by == "push_to_hub":
        lens.save_pretrained(tmp_path / "lens")
        assert lens.push_to_hub("someone/lens") == "address"
    else:
        assert (
            lens.save_pretrained(tmp_path / "lens", push_to_hub=True, repo_id="someone/lens")
            == "address"
        )
    written = {f.name: f.read_bytes() for f in (tmp_path / "lens").iterdir()}
    assert uploads == [("someone/lens", written)]


# ---------------------------------------------------------------------- bad files


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    random_lens().save_pretrained(tmp_path / "lens")
    return tmp_path / "lens"


def refuses(folder: Path | str, *parts: str, **hub: object) -> None:
    with pytest.raises(UserError) as caught:
        LinearLens.from_pretrained(folder, **hub)
    for part in parts:
        assert part in str(caught.value)


def test_missing_files(saved: Path, tmp_path: Path) -> None:
    (saved / "config.json").rename(tmp_path / "config.json")
    refuses(saved, "holds no config.json", "README.md, model.safetensors")
    (tmp_path / "config.json").rename(saved / "config.json")
    (saved / "model.safetensors").unlink()
    refuses(saved, "holds no model.safetensors")


def test_a_pickle_is_refused(saved: Path, tmp_path: Path) -> None:
    (saved / "model.safetensors").unlink()
    torch.save(random_lens().state_dict(), saved / "pytorch_model.bin")
    refuses(saved, "pytorch_model.bin", "a pickle can run code")
    (saved / "config.json").unlink()
    refuses(saved, "pytorch_model.bin", "a pickle can run code")


def test_no_such_folder_and_not_in_the_cache(tmp_path: Path) -> None:
    refuses(tmp_path / "absent", str(tmp_path / "absent"), "neither a folder nor a hub id")
    refuses("someone/absent-lens", "no such folder", "offline", cache_dir=tmp_path)


def test_a_lens_comes_out_of_the_hubs_cache_by_revision(saved: Path, tmp_path: Path) -> None:
    repository = tmp_path / "cache" / "models--someone--lens"
    commit = "0" * 40
    (repository / "snapshots").mkdir(parents=True)
    saved.rename(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v2").write_text(commit)
    where = {"cache_dir": tmp_path / "cache"}
    again = LinearLens.from_pretrained("someone/lens", revision="v2", **where)
    assert equal(again.state_dict(), random_lens().state_dict())
    refuses("someone/lens", "config.json", "not in the local cache", **where)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RemoteEntryNotFoundError, "holds no config.json"),
        (RevisionNotFoundError, "no revision 'v9'"),
        (RepositoryNotFoundError, "private or gated"),
        (GatedRepoError, "private or gated"),
        (HfHubHTTPError, "cannot be read: 404"),
    ],
)
def test_what_the_hub_may_answer(
    monkeypatch: pytest.MonkeyPatch, error: type[HfHubHTTPError], says: str
) -> None:
    request = get_session().build_request("GET", "https://huggingface.co")
    response = Response(404, request=request)  # of the HTTP client that the Hub's library uses

    def answer(*args: object, **kwargs: object) -> None:
        raise error("404", response=response)

    monkeypatch.setattr(lens_files, "hf_hub_download", answer)
    refuses("someone/lens", "someone/lens", says, revision="v9")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not readable JSON"),
        ("\udcff", "not readable JSON"),
        ("[1]", "not a JSON object"),
        ('{"model_type": "llama", "hidden_size": 32}', "unknown are hidden_size, model_type"),
    ],
)
def test_a_config_that_is_none(saved: Path, text: str, says: str) -> None:
    (saved / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    refuses(saved, str(saved), says)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rank": ...}, "it lacks rank"),
        ({"colour": "red"}, "unknown are colour"),
        ({"layers": None}, "wrong value"),
        ({"layers": [3, 2]}, "ascending"),
        ({"metrics": {"two": {}}}, "wrong value"),
        ({"metrics": [1]}, "wrong value"),
        ({"n_layers": "4"}, "n_layers='4'"),
    ],
)
def test_a_config_with_a_wrong_field(saved: Path, changes: dict, says: str) -> None:
    raw = json.loads((saved / "config.json").read_text()) | changes
    (saved / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    refuses(saved, "config.json of", says)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(saved: Path, keep: int) -> None:
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    refuses(saved, "model.safetensors of", "damaged")


def test_weights_that_do_not_fit_the_config(saved: Path) -> None:
    weights = saved / "model.safetensors"
    good = load_file(weights)
    key = "layers.2.weight"

    def put(tensors: dict[str, Tensor]) -> None:
        save_file({k: v.clone().contiguous() for k, v in tensors.items()}, weights)

    put({k: v for k, v in good.items() if k != key})
    refuses(saved, f"missing ['{key}'], unexpected none")
    put(good | {"layers.1.weight": good[key]})
    refuses(saved, "missing none, unexpected ['layers.1.weight']")
    put(good | {key: good[key][:, :-1]})
    refuses(saved, key, "(32, 31)", "(32, 32)")
    put(good | {key: good[key].to(torch.int8)})
    refuses(saved, key, "torch.int8")
    for value in (torch.nan, torch.inf):
        bad = good[key].clone()
        bad[3, 4] = value
        put(good | {key: bad})
        refuses(saved, key, "NaN or infinity")


# ---------------------------------------------------------------------- fingerprints


def lora(model: nn.Module, seed: int = 0, **config: object) -> nn.Module:
    """A LoRA adapter with random weights around a copy of a model."""
    torch.manual_seed(seed)
    config = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False} | config
    return peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(task_type="CAUSAL_LM", **config)
    ).eval()


def load_as(folder: Path, dtype: torch.dtype) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_checkpoint_has_one_fingerprint_in_every_dtype(
    tmp_path: Path, stored: torch.dtype
) -> None:
    copy.deepcopy(tiny("llama")).to(stored).save_pretrained(tmp_path)
    full, brain, half = (
        fingerprint(load_as(tmp_path, t)) for t in (torch.float32, torch.bfloat16, torch.float16)
    )
    assert same(full, brain) and same(full, half)
    assert full.split("-")[0] == brain.split("-")[0]
    assert full.split("-")[1] == half.split("-")[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_fingerprint_of_norm_and_head_alone(family: str) -> None:
    model = copy.deepcopy(tiny(family))
    before = fingerprint(model)
    outside = {id(p) for p in model.get_output_embeddings().parameters()}
    with torch.no_grad():
        for name, parameter in model.get_decoder().named_parameters():
            if ".0." in name or ".3." in name:  # the first layer and the last
                parameter.add_(1)
        if id(model.get_input_embeddings().weight) not in outside:  # not tied
            model.get_input_embeddings().weight.add_(1)
    assert fingerprint(model) == before
    assert not same(before, fingerprint(tiny(family, seed=1)))


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_one_changed_number_of_norm_or_head_changes_both_halves(name: str) -> None:
    model = copy.deepcopy(tiny("llama"))
    before = fingerprint(model)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[5] += 0.5
    assert not same(before, fingerprint(model))


def test_a_change_of_one_column_of_a_large_head_is_noticed() -> None:
    """Evenly spaced values of a head whose width divides the step would come from few columns."""
    model = copy.deepcopy(tiny("llama", vocab_size=65_536))
    before = fingerprint(model)
    weight, seen = model.lm_head.weight.detach().clone(), 0
    for column in range(D):
        with torch.no_grad():
            model.lm_head.weight.copy_(weight)[:, column] += 0.5
        seen += not same(before, fingerprint(model))
    assert seen == D


@pytest.mark.parametrize("column", [0, 1, D - 1])
def test_runs_tell_models_apart_that_differ_in_one_column(column: int) -> None:
    model = copy.deepcopy(tiny("llama", vocab_size=1_024))
    before = weights_digest(model)
    with torch.no_grad():
        model.lm_head.weight[:, column] += 0.5
    assert weights_digest(model) != before


def test_the_shape_counts() -> None:
    a, b = copy.deepcopy(tiny("llama")), copy.deepcopy(tiny("llama"))
    for model, shape in ((a, (24, 2)), (b, (12, 4))):
        model.set_output_embeddings(nn.Linear(*shape, bias=False))
        nn.init.ones_(model.get_output_embeddings().weight)
    assert not same(fingerprint(a), fingerprint(b))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"modules_to_save": ["lm_head", "norm"]},
        {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [3]}},
        {"use_dora": True, "target_modules": ["lm_head"]},
    ],
)
def test_a_peft_wrapper_has_the_fingerprint_of_its_base(config: dict) -> None:
    base = tiny("llama")
    wrapped = lora(base, **config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name or "trainable_tokens" in name:
                parameter.add_(1)
    assert fingerprint(wrapped) == fingerprint(base)
    assert adapter_fingerprint(wrapped) is not None


def test_the_adapters_hash_is_that_of_its_weights(tmp_path: Path) -> None:
    base = tiny("llama")
    assert adapter_fingerprint(base) is None
    model = lora(base)
    before = adapter_fingerprint(model)
    assert before == adapter_fingerprint(lora(base))
    assert not same(before, adapter_fingerprint(lora(base, seed=1)))
    assert not same(before, adapter_fingerprint(lora(base, target_modules=["v_proj"])))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, adapter_name="another")
    assert adapter_fingerprint(again) == before
    assert same(adapter_fingerprint(copy.deepcopy(model).bfloat16()), before)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).view(-1)[0] += 0.5
    assert not same(adapter_fingerprint(model), before)


def test_the_adapters_hash_leaves_out_its_base() -> None:
    """PEFT would save the base's embedding beside an adapter of it."""
    a, b = (lora(tiny("llama", seed), target_modules=["embed_tokens"]) for seed in (0, 1))
    assert adapter_fingerprint(a) == adapter_fingerprint(b)


def test_only_the_active_adapter_counts() -> None:
    model = lora(tiny("llama"))
    first = adapter_fingerprint(model)
    model.add_adapter(
        "second", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    assert adapter_fingerprint(model) == first
    model.set_adapter("second")
    assert not same(adapter_fingerprint(model), first)


def test_an_adapter_that_transformers_loaded_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers 5.24 asks for a later PEFT than there is on some indexes.
    monkeypatch.setattr(
        "transformers.integrations.peft.check_peft_version", lambda min_version: None
    )
    model = copy.deepcopy(tiny("llama"))
    torch.manual_seed(0)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert fingerprint(model) == fingerprint(tiny("llama"))
    assert adapter_fingerprint(model) is not None


def test_the_adapters_scaling_is_in_a_hash_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny("llama")
    assert adapter_scaling(base) is None
    model, other = lora(base, lora_alpha=8), lora(base, lora_alpha=64)
    found = adapter_scaling(model)
    assert adapter_fingerprint(model) == adapter_fingerprint(other)  # no weight tells it
    assert len({found, adapter_scaling(other), adapter_scaling(lora(base, use_rslora=True))}) == 3
    # Neither what an adapter is called, nor who loaded it, counts.
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, adapter_name="another")
    assert adapter_scaling(again) == found
    monkeypatch.setattr(
        "transformers.integrations.peft.check_peft_version", lambda min_version: None
    )
    native = copy.deepcopy(base)
    native.load_adapter(str(tmp_path))
    assert adapter_scaling(native) == found
    # The active ones do.
    config = peft.LoraConfig(r=2, lora_alpha=64, target_modules=["q_proj"])
    model.add_adapter("second", config)
    wider = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model.add_adapter("idle", wider)
    assert adapter_scaling(model) == found
    model.set_adapter("second")
    assert adapter_scaling(model) == adapter_scaling(other)
    with other.disable_adapter():
        assert adapter_scaling(other) not in (found, adapter_scaling(model))


def test_one_layers_scaling_counts() -> None:
    model = lora(tiny("llama"))
    before = adapter_scaling(model)
    model.get_submodule("base_model.model.model.layers.2.self_attn.q_proj").set_scale("default", 3)
    assert adapter_scaling(model) != before


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_fingerprint_of_its_own_layers(family: str) -> None:
    base = tiny(family)
    before = layers_fingerprint(base)
    assert before
    wrapped = lora(base, target_modules="all-linear")
    assert layers_fingerprint(wrapped) == before
    with torch.no_grad():
        base = copy.deepcopy(base)
        for outside in (base.get_input_embeddings(), base.get_output_embeddings()):
            outside.weight.add_(1)
    assert layers_fingerprint(base) == before
    assert not same(layers_fingerprint(wrapped.merge_and_unload()), before)


def test_experts_with_an_adapter_have_the_fingerprint_of_their_layers() -> None:
    base = tiny("gpt_oss")
    wrapped = lora(base, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    assert layers_fingerprint(wrapped) == layers_fingerprint(base)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_checkpoints_layers_have_one_fingerprint_in_every_dtype(
    tmp_path: Path, stored: torch.dtype
) -> None:
    copy.deepcopy(tiny("llama")).to(stored).save_pretrained(tmp_path)
    full, brain, half = (
        layers_fingerprint(load_as(tmp_path, t))
        for t in (torch.float32, torch.bfloat16, torch.float16)
    )
    assert same(full, brain) and same(full, half)


def test_layers_that_are_not_the_checkpoints_have_no_fingerprint(tmp_path: Path) -> None:
    quantised, packed = copy.deepcopy(tiny("llama")), copy.deepcopy(tiny("llama"))
    quantised.is_quantized = True  # as transformers marks it
    assert layers_fingerprint(quantised) == ""
    q = packed.model.layers[1].self_attn.q_proj
    q.weight = nn.Parameter(q.weight.to(torch.int8), requires_grad=False)
    assert layers_fingerprint(packed) == ""
    merged = lora(tiny("llama"))
    merged.merge_adapter()
    assert layers_fingerprint(merged) == ""
    merged.unmerge_adapter()
    assert layers_fingerprint(merged)
    offloaded = copy.deepcopy(tiny("llama"))
    accelerate.disk_offload(offloaded, tmp_path, execution_device=torch.device("cpu"))
    assert layers_fingerprint(offloaded) == ""


def test_offloaded_weights_are_read(tmp_path: Path) -> None:
    model = copy.deepcopy(tiny("llama"))
    before = fingerprint(model)
    model = accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert model.lm_head.weight.is_meta
    assert fingerprint(model) == before
    assert model.lm_head.weight.is_meta


def test_weights_without_values_are_an_error() -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny("llama").config)
    with pytest.raises(UserError, match="meta device"):
        fingerprint(model)


# ---------------------------------------------------------------------- whose lens it is


def config_of(model: nn.Module, **overrides: object) -> LensConfig:
    return LensConfig(**(vars(CONFIG) | owner(model) | overrides))


UNKNOWN = {"layers_fingerprint": "", "head_rows": None, "adapter_scaling": None}


def test_a_lens_fits_its_model(caplog: pytest.LogCaptureFixture) -> None:
    base, wrapped = tiny("llama"), lora(tiny("llama"))
    check(config_of(base), base, "x")
    check(LinearLens(config_of(base)), copy.deepcopy(base).bfloat16(), "x")
    check(config_of(wrapped), wrapped, "x")
    check(LinearLens.identity(L, D), wrapped, "identity")
    assert not caplog.records


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"width": 48}, "width is 48, the model's is 32"),
        ({"n_layers": 5}, "number of layers is 5, the model's is 4"),
    ],
)
@pytest.mark.parametrize("decoder", ["l_spade", "identity"])
def test_another_width_or_depth_cannot_be_forced(wrong: dict, says: str, decoder: str) -> None:
    model = tiny("llama")
    for force in (False, True):
        with pytest.raises(UserError, match=says) as caught:
            check(config_of(model, decoder=decoder, **wrong), model, "x", force=force)
        assert "force_lens" not in str(caught.value)


def test_another_models_lens_is_refused_unless_forced(caplog: pytest.LogCaptureFixture) -> None:
    model, other = tiny("llama"), tiny("llama", seed=1)
    config = config_of(other)
    with pytest.raises(UserError) as caught:
        check(config, model, "some/lens")
    for part in ("lens=some/lens", config.fingerprint, fingerprint(model), CONFIG.base_model):
        assert part in str(caught.value)
    assert str(caught.value).endswith("force_lens=True overrides this check.")
    check(config, model, "some/lens", force=True)
    (record,) = caplog.records
    assert config.fingerprint in record.getMessage() and fingerprint(model) in record.getMessage()


def test_another_adapter_is_refused_both_ways() -> None:
    base = tiny("llama")
    a, b = lora(base), lora(base, seed=1)
    for config, model, its, models in (
        (config_of(a), base, adapter_fingerprint(a), "none"),
        (config_of(base), a, "none", adapter_fingerprint(a)),
        (config_of(a), b, adapter_fingerprint(a), adapter_fingerprint(b)),
    ):
        with pytest.raises(UserError, match=f"its adapter is {its}, the model's is {models}"):
            check(config, model, "x")
        check(config, model, "x", force=True)


def test_another_scaling_of_its_adapter_is_refused() -> None:
    a, b = (lora(tiny("llama"), lora_alpha=alpha) for alpha in (8, 64))
    says = f"scaling .* is {adapter_scaling(a)}, the model's is {adapter_scaling(b)}"
    with pytest.raises(UserError, match=says):
        check(config_of(a), b, "x")
    check(config_of(a), b, "x", force=True)
    check(config_of(a, **UNKNOWN), a, "x")  # what an older lens does not tell is not asked for
    check(config_of(a, **UNKNOWN), b, "x")


def test_a_merged_adapter_makes_another_model() -> None:
    base = tiny("llama")
    merged = lora(base, target_modules="all-linear").merge_and_unload()
    assert fingerprint(merged) == fingerprint(base)
    for its, model in ((base, merged), (merged, base)):
        says = f"layers is {layers_fingerprint(its)} .*, the model's is {layers_fingerprint(model)}"
        with pytest.raises(UserError, match=says):
            check(config_of(its), model, "x")
        check(config_of(its), model, "x", force=True)
        check(config_of(its, **UNKNOWN), model, "x")


def test_layers_that_cannot_be_read_are_not_compared(tmp_path: Path) -> None:
    base = tiny("llama")
    offloaded = accelerate.disk_offload(
        copy.deepcopy(base), tmp_path, execution_device=torch.device("cpu")
    )
    assert owner(offloaded) == owner(base) | {"layers_fingerprint": ""}
    check(config_of(base), offloaded, "x")
    check(config_of(offloaded), base, "x")


@pytest.mark.parametrize("family", ["llama", "phi"])  # phi's head has a bias
def test_padding_of_the_vocabulary_does_not_make_another_model(family: str) -> None:
    """lm-eval cuts it to the tokenizer's size where it loads an adapter."""
    padded = tiny(family)
    cut = copy.deepcopy(padded)
    cut.resize_token_embeddings(90)
    padded, cut = lora(padded), lora(cut)
    assert (head_rows(padded), head_rows(cut)) == (97, 90)
    check(config_of(cut), padded, "x")
    with pytest.raises(UserError, match=r"head had 97 rows, this has 90.*resize_token_embeddings"):
        check(config_of(padded), cut, "x")
    # An older lens knows no number: what makes the heads equal is said, and does.
    old = config_of(cut, **UNKNOWN)
    with pytest.raises(UserError, match=r"head has 97 rows.*resize_token_embeddings\(len\(tok"):
        check(old, padded, "x")
    padded.resize_token_embeddings(90)
    check(old, padded, "x")


def test_rows_that_the_lens_knows_are_compared() -> None:
    cut, other = copy.deepcopy(tiny("llama")), copy.deepcopy(tiny("llama"))
    cut.resize_token_embeddings(90)
    with torch.no_grad():
        other.lm_head.weight[89] += 1
    with pytest.raises(UserError, match="fingerprint of norm and head"):
        check(config_of(cut), other, "x")


# ---------------------------------------------------------------------- the tuned-lens package


def tuned_lens(folder: Path, prefix: str = "", **changes: object) -> dict[str, Tensor]:
    """A folder as tuned-lens 0.2.0 writes it: the state of an nn.ModuleList of nn.Linear."""
    torch.manual_seed(2)
    modules = nn.ModuleList(nn.Linear(D, D, bias=bool(changes.get("bias", True))) for _ in range(L))
    folder.mkdir(exist_ok=True)
    state = {prefix + name: tensor for name, tensor in modules.state_dict().items()}
    torch.save(state, folder / "params.pt")
    config = {
        "base_model_name_or_path": "EleutherAI/pythia-tiny", "d_model": D, "num_hidden_layers": L, "bias": True,
        "base_model_revision": None, "unembed_hash": "1234", "lens_type": "linear_tuned_lens",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | changes))
    return state


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "layer_translators.", "a.b."])
def test_a_published_tuned_lens_is_read(tmp_path: Path, prefix: str) -> None:
    state, h = tuned_lens(tmp_path, prefix), states()
    lens = LinearLens.from_pretrained(tmp_path)
    assert (lens.config.decoder, lens.config.teacher, lens.config.fingerprint) == (
        "tuned_lens",
        "model",
        "",
    )
    assert lens.available == (0, 1, 2, 3, 4)
    for layer in range(L):
        expected = naive(h, state[f"{prefix}{layer}.weight"], state[f"{prefix}{layer}.bias"])
        torch.testing.assert_close(lens(h, layer).double(), expected, rtol=1e-4, atol=1e-4)
    lens.save_pretrained(tmp_path / "ours")  # and may be kept in our format
    assert equal(LinearLens.from_pretrained(tmp_path / "ours").state_dict(), lens.state_dict())


@torch.no_grad()
def test_a_tuned_lens_without_bias(tmp_path: Path) -> None:
    state = tuned_lens(tmp_path, bias=False)
    expected = naive(states(), state["1.weight"], torch.zeros(D))
    ours = LinearLens.from_pretrained(tmp_path)(states(), 1)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)


class Malicious:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


def test_a_pickle_that_is_more_than_tensors_is_not_run(tmp_path: Path) -> None:
    tuned_lens(tmp_path)
    torch.save({"0.weight": Malicious(tmp_path / "pwned")}, tmp_path / "params.pt")
    refuses(tmp_path, "params.pt of", "damaged or not what its name says")
    assert not (tmp_path / "pwned").exists()
    torch.save({"0.weight": "text"}, tmp_path / "params.pt")
    refuses(tmp_path, "something else than tensors")
    torch.save([torch.zeros(1)], tmp_path / "params.pt")
    refuses(tmp_path, "something else than tensors")
    (tmp_path / "params.pt").write_bytes(b"PK\x03\x04 half a file")
    refuses(tmp_path, "params.pt of", "damaged")
    (tmp_path / "params.pt").unlink()
    refuses(tmp_path, "holds no params.pt")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": L + 1}, "missing ['layers.4.bias'"),
        ({"num_hidden_layers": L - 1}, "unexpected ['layers.3.bias'"),
        ({"d_model": D + 1}, "(33, 33)"),
        ({"num_hidden_layers": "4"}, "n_layers='4'"),
        ({"lens_type": "quadratic"}, "'quadratic'"),
    ],
)
def test_a_tuned_lens_that_does_not_fit_its_config(
    tmp_path: Path, changes: dict, says: str
) -> None:
    tuned_lens(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | changes))
    refuses(tmp_path, str(tmp_path), says)


def test_a_tuned_lens_is_known_by_its_models_name_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tuned_lens(tmp_path)
    lens, model = LinearLens.from_pretrained(tmp_path), copy.deepcopy(tiny("llama"))
    model.config.name_or_path = "/models/pythia-tiny"
    check(lens, model, "x")
    assert "cannot be checked" in caplog.text
    model.config.name_or_path = "EleutherAI/pythia-large"
    with pytest.raises(
        UserError,
        match="names EleutherAI/pythia-tiny as its model, this is EleutherAI/pythia-large",
    ):
        check(lens, model, "x")
    check(lens, model, "x", force=True)
