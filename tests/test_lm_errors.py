"""Bad input ends in a sentence that says what is wrong, what was found and what to do."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lm_eval._cli.utils import key_val_to_dict
from lm_eval.api.model import CachingLM
from lm_eval.config.evaluate_config import EvaluatorConfig
from peft import LoraConfig, get_peft_model
from sqlitedict import SqliteDict
from test_lm import build, close, dies_at, instances, model
from zoo import byte_tokenizer, tiny

from spade_eval import scoring
from spade_eval.errors import UnsupportedModelError, UserError
from spade_eval.lens import LinearLens
from spade_eval.lens_config import LensConfig
from spade_eval.lm import arguments, generation
from spade_eval.lm.layer import LogitLensLM, SpadeLayerLM
from spade_eval.lm.memory import largest_batch_size

if TYPE_CHECKING:
    from pathlib import Path

    from spade_eval.batching import Batch


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 5}, r"layer=5 is out of range: this model has 4 layers, so 0\.\.4 are valid.*-5\.\.-1"),
        ({"layer": -6}, r"layer=-6 is out of range"),
        ({"layer": 1.5}, r"layer=1\.5 is not a whole number"),
        ({"layer": "last"}, r"layer='last' is not a whole number"),
        ({"layer": True}, r"layer=True is not a whole number"),
        ({"layr": 2}, r"layer is missing.*'layr' was given. Did you mean 'layer'"),
        ({}, r"layer is missing: give layer=N"),
        ({"layer": 1, "positions": "kep"}, r"positions='kep' is not known; valid: reset, keep. Did you mean 'keep'"),
        ({"layer": 1, "start": "no"}, r"start='no' is not known; valid: keep, none"),
        ({"layer": 1, "batch_size": 0}, r"batch_size=0: give a number from 1 up, 'auto' or 'auto:N'"),
        ({"layer": 1, "batch_size": "many"}, r"batch_size='many': give a number"),
        ({"layer": 1, "positoins": "keep"}, r"'positoins' is not an argument. Did you mean 'positions'"),
        ({"layer": 1, "dtpye": "bfloat16"}, r"'dtpye' is not an argument. Did you mean 'dtype'\?"),
        ({"layer": 1, "batch_size": "auto:inf"}, r"batch_size='auto:inf': give a number"),
        ({"layer": 1, "max_batch_size": 0}, r"max_batch_size=0: give a whole number from 1 up"),
        ({"layer": 1, "max_length": -5}, r"max_length=-5: give a whole number from 1 up"),
        ({"layer": 1, "backend": "seq2seq"}, r"backend='seq2seq': the decoders read decoder-only"),
        ({"layer": 1, "dtype": "bfloat17"}, r"dtype='bfloat17' is not a torch dtype. Did you mean 'bfloat16'"),
        ({"layer": 1, "device": "gpu"}, r"device='gpu' is not here: torch \S+ sees cpu.*the first GPU is taken"),
        ({"layer": 1, "device": "cuda:97"}, r"device='cuda:97' is not here: torch \S+ sees cpu"),
        ({"layer": 1, "device": "cpu:0"}, r"device='cpu:0' is not here"),
        ({"layer": 1, "device": 0.5}, r"device=0.5 is not here"),
        ({"layer": 1, "load_in_4bit": True}, r"'load_in_4bit' is not an argument"),
        ({"layer": 1, "to_dict": 3}, r"'to_dict' is not an argument"),
        ({"layer": 1, "trust_remote_code": True, "positoins": 1}, r"'positoins' is not an argument"),
        ({"layer": 1, "treshold": 1.0}, r"SpadeLayerLM: 'treshold' is not an argument"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(SpadeLayerLM, **arguments)


def test_the_device_of_lm_evals_command_line_is_not_asked_for() -> None:
    """It says cuda:0 where nobody says anything, GPU or not."""
    assert EvaluatorConfig().device == "cuda:0"
    build(SpadeLayerLM, layer=1, device="cuda:0")
    build(SpadeLayerLM, layer=1, device=None)


def test_arguments_are_checked_before_weights_are_loaded(tmp_path: Path) -> None:
    """A folder with a config and a tokenizer but no weights: only the argument is complained
    about."""
    model().config.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    for given, message in [
        ({"layer": 9}, "out of range"),
        ({"layer": 1, "lyer": 2}, "Did you mean 'layer'"),
    ]:
        with pytest.raises(UserError, match=message):
            SpadeLayerLM(pretrained=str(tmp_path), device="cpu", **given)
    with pytest.raises(UserError, match=r"cannot be loaded \(.*no file named"):
        SpadeLayerLM(pretrained=str(tmp_path), device="cpu", layer=1)


def test_config_attributes_and_from_pretrained_arguments_pass(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    lm = LogitLensLM(
        pretrained=str(tmp_path),
        device="cpu",
        layer=1,
        attn_implementation="eager",
        rms_norm_eps=1e-4,
    )
    assert lm.model.config._attn_implementation == "eager"
    assert lm.model.config.rms_norm_eps == 1e-4


@pytest.mark.parametrize(("typed", "layer"), [("layer=-1", 4), ("layer=-3", 2), ("layer=0", 0)])
def test_layers_as_the_command_line_reads_them(typed: str, layer: int) -> None:
    assert build(SpadeLayerLM, **key_val_to_dict(typed)).layer == layer


@pytest.mark.parametrize("name", ["/no/such/folder", "nobody/no-such-model"])
def test_a_model_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(
        UserError, match=rf"^pretrained={name} cannot be loaded \(.+\). Give a model's"
    ):
        SpadeLayerLM(pretrained=name, layer=1)


def test_the_argument_at_fault_is_named(tmp_path: Path) -> None:
    names = ("base", "lens", "adapter")
    base, lens, adapter = (str(tmp_path / name) for name in names)
    model().save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    LinearLens(LensConfig("l_spade", "base", 4, 32, (2,))).save_pretrained(lens)
    get_peft_model(copy.deepcopy(model()), LoraConfig(r=2)).save_pretrained(adapter)
    for given, message in [
        ({"pretrained": lens}, f"^pretrained={lens} .*It is a lens: give it as lens="),
        ({"pretrained": adapter}, f"^pretrained={adapter} .*It is an adapter: give it as peft="),
        ({"tokenizer": "/nowhere/x"}, r"^tokenizer=/nowhere/x cannot be loaded \(.+\)\. Give an"),
        ({"tokenizer": lens}, f"^pretrained={base}, tokenizer={lens} cannot be loaded"),
        # The one at fault may begin with the other's name.
        ({"pretrained": f"{base}-it", "tokenizer": base}, f"^pretrained={base}-it, tokenizer="),
        ({"delta": "/nowhere/x"}, r"^delta=/nowhere/x cannot be loaded"),
        ({"subfolder": "step10"}, rf"^pretrained={base}, subfolder=step10 cannot be loaded"),
        ({"attn_implementation": "spda"}, r"^attn_implementation=spda cannot be loaded"),
    ]:
        with pytest.raises(UserError, match=message) as raised:
            SpadeLayerLM(**{"pretrained": base, "layer": 1, "device": "cpu"} | given)
        assert "\n" not in str(raised.value)


def test_a_bug_at_loading_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpadeLayerLM, "_check_config", lambda *_: [].index(3))
    with pytest.raises(ValueError, match="not in list") as raised:
        build(SpadeLayerLM, layer=1)
    assert not isinstance(raised.value, UserError)


def test_what_is_missing_is_told_although_it_stands_on_the_second_line() -> None:
    err = ImportError("\nA requires the protobuf library but it was not found.\nSee ...")
    told = str(arguments.not_loaded("some/model", {}, err))
    assert told == (
        "pretrained=some/model cannot be loaded (A requires the protobuf library but it was not "
        "found). Install what is missing."
    )


def test_dtypes_may_be_named_as_torch_names_them() -> None:
    lm = build(SpadeLayerLM, layer=1, mixed_precision_dtype="torch.bfloat16")
    assert lm.mixed_precision_dtype == torch.bfloat16


def test_encoder_decoder_models_are_refused(tmp_path: Path) -> None:
    tiny("t5").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"encoder-decoder model \(t5\).*causal"):
        SpadeLayerLM(pretrained=str(tmp_path), device="cpu", layer=1)


@pytest.mark.parametrize(("family", "check"), [("gemma3n", 1), ("bert", 2)])
def test_models_that_fail_a_check_are_refused(family: str, check: int) -> None:
    with pytest.raises(UnsupportedModelError, match=f"fails check {check}"):
        SpadeLayerLM(pretrained=tiny(family), tokenizer=byte_tokenizer(), layer=1)


def test_add_bos_token_needs_a_bos_token() -> None:
    with pytest.raises(
        UserError, match=r"add_bos_token=True, but the tokenizer of .* has no BOS token"
    ):
        build(SpadeLayerLM, layer=1, add_bos_token=True, tokenizer=byte_tokenizer(bos=False))


def test_empty_context_needs_a_token_to_put_there() -> None:
    with pytest.raises(UserError, match=r"neither a BOS nor an EOS token.*prefix_token_id=ID"):
        build(SpadeLayerLM, layer=1, tokenizer=byte_tokenizer(bos=False))


def test_empty_continuation_is_named() -> None:
    lm = build(SpadeLayerLM, layer=1)
    with pytest.raises(UserError, match="task task, document 1: empty continuation"):
        lm.loglikelihood(instances([("a", "x"), ("b", "")]))
    with pytest.raises(UserError, match="task task, document 1: the continuation has 70 tokens"):
        lm.loglikelihood(instances([("a", "x"), ("b", "y" * 70)]))
    assert lm.account.total.requests == 0


def out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB. GPU 0 has")


@pytest.mark.parametrize("batch_size", [4, "auto"])
def test_a_batch_that_does_not_fit_is_told(batch_size: int | str) -> None:
    lm = build(SpadeLayerLM, layer=2, batch_size=batch_size)

    lm._score = out_of_memory
    message = (
        rf"batch_size={batch_size} is too large for the memory of cpu: CUDA out of memory\. Give"
    )
    with pytest.raises(UserError, match=message):
        lm.loglikelihood(instances([("a", "b")]))


def test_texts_that_do_not_fit_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_run", out_of_memory)
    asked = instances([("a", {"until": ["b"], "max_gen_toks": 4})], "generate_until")  # type: ignore[list-item]
    with pytest.raises(UserError, match=r"batch_size=4 is too large for the memory of cpu: CUDA"):
        build(SpadeLayerLM, layer=2).generate_until(asked)


@pytest.mark.usefixtures("little_garbage")  # accelerate collects it after each that does not
@pytest.mark.parametrize("fits", [1, 3, 40])
def test_the_largest_batch_size_that_fits(fits: int) -> None:
    """The largest batch is tried, not the first."""
    rows = scoring.plan([scoring.Request((3,) * (n + 1), (4,)) for n in range(30)], scoring.Layout(64)).rows  # fmt: skip
    longest = max(len(row) for row in rows)

    def run(batch: Batch) -> None:
        assert batch.ids.shape[1] == longest
        if batch.ids.shape[0] > fits:
            out_of_memory()

    found = largest_batch_size(lambda size: rows, 32, run)
    assert found == {1: 1, 3: 3, 40: 32}[fits]


def test_another_error_while_the_batch_size_is_sought_is_its_own() -> None:
    rows = scoring.plan([scoring.Request((3,), (4,))], scoring.Layout(64)).rows

    def run(_: Batch) -> None:
        raise RuntimeError("expected scalar type Float")

    with pytest.raises(RuntimeError, match="scalar type"):
        largest_batch_size(lambda size: rows, 32, run)


@pytest.mark.usefixtures("little_garbage")
def test_rows_shrink_with_the_batch_size_that_is_tried() -> None:
    """A packed row of many questions, made for the largest size, would fit at none."""
    prefix = tuple(range(3, 53))
    asked = [scoring.Request((*prefix, q), (a, a)) for q in range(60, 460) for a in (1, 2)]
    tried = []

    def lay_out(size: int) -> list[scoring.Row]:
        return scoring.plan(
            asked, scoring.Layout(9999, packed=True, crossover=1e6, batch_size=size)
        ).rows

    def run(batch: Batch) -> None:
        tried.append(batch.ids.size)
        if batch.ids.size > 8 * 53:
            out_of_memory()

    found = largest_batch_size(lay_out, 64, run)
    assert found == 8
    assert tried[-1] <= 8 * 53 < min(tried[:-1])


def test_an_error_does_not_lose_the_account() -> None:
    lm = build(SpadeLayerLM, layer=1)
    lm.loglikelihood(instances([("a", "x")]))
    with pytest.raises(UserError):
        lm.loglikelihood(instances([("b", "y" * 70)]))
    assert lm.account.total.requests == 1


# ---------------------------------------------------------------- --use_cache


def answer(lm: Any, path: Path) -> tuple[Any, Any]:
    cached = CachingLM(lm, str(path))
    try:
        return cached.loglikelihood(instances([("abc", "d"), ("abc", "ef")])), lm
    finally:
        cached.dbdict.close()


def test_a_cache_is_used_again_by_its_own_configuration_only(tmp_path: Path) -> None:
    path = tmp_path / "answers.db"
    first, lm = answer(build(SpadeLayerLM, layer=2), path)
    assert lm.account.total.requests == 2
    again, lm = answer(build(SpadeLayerLM, layer=2), path)
    assert again == first
    assert lm.account.total.requests == 0
    for other, differs in [
        (build(SpadeLayerLM, layer=3), "layer was 2, is 3"),
        (build(SpadeLayerLM, layer=2, positions="keep"), "positions was 'reset', is 'keep'"),
        (build(LogitLensLM, layer=2), "decoder was 'spade', is 'logit_lens'"),
        (build(SpadeLayerLM, family="gemma", layer=2), "weights was"),
    ]:
        with pytest.raises(UserError, match=f"answers of another configuration.*{differs}"):
            answer(other, path)
    assert answer(build(SpadeLayerLM, layer=2), path)[0] == first


def test_a_config_override_is_another_configuration(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    settings = {"pretrained": str(tmp_path), "device": "cpu", "layer": 2}
    answer(SpadeLayerLM(**settings), tmp_path / "answers.db")
    with pytest.raises(UserError, match=r"answers of another configuration.*config was"):
        answer(SpadeLayerLM(rms_norm_eps=0.1, **settings), tmp_path / "answers.db")


def test_a_cache_of_unknown_origin_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.db"
    with SqliteDict(str(path), autocommit=True) as foreign:
        foreign["0123"] = (-1.0, True)
    with pytest.raises(UserError, match="spade_eval did not begin it"):
        answer(build(SpadeLayerLM, layer=2), path)


def test_a_killed_run_leaves_its_answers_in_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "answers.db"
    lm = build(SpadeLayerLM, layer=2, batch_size=1)
    dies_at(lm, 2)
    pairs = instances([("abcdef", "gh"), ("x", "y")])
    cached = CachingLM(lm, str(path))
    with pytest.raises(KeyboardInterrupt):
        cached.loglikelihood(pairs)
    cached.dbdict.close()
    resumed = build(SpadeLayerLM, layer=2)
    cached = CachingLM(resumed, str(path))
    # What is scored beside a request may show in its last bit.
    close(cached.loglikelihood(pairs), build(SpadeLayerLM, layer=2).loglikelihood(pairs))
    assert resumed.account.total.requests == 1
    cached.dbdict.close()
