"""`spade_exit` and `lens_exit` as lm-eval calls them, on tiny models."""

from __future__ import annotations

import copy
import json
import logging
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from test_lm import build, close, dies_at, instances, model, task_pairs, text
from zoo import byte_tokenizer

from spade_eval.errors import UserError
from spade_eval.fingerprint import fingerprint
from spade_eval.lens import LinearLens
from spade_eval.lens_config import LensConfig
from spade_eval.lm.cache import KEY
from spade_eval.lm.exit import LensExitLM, SpadeExitLM
from spade_eval.lm.layer import LogitLensLM, SpadeLayerLM

if TYPE_CHECKING:
    from pathlib import Path

EVERY = {"lens": "identity", "interval": 1, "min_layer": 1}


pytestmark = pytest.mark.usefixtures("one_thread")


def exit_lm(threshold: Any = 4.0, cls: Any = SpadeExitLM, **kwargs: Any) -> Any:
    return build(cls, threshold=threshold, **(EVERY | kwargs))


def lens(layers: tuple[int, ...] = (1, 2, 3), family: str = "llama", width: int = 32) -> LinearLens:
    """Random maps for the model of `build`."""
    mark = fingerprint(model(family))
    made = LinearLens(LensConfig("l_spade", family, 4, width, layers, fingerprint=mark))
    generator = torch.Generator().manual_seed(5)
    for layer in layers:
        made.set_map(layer, torch.randn(width, width, generator=generator) * 0.1, torch.zeros(width))  # fmt: skip
    return made


def lens_of_another_model() -> LinearLens:
    """Of the same size, for another norm and head."""
    made = lens()
    config = LensConfig("l_spade", "another", 4, 32, (1, 2, 3), fingerprint="0" * 16 + "-" + "1" * 16)  # fmt: skip
    other = LinearLens(config)
    other.load_state_dict(made.state_dict())
    return other


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's config and tokenizer; its weights must not be asked for."""
    path = tmp_path / "model"
    model().config.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(HFLM, "_create_model", fail)
    return path


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(("confidence", "never_met"), [("entropy", 0.0), ("max_prob", 1.0)])
def test_where_nothing_exits_a_threshold_is_proposed(
    confidence: Any, never_met: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """At that threshold about a tenth of the contexts exit at the last candidate."""
    asked = instances(task_pairs())
    lm = exit_lm(threshold=never_met, confidence=confidence, interval=3, min_layer=3)
    lm.loglikelihood(asked)
    told = capsys.readouterr().err
    contexts = lm.account.total.exits.total()
    assert f"0 of {contexts} decisions exited. At the last candidate, layer 3, the median" in told
    proposed = float(told.split("threshold=")[-1].split()[0])
    lm = exit_lm(threshold=proposed, confidence=confidence, interval=3, min_layer=3)
    lm.loglikelihood(asked)
    assert "decisions exited" not in capsys.readouterr().err
    assert 1 <= lm.account.total.exits[3] <= 0.3 * contexts


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("scope", ["context", "token", "request"])
@pytest.mark.parametrize("cls", [SpadeExitLM, LensExitLM])
def test_a_threshold_below_zero_is_full_depth_without_a_check(
    cls: Any, scope: str, packed: bool
) -> None:
    requests = instances(task_pairs())
    lm = exit_lm(-1, cls, exit_scope=scope, logits_cache=packed)
    rows = [0]
    handle = lm.model.get_output_embeddings().register_forward_hook(
        lambda _m, _a, out: rows.__setitem__(0, rows[0] + out.shape[0] * out.shape[1])
    )
    found = lm.loglikelihood(requests)
    handle.remove()
    assert found == build(SpadeLayerLM, layer=4, logits_cache=packed).loglikelihood(requests)
    close(found, build(HFLM).loglikelihood(requests))
    total = lm.account.total
    assert rows == [total.positions_scored]
    assert (total.check_token_layers, total.tail_token_layers) == (0, 0)
    assert {*total.exits} == {*total.row_exits} == {4}


def test_every_threshold_of_probabilities_above_one_makes_no_check() -> None:
    for confidence in ("max_prob", "top2_margin"):
        lm = exit_lm(1.01, confidence=confidence)
        lm.loglikelihood(instances(task_pairs()))
        assert lm.account.total.check_token_layers == 0


def test_infinite_thresholds_are_the_first_candidate() -> None:
    requests = instances([pair for pair in task_pairs() if len(pair[0]) > 1])
    for threshold in ("inf", float("inf"), 1e9):
        lm = exit_lm(threshold, min_layer=2)
        close(lm.loglikelihood(requests), build(SpadeLayerLM, layer=2).loglikelihood(requests))
    lm = exit_lm(99, LensExitLM, min_layer=2)
    close(lm.loglikelihood(requests), build(LogitLensLM, layer=2).loglikelihood(requests))


def test_states_in_fp32_beside_weights_of_half_precision_are_not_rounded_where_they_exit() -> None:
    requests = instances([pair for pair in task_pairs() if len(pair[0]) > 1])
    network = copy.deepcopy(model("mamba")).bfloat16()
    common = {"pretrained": network, "tokenizer": byte_tokenizer(), "batch_size": 4}
    exits = SpadeExitLM(threshold="inf", lens="identity", interval=1, min_layer=2, **common)
    fixed = SpadeLayerLM(layer=2, **common)
    close(exits.loglikelihood(requests), fixed.loglikelihood(requests))


def test_thresholds_change_the_scores_of_answers_of_several_tokens() -> None:
    requests = instances([("Q: the cat", " sleeps under"), ("Q: the dog", " runs over")])
    scores = [[x for x, _ in exit_lm(t).loglikelihood(requests)] for t in (-1, 99)]
    assert min(abs(a - b) for a, b in zip(*scores, strict=True)) > 0.01


@pytest.mark.parametrize("cls", [SpadeExitLM, LensExitLM])
@pytest.mark.parametrize("given", ["identity", "maps"])
def test_an_empty_context_is_answered_by_the_start_token_at_full_depth(
    cls: Any, given: str
) -> None:
    """Its state is not what lay in memory before."""
    junk = [torch.full((1, 32), 1e3) for _ in range(100)]
    del junk
    for scope in ("context", "token", "request"):
        lm = exit_lm(99, cls, exit_scope=scope, lens=lens() if given == "maps" else given)
        found = lm.loglikelihood(instances([("", "x"), ("", "y")]))
        close(found, build(HFLM).loglikelihood(instances([("", "x"), ("", "y")])))
        assert lm.account.total.exits == {}
        assert lm.account.total.first_positions == 1


@pytest.mark.parametrize("arguments", [{}, {"exit_scope": "token"}, {"exit_scope": "request"}, {"confidence": "choice_entropy", "threshold": 0.9}, {"readout": "lens"}])  # fmt: skip
def test_answers_do_not_depend_on_batching_order_or_layout(arguments: dict) -> None:
    pairs = sorted({*task_pairs(2)})
    maps = lens()
    reference = exit_lm(**({"lens": maps, "batch_size": 1, "logits_cache": False} | arguments))
    expected = dict(zip(pairs, reference.loglikelihood(instances(pairs)), strict=True))
    exits = reference.account.total.exits
    assert len(exits) > 1
    for seed, batch_size, cache in [(1, 1, True), (2, 4, True), (3, 16, True), (4, 16, False)]:
        random.Random(seed).shuffle(pairs)
        lm = exit_lm(**({"lens": maps, "batch_size": batch_size, "logits_cache": cache} | arguments))  # fmt: skip
        close(lm.loglikelihood(instances(pairs)), [expected[p] for p in pairs])
        if arguments.get("exit_scope") == "request":
            assert lm.account.total.exits == exits  # the others share decisions in packed rows


# ---------------------------------------------------------------- whole texts


def pages() -> list[Instance]:
    rng = random.Random(1)
    texts = [(text(rng, n),) for n in (12, 3, 25, 1)]
    return instances([*texts, ("",)], "loglikelihood_rolling")


def test_whole_texts_decide_by_token() -> None:
    found = {scope: exit_lm(4.0, exit_scope=scope) for scope in ("context", "token", "request")}
    values = {scope: lm.loglikelihood_rolling(pages()) for scope, lm in found.items()}
    assert values["context"] == values["token"] == values["request"]
    total = found["context"].account.total
    assert total.exits.total() == total.positions_scored - total.first_positions
    assert len(total.exits) > 1
    # And choices still by context afterwards.
    lm = found["context"]
    before = total.exits.total()
    lm.loglikelihood(instances([("Q: the cat", " sleeps")]))
    assert lm.account.total.exits.total() == before + 1
    full = exit_lm(-1).loglikelihood_rolling(pages())
    theirs = [float(x) for x in build(HFLM).loglikelihood_rolling(pages())]
    torch.testing.assert_close(full, theirs, atol=3e-4, rtol=0)


def test_whole_texts_have_no_choices() -> None:
    lm = exit_lm(0.5, confidence="choice_entropy")
    with pytest.raises(UserError, match=r"task: confidence=choice_entropy needs answer choices"):
        lm.loglikelihood_rolling(pages())
    assert lm.account.total.requests == 0


# ---------------------------------------------------------------- what is written down


def test_settings_and_account_go_to_the_results() -> None:
    lm = exit_lm(4.0, lens=lens(), interval=2, min_layer=None)
    lm.loglikelihood(instances(task_pairs()))
    spade = json.loads(json.dumps(lm.get_model_info()["spade"]))
    expected = {
        "decoder": "spade_exit", "threshold": 4.0, "confidence": "entropy", "interval": 2,
        "exit_scope": "context", "readout": "spade", "positions": "reset", "candidates": [2],
        "lens": "given in Python", "lens_decoder": "l_spade", "layers": 4,
    }  # fmt: skip
    assert {k: spade[k] for k in expected} == expected
    account = spade["account"]
    for key in (
        "exits", "row_exits", "mean_exit_layer", "mean_row_exit_layer", "main_token_layers",
        "tail_token_layers", "check_token_layers", "head_token_layers", "full_depth_token_layers",
        "implied_speedup", "seconds", "positions_scored",
    ):  # fmt: skip
        assert account[key], key
    assert account["requests"] == account["tasks"]["task"]["requests"] == len(task_pairs())


def test_lens_exit_is_spade_exit_with_another_readout() -> None:
    requests = instances(task_pairs())
    one, other = exit_lm(cls=LensExitLM), exit_lm(readout="lens")
    assert (one.rule.readout, exit_lm().rule.readout) == ("lens", "spade")
    assert exit_lm(cls=LensExitLM, readout="spade").rule.readout == "spade"
    assert one.loglikelihood(requests) == other.loglikelihood(requests)
    assert one.get_model_info()["spade"]["decoder"] == "lens_exit"


@pytest.mark.parametrize("scope", ["context", "token", "request"])
@pytest.mark.parametrize("packed", [True, False])
def test_the_log_has_a_line_per_scored_position(tmp_path: Path, scope: str, packed: bool) -> None:
    path = tmp_path / "deep" / "exits.jsonl"
    requests = [
        Instance("loglikelihood", {}, (question, answer), idx, (f"task{doc % 2}", doc, 1))
        for doc, question in enumerate(["Q: the cat", "Q: old", "", "Q: the cat", "Q"])
        for idx, answer in enumerate([" sleeps", " A", "b"])
    ]
    path.parent.mkdir()
    path.write_text("of an earlier run\n")
    lm = exit_lm(exit_log=str(path), exit_scope=scope, logits_cache=packed)
    answers = lm.loglikelihood([*requests, requests[-1]])  # a copy that keeps ranks in step
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found: dict[tuple, list[dict]] = {}
    for line in lines:
        found.setdefault((line["task"], line["doc"], line["request"]), []).append(line)
    assert len(found) == len(requests)
    for request, (logprob, _) in zip(requests, answers, strict=False):
        mine = sorted(found[request.task_name, request.doc_id, request.idx], key=lambda x: x["position"])  # fmt: skip
        context, answer = (lm.tok_encode(part) for part in request.args)
        first = max(len(context), 1) - 1
        assert [x["position"] for x in mine] == list(range(first, first + len(answer)))
        assert [x["token"] for x in mine] == answer
        assert sum(x["logprob"] for x in mine) == pytest.approx(logprob, abs=1e-5)
        for x in mine:
            assert x["exit_layer"] in (1, 2, 3, 4)
            if x["confidence"] is None:
                assert x["exit_layer"] == 4
            else:
                assert (x["confidence"] <= 4.0) == (x["exit_layer"] < 4)
        if scope != "token":
            assert len({x["exit_layer"] for x in mine}) == 1
    assert len({x["exit_layer"] for x in lines}) > 1


def test_a_log_of_pages_names_their_documents(tmp_path: Path) -> None:
    path = tmp_path / "exits.jsonl"
    lm = exit_lm(exit_log=path)
    totals = lm.loglikelihood_rolling(pages())
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for page, total in zip(pages(), totals, strict=True):
        mine = [x for x in lines if x["doc"] == page.doc_id]
        assert len(mine) == len(page.args[0].encode())
        assert sum(x["logprob"] for x in mine) == pytest.approx(total, abs=1e-4)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"threshold is missing. Give the entropy in nats"),
        ({"confidence": "max_prob"}, r"threshold is missing. Give the probability"),
        ({"threshold": "nan"}, r"threshold=nan"),
        ({"threshold": float("nan")}, r"threshold=nan"),
        ({"threshold": "high"}, r"threshold='high' is not a number"),
        ({"threshold": True}, r"threshold=True is not a number"),
        ({"threshold": 1, "interval": 0}, r"interval=0: give a whole number from 1 up"),
        ({"threshold": 1, "interval": 1.5}, r"interval=1\.5: give a whole number"),
        ({"threshold": 1, "interval": 4}, r"interval=4 is too large: this model has 4 layers"),
        ({"threshold": 1, "interval": 9}, r"interval=9 is too large"),
        ({"threshold": 1, "min_layer": 4}, r"min_layer=4 lies beyond the last candidate"),
        ({"threshold": 1, "min_layer": -1}, r"min_layer=-1: give a whole number from 0 up"),
        ({"threshold": 1, "confidence": "entrpy"}, r"confidence='entrpy' is not known.*'entropy'"),
        ({"threshold": 1, "readout": "spde"}, r"readout='spde' is not known.*'spade'"),
        ({"threshold": 1, "exit_scope": "row"}, r"exit_scope='row' is not known"),
        ({"threshold": 1, "positions": "kep"}, r"positions='kep' is not known"),
        ({"threshold": 1, "confidence": "choice_entropy", "exit_scope": "token"}, r"choice_entropy asks which choice.*exit_scope=\s?token"),
        ({"threshold": 1, "lens": None}, r"spade_exit needs lens=FOLDER.*spade-eval fit"),
        ({"threshold": 1, "lens": ""}, "lens= is empty. Give the folder or hub id of a lens"),
        ({"threshold": 1, "lens": "/no/such/lens"}, r"/no/such/lens"),
        ({"threshold": 1, "treshold": 2}, r"'treshold' is not an argument. Did you mean 'threshold'"),
        ({"treshold": 2}, r"threshold is missing"),
    ],
)  # fmt: skip
def test_bad_arguments_cost_no_loading(folder: Path, arguments: dict, message: str) -> None:
    given = {"lens": "identity"} | arguments
    with pytest.raises(UserError, match=message):
        SpadeExitLM(pretrained=str(folder), device="cpu", **given)


def test_a_lens_of_a_deeper_model_costs_no_loading(folder: Path) -> None:
    """And is not told about its maps first."""
    deep = LinearLens(LensConfig("l_spade", "deep", 30, 32, (20, 22)))
    with pytest.raises(UserError, match=r"its number of layers is 30, the model's is 4\."):
        SpadeExitLM(pretrained=str(folder), device="cpu", threshold=1, lens=deep)


def test_a_lens_without_maps_there_costs_no_loading(folder: Path) -> None:
    for arguments, message in [
        ({}, r"no map at a layer where an exit may happen. Its maps: 1, 4; asked with interval=2,min_layer=2: 2"),
        ({"interval": 1, "min_layer": 2}, r"Its maps: 1, 4; asked with interval=1,min_layer=2: 2, 3.*interval=1,min_layer=1"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            SpadeExitLM(str(folder), threshold=1.0, lens=lens((1,)), device="cpu", **arguments)


def test_lens_exit_names_itself(folder: Path) -> None:
    with pytest.raises(UserError, match="lens_exit needs lens=FOLDER"):
        LensExitLM(str(folder), threshold=0.5, device="cpu")


def test_a_log_that_cannot_be_written_costs_no_loading(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "exits.jsonl"):
        with pytest.raises(UserError, match=r"exit_log=.* cannot be written: "):
            SpadeExitLM(str(folder), threshold=1.0, lens="identity", exit_log=path, device="cpu")


def test_good_arguments_reach_the_model(folder: Path) -> None:
    """So that the tests above prove something."""
    with pytest.raises(AssertionError, match="the model was loaded"):
        SpadeExitLM(str(folder), threshold=1.0, lens=lens(), device="cpu")


def test_a_lens_of_another_model(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(
        UserError, match=r"(?s)lens=.* was not fitted for .*fingerprint.*force_lens=True"
    ):
        exit_lm(lens=lens_of_another_model())
    with pytest.raises(UserError, match=r"its width is 16, the model's is 32"):
        exit_lm(lens=lens(width=16))
    with caplog.at_level(logging.WARNING):
        lm = exit_lm(lens=lens_of_another_model(), force_lens=True)
    assert "Used all the same" in caplog.text
    requests = instances(task_pairs())
    assert lm.loglikelihood(requests) == exit_lm(lens=lens()).loglikelihood(requests)


@pytest.mark.parametrize(("scope", "warned"), [("context", True), ("request", False)])
def test_answers_that_begin_alike_are_warned_of(
    scope: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As behind a chat template, whose newline lm-eval gives to the answers."""
    lm = build(SpadeExitLM, lens="identity", readout="lens", threshold=9.0, exit_scope=scope)
    told = "begin with one token"
    apart = [(f"question {n}", f" {answer}") for n in range(3) for answer in "xy"]
    apart = [(context, answer.strip()) for context, answer in apart]
    with caplog.at_level(logging.WARNING):
        lm.loglikelihood(instances([*apart, ("one answer", "\nz")]))
        assert told not in caplog.text
        lm.loglikelihood(instances([(f"{context}\n", answer) for context, answer in apart]))
    assert (f"All answers of 3 of 3 contexts {told}" in caplog.text) == warned


@pytest.mark.parametrize("threshold", [0.2, 0.35, 0.5])
@pytest.mark.parametrize("packed", [True, False])
def test_the_choices_are_those_of_the_own_task(threshold: float, packed: bool) -> None:
    """As of TruthfulQA's two: the same questions with other answers, in one call of lm-eval."""
    contexts = [f"Q: what is {word}?\nA:" for word in ("red", "blue", "old", "cat", "seven")]
    one = instances([(c, x) for c in contexts for x in "ab"], task="one")
    two = instances([(c, x) for c in contexts for x in "cdef"], task="two")
    own = {"confidence": "choice_entropy", "logits_cache": packed}
    alone = [exit_lm(threshold, **own).loglikelihood(asked) for asked in (one, two)]
    lm = exit_lm(threshold, **own)
    together = lm.loglikelihood([*one, *two])
    assert 0 < lm.account.total.exits[4] < lm.account.total.exits.total()
    close(together, [*alone[0], *alone[1]])


def test_the_choices_are_those_of_the_own_document() -> None:
    """Two rows of one task may ask the same with other choices."""
    contexts = [f"Q: what is {word}?\nA:" for word in ("red", "blue", "old", "cat", "seven")]
    rows = [[(c, x) for x in choices] for c in contexts for choices in ("ab", "cdef")]
    asked = [
        Instance("loglikelihood", {}, pair, k, ("task", doc, 1))
        for doc, row in enumerate(rows)
        for k, pair in enumerate(row)
    ]
    own = {"confidence": "choice_entropy", "batch_size": 8}
    alone = [x for row in rows for x in exit_lm(0.35, **own).loglikelihood(instances(row))]
    lm = exit_lm(0.35, **own)
    together = lm.loglikelihood(asked)
    assert 0 < lm.account.total.exits[4] < lm.account.total.exits.total()
    close(together, alone)


def test_no_choices_are_warned_of_where_nothing_is_checked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    exit_lm(-1.0, confidence="choice_entropy").loglikelihood(instances([("one", "a")]))
    assert "nothing exits" in caplog.text
    assert "with one answer" not in caplog.text


def test_single_choices_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    lm = exit_lm(0.0, confidence="choice_entropy")
    lm.loglikelihood(instances([("one", "a"), ("two", "b"), ("three", "a"), ("three", "b")]))
    assert "with one answer" not in caplog.text
    lm.loglikelihood(instances([("one", "a"), ("two", "b"), ("three", "ba"), ("three", "bc")]))
    assert "4 of 4 requests have a context with one answer" in caplog.text


def test_thresholds_that_never_exit_warn_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        lm = exit_lm(-1)
        lm.loglikelihood(instances([("a", "b")]))
        lm.loglikelihood(instances([("a", "c")]))
    assert caplog.text.count("nothing exits, no check is made") == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        exit_lm(0)
    assert "nothing exits" not in caplog.text


def test_names_of_both_versions_of_the_paper() -> None:
    import lm_eval.models  # noqa: F401 - the registry fills on import
    from lm_eval.api.registry import get_model

    from spade_eval.plugin import register

    register()
    assert get_model("spade_exit") is get_model("simexit") is SpadeExitLM
    assert get_model("lens_exit") is LensExitLM


# ---------------------------------------------------------------- --use_cache


def test_a_cache_is_one_settings_own(tmp_path: Path) -> None:
    path = str(tmp_path / "answers.db")

    def answer(lm: Any) -> tuple[Any, Any]:
        cached = CachingLM(lm, path)
        try:
            return cached.loglikelihood(instances([("abc", "d"), ("abc", "ef")])), lm
        finally:
            cached.dbdict.close()

    first, lm = answer(exit_lm())
    assert lm.account.total.requests == 2
    again, lm = answer(exit_lm())
    assert again == first
    assert lm.account.total.requests == 0
    assert lm.account.total.exits == {}
    for other, differs in [
        (exit_lm(1.9), r"threshold was 4\.0, is 1\.9"),
        (exit_lm(exit_scope="token"), "exit_scope was 'context', is 'token'"),
        (exit_lm(readout="lens"), "readout was 'spade', is 'lens'"),
        (exit_lm(min_layer=2), "min_layer was 1, is 2"),
        (exit_lm(lens=lens()), "lens was 'identity', is 'given in Python'"),
    ]:
        with pytest.raises(UserError, match=f"answers of another configuration.*{differs}"):
            answer(other)
    assert answer(exit_lm())[0] == first


def test_a_cache_is_not_shared_by_tasks_that_give_a_context_other_choices(tmp_path: Path) -> None:
    """A key of the cache is a context and one answer; lm-eval asks for those it does not know."""
    path = str(tmp_path / "answers.db")
    first = instances([("abc", "d"), ("abc", "e"), ("xy", "z")])
    second = instances([("abc", "d"), ("abc", "f")], task="other")

    def answer(asked: list[Any]) -> list[Any]:
        cached = CachingLM(exit_lm(1.2, confidence="choice_entropy"), path)
        try:
            return cached.loglikelihood(asked)
        finally:
            cached.dbdict.close()

    found = answer(first)
    with pytest.raises(UserError, match=r"two tasks.*ask the same with other choices \('abc'\)"):
        answer(second)
    assert answer([*first, *instances([("new", "g"), ("new", "h")])])[:3] == found
    path = str(tmp_path / "b.db")
    with pytest.raises(UserError, match="ask the same with other choices"):
        answer([*first, *second])
    assert len(answer(second)) == 2  # what was refused has left nothing
    # At position 0 nothing is decided: every document may ask after an empty context.
    assert len(answer([*instances([("", "x")], task="a"), *instances([("", "y")], task="b")])) == 2


def test_a_killed_run_leaves_whole_contexts_in_the_cache(tmp_path: Path) -> None:
    """The entropy over choices needs them all, and lm-eval asks again for the missing ones only."""
    path = str(tmp_path / "answers.db")
    pairs = instances([("abc", "d"), ("abc", "efghi"), ("xy", "zab"), ("xy", "w")])
    whole = {"confidence": "choice_entropy", "logits_cache": False, "batch_size": 1}
    lm = exit_lm(1.2, **whole)
    lm.most_tokens_at_once = 0
    dies_at(lm, 4)
    cached = CachingLM(lm, path)
    with pytest.raises(KeyboardInterrupt):
        cached.loglikelihood(pairs)
    kept = sum(not str(key).startswith(KEY) for key in cached.dbdict)
    cached.dbdict.close()
    assert kept == 2
    resumed = exit_lm(1.2, **whole)
    cached = CachingLM(resumed, path)
    found = cached.loglikelihood(pairs)
    cached.dbdict.close()
    assert resumed.account.total.requests == 2
    expected = exit_lm(1.2, **whole).loglikelihood(pairs)
    torch.testing.assert_close([x for x, _ in found], [x for x, _ in expected], atol=1e-4, rtol=0)
