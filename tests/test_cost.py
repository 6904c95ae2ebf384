"""The account against what the layers and the head really saw, and against itself in parts."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from test_lm import build, text
from zoo import BYTES, byte_tokenizer, tiny

from spade_eval.backbone import Backbone
from spade_eval.batching import collate
from spade_eval.cost import Account, owners
from spade_eval.decisions import decide
from spade_eval.exits import ExitRule
from spade_eval.lens import LinearLens
from spade_eval.lenses import prices
from spade_eval.lm.exit import LensExitLM, SpadeExitLM
from spade_eval.lm.requests import source_of
from spade_eval.scoring import Layout, Request, Row, plan
from spade_eval.tally import Prices, Source, Tally

SCOPES = ["context", "token", "request"]
EVERY = {"lens": "identity", "interval": 1, "min_layer": 1}


pytestmark = pytest.mark.usefixtures("one_thread")


def instances(tasks: tuple[str, ...] = ("task",), seed: int = 0, start: str = "Q") -> list[Instance]:  # fmt: skip
    """Questions of several tasks in turn, four answers each; no two share a sequence."""
    rng = random.Random(seed)
    found = []
    for doc in range(12):
        question = f"{start}{doc} {text(rng, rng.randint(1, 4))}\nA:"
        for idx, letter in enumerate("abcd"):
            answer = f" {letter}{text(rng, 1)}"[: 1 + doc % 6]
            answer = answer if len(answer) > 1 else letter
            found.append(
                Instance("loglikelihood", {}, (question, answer), idx, (tasks[doc % len(tasks)], doc, 1))
            )  # fmt: skip
    return found


def account(requests: list[Instance], cls: Any = SpadeExitLM, **kwargs: Any) -> Account:
    lm = build(cls, **(EVERY | {"threshold": 4.0} | kwargs))
    lm.loglikelihood(requests)
    return lm.account


def sums(tally: Tally, but: tuple[str, ...] = ()) -> dict[str, Any]:
    return {k: v for k, v in vars(tally).items() if k not in but}


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a == {k: v if isinstance(v, Counter) else pytest.approx(v) for k, v in b.items()}


# ---------------------------------------------------------------- arithmetic


def test_a_batch_by_hand() -> None:
    """Two contexts of two tasks in one row; one exits at layer 2 of 4, the other not."""
    asked = [Request((3, 4), (5, 6)), Request((3, 4), (7,)), Request((8, 9, 10), (5,)), Request((11,), (3,))]  # fmt: skip
    rows = plan(asked, Layout(64, packed=True, crossover=400.0, batch_size=8)).rows
    batch = collate(rows)
    assert batch.tokens == 3 + 3 + 1
    source = Source(["x", "x", "y", "y"], np.ones(4, dtype=bool))
    price = Prices(4, head=0.5, check=0.25)
    who = decide(batch, "context")
    at = {int(batch.scored_positions[who.member_at[m]]): int(d) for m, d in enumerate(who.member_of)}  # fmt: skip
    layers = np.full(who.count, 4)
    of = {r: int(who.member_of[who.read_from[batch.requests == r][0]]) for r in range(4)}
    assert len({*of.values()}) == 3, at
    layers[of[0]] = 2
    checked = np.zeros(who.count, dtype=int)
    checked[of[0]], checked[of[2]] = 1, 2
    real = np.arange(batch.ids.shape[1]) < batch.lengths[:, None]
    passed = np.zeros_like(batch.ids)
    passed[real & np.isin(batch.ids, [3, 4, 5])] = 2
    passed[real & np.isin(batch.ids, [8, 9, 10])] = 4
    reads = layers[who.member_of[who.read_from]]
    total = Account()
    tails = batch.scored_positions > 0
    total.add(batch, source, price, passed, reads, tails, starts=2)
    total.add_exits(batch, source, price, who, layers, checked)
    x, y = total.tallies["x"], total.tallies["y"]
    assert (x.requests, x.requests_packed, x.requests_dense) == (2, 2, 0)
    assert (y.requests, y.requests_packed) == (2, 2)
    # x: 3 tokens through 2 layers; read at 4 (twice) and at 5, and both go on for 2 layers.
    assert (x.tokens, x.main_token_layers, x.positions_scored, x.tail_token_layers) == (3, 6, 2, 4)
    assert (x.head_token_layers, x.check_token_layers) == (2 * 0.5, 0.25)
    assert x.full_depth_token_layers == 3 * 4 + 2 * 0.5
    assert (x.exits, x.row_exits) == ({2: 1}, {2: 1})
    # y: 3 tokens all the way, read at 10; and a lone start token that no layer saw.
    assert (y.tokens, y.main_token_layers, y.positions_scored, y.tail_token_layers) == (4, 12, 2, 0)
    assert (y.first_positions, y.check_token_layers) == (1, 0.5)
    assert (y.exits, y.row_exits) == ({4: 1}, {4: 2})
    assert total.start_token_layers == 8
    report: Any = total.report()
    done = 6 + 12 + 4 + 0.75 + 4 * 0.5 + 8
    full = 7 * 4 + 4 * 0.5
    assert report["token_layer_ratio"] == pytest.approx(done / full, abs=1e-4)
    assert report["implied_speedup"] == pytest.approx(full / done, abs=1e-3)
    assert report["mean_exit_layer"] == 3
    assert report["mean_row_exit_layer"] == pytest.approx((2 + 4 + 4) / 3, abs=0.01)
    assert report["tasks"]["x"]["exits"] == {"2": 1}


def test_positions_that_requests_share_are_charged_once_for_checks_and_not_again_for_heads() -> None:  # fmt: skip
    """Three answers of one context: two of one token, and one that reads on behind the first."""
    asked = [Request((3, 4), (5,)), Request((3, 4), (6,)), Request((3, 4), (7, 8)), Request((3, 4), (7, 8))]  # fmt: skip
    batch = collate(plan(asked, Layout(64, packed=True, crossover=400.0, batch_size=8)).rows)
    who = decide(batch, "request")
    assert (who.count, len(batch.scored)) == (4, 2)
    # The first exits at layer 1 of 4, the second at layer 3, the others not; the last is a copy.
    layers = np.full(4, 4)
    times = {0: 1, 1: 3, 2: 3, 3: 3}
    checked = np.zeros(4, dtype=int)
    for decision, request in enumerate(who.requests.tolist()):
        layers[decision] = {0: 1, 1: 3}.get(request, 4)
        checked[decision] = times[request] * len(asked[request].continuation)
    source = Source(["x", "y", "y", "y"], np.array([True, True, True, False]))
    reads = layers[who.member_of][who.read_from]
    for answers, heads in ((False, {"x": 1, "y": 3}), (True, {"x": 0, "y": 2})):
        price = Prices(4, head=0.5, check=0.25, check_answers=answers)
        total = Account()
        none = np.zeros(len(batch.scored), dtype=int)
        total.add(batch, source, price, np.zeros_like(batch.ids), reads, none, starts=0)
        total.add_exits(batch, source, price, who, layers, checked)
        # The context's last token was measured at three layers, the token behind it too.
        assert total.total.check_token_layers == 6 * 0.25
        assert {task: t.head_token_layers for task, t in total.tallies.items()} == {
            task: n * 0.5 for task, n in heads.items()
        }


def test_each_token_is_charged_to_the_first_that_reads_behind_it() -> None:
    """Requests of two tasks begin alike: only what they share is the first one's."""
    asked = [Request((1, 2, 3, 4), (5, 6)), Request((1, 2, 7, 8, 9), (5, 6)), Request((1, 2), (3,))]
    (row,) = plan(asked, Layout(64, packed=True, crossover=1e9, batch_size=9)).rows
    batch = collate([row, Row()])
    assert batch.ids.tolist() == [[1, 2, 3, 4, 5, 7, 8, 9, 5], [0] * 9]
    assert owners(batch).tolist() == [[2, 2, 0, 0, 0, 1, 1, 1, 1], [-1] * 9]
    dense = plan(asked, Layout(64)).rows
    assert [owners(collate([row]))[0].tolist() for row in dense] == [[1] * 6, [0] * 5, [2] * 2]


@pytest.mark.parametrize(
    ("confidence", "narrows", "readout", "check", "answers"),
    [
        ("entropy", True, "spade", 5.0, False),
        ("entropy", True, "lens", 5.0, True),
        ("entropy", False, "lens", 5.0, True),
        ("choice_entropy", True, "spade", 0.0, False),
        ("choice_entropy", True, "lens", 0.0, False),
        ("choice_entropy", False, "lens", 5.0, False),
    ],
)
def test_a_check_costs_the_head_that_is_computed(
    confidence: str, narrows: bool, readout: str, check: float, answers: bool
) -> None:
    backbone = Backbone(tiny("llama"))
    assert backbone.narrows
    backbone.narrows = narrows
    n_layers, width = backbone.n_layers, backbone.width
    rule = ExitRule(1.0, confidence, readout=readout)
    assert prices(backbone, 5.0, None, rule) == Prices(n_layers, 5.0, check, answers)
    lens = LinearLens.identity(n_layers, width)  # stands for one of d x d weights
    map_ = 2 * width**2 / backbone.operations
    assert prices(backbone, 5.0, lens, rule) == Prices(n_layers, 5.0, check + map_, answers)


def test_repeats_count_and_a_ranks_copies_do_not() -> None:
    """lm-eval asks a task with `repeats` so many times, and pads a rank with its last request."""
    one, other = (Instance("loglikelihood", {}, ("a", "b"), 0, ("x", n, 3)) for n in range(2))
    counted = source_of([one] * 3 + [other] * 3 + [other] * 3).counted
    assert counted.tolist() == [True] * 6 + [False] * 3


def test_a_report_is_json_even_of_nothing() -> None:
    empty = json.loads(json.dumps(Account().report()))
    assert (empty["requests"], empty["token_layer_ratio"], empty["mean_exit_layer"]) == (0, None, None)  # fmt: skip
    report = account(instances(("x", "y"))).report()
    assert json.loads(json.dumps(report)) == report
    assert [*report["tasks"]] == ["x", "y"]  # type: ignore[misc]


# ---------------------------------------------------------------- against the modules


def run_and_watch(lm: Any, requests: list[Instance]) -> tuple[int, int, int]:
    """Tokens that all layers saw together, rows that the head saw, start tokens computed."""
    seen, heads, starts = [], [], lm.backbone.starts.computed
    head = lm.model.get_output_embeddings()
    watch = [(layer, seen) for layer in lm.backbone._layers] + [(head, heads)]
    handles = [
        module.register_forward_hook(
            lambda _m, _a, out, into=into: into.append(out.shape[0] * out.shape[1])
        )
        for module, into in watch
    ]
    lm.loglikelihood(requests)
    for handle in handles:
        handle.remove()
    return sum(seen), sum(heads), lm.backbone.starts.computed - starts


@pytest.mark.parametrize("cls", [SpadeExitLM, LensExitLM])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", ["llama", "qwen3_5"])
@pytest.mark.parametrize("threshold", [-1, 0, 4.0, 99])
def test_the_account_says_what_the_layers_and_the_head_saw(
    cls: Any, scope: str, family: str, threshold: float
) -> None:
    """One row at a time, so that there is no padding to tell apart."""
    lm = build(cls, family, threshold=threshold, exit_scope=scope, batch_size=1, **EVERY)
    requests = instances(("x", "y"))
    requests.append(Instance("loglikelihood", {}, ("", "abc"), 0, ("z", 0, 1)))
    seen, heads, starts = run_and_watch(lm, requests)
    total = lm.account.total
    assert lm.account.padding == 0
    assert lm.account.start_token_layers == 4 * starts
    assert seen == total.main_token_layers + total.tail_token_layers + 4 * starts
    checks = total.check_token_layers / lm.prices.check
    assert checks == pytest.approx(round(checks))
    answers = total.head_token_layers / lm.prices.head
    assert heads == round(answers) + round(checks)
    if cls is LensExitLM and threshold > 0:  # what exits at its check has its answer from there
        assert round(answers) < total.positions_scored
    elif scope == "request":  # requests may read the context's last token from several layers
        assert round(answers) >= total.positions_scored
    else:
        assert answers == pytest.approx(total.positions_scored)
    assert total.full_depth_token_layers == pytest.approx(
        4 * total.tokens + total.positions_scored * lm.prices.head
    )
    if threshold == -1:
        assert (checks, total.tail_token_layers, starts) == (0, 0, 0)
        assert total.main_token_layers == 4 * total.tokens
        assert lm.account.report()["token_layer_ratio"] == 1
    if threshold == 99:
        assert set(total.exits) == {1}
    if cls is LensExitLM:
        assert total.tail_token_layers == 0


def test_a_head_that_is_computed_whole_for_a_few_choices_is_charged() -> None:
    model = copy.deepcopy(tiny("llama", vocab_size=BYTES, max_position_embeddings=256))
    model.lm_head._hf_hook = None  # as accelerate leaves its own there
    kwargs: dict[str, Any] = {"tokenizer": byte_tokenizer(), "batch_size": 1, "max_length": 60}
    lm = SpadeExitLM(model, 0.5, confidence="choice_entropy", **EVERY, **kwargs)
    requests = instances(("x", "y"))
    _, heads, _ = run_and_watch(lm, requests)
    total = lm.account.total
    checks = round(total.check_token_layers / lm.prices.head)
    assert heads == round(total.head_token_layers / lm.prices.head) + checks
    assert checks >= 12


def test_a_position_read_for_two_contexts_is_accounted_as_computed() -> None:
    """(Q:, " ab") and (Q: a, "b"): both read behind "a", from two decisions and maybe two layers."""
    for scope in SCOPES:
        lm = build(SpadeExitLM, threshold=4.0, exit_scope=scope, batch_size=1, **EVERY)
        pairs = [("Q: the cat", "xyz"), ("Q: the catx", "yz"), ("Q: the catxy", "zz")]
        requests = [Instance("loglikelihood", {}, p, 0, ("t", i, 1)) for i, p in enumerate(pairs)]
        seen, heads, starts = run_and_watch(lm, requests)
        total = lm.account.total
        assert seen == total.main_token_layers + total.tail_token_layers + 4 * starts, scope
        checks = round(total.check_token_layers / lm.prices.check)
        assert heads == round(total.head_token_layers / lm.prices.head) + checks, scope
        # The plan at full depth reads a position once, whatever the decisions are.
        assert total.full_depth_token_layers == pytest.approx(4 * total.tokens + 4 * lm.prices.head)


# ---------------------------------------------------------------- tasks, copies, processes


@pytest.mark.parametrize("scope", SCOPES)
def test_tasks_add_up_to_what_one_task_costs(scope: str) -> None:
    split = account(instances(("x", "y", "z")), exit_scope=scope)
    whole = account(instances(), exit_scope=scope)
    assert {*split.tallies} == {"x", "y", "z"}
    same(sums(split.total), sums(whole.total))
    for name in ("padding", "tokens_hf", "truncated_requests"):
        assert getattr(split, name) == getattr(whole, name)
    assert [split.tallies[t].requests for t in "xyz"] == [16, 16, 16]


@pytest.mark.parametrize("packed", [True, False])
def test_a_tasks_sums_are_those_of_the_task_alone(packed: bool) -> None:
    """Contexts differ at their first characters, so tasks share no token."""
    both = [*instances(("x",), 0, "P"), *instances(("y",), 1, "Q")]
    together = account(both, logits_cache=packed)
    for task, alone in (("x", both[:48]), ("y", both[48:])):
        # What a lane keeps for its neighbours' sake depends on them.
        but = ("main_token_layers",)
        same(sums(together.tallies[task], but), sums(account(alone, logits_cache=packed).total, but))  # fmt: skip


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("packed", [True, False])
def test_copies_that_keep_ranks_in_step_do_not_count(scope: str, packed: bool) -> None:
    requests = instances(("x", "y"))
    kwargs = {"exit_scope": scope, "logits_cache": packed}
    once, padded = (account(r, **kwargs) for r in (requests, [*requests, *requests[-1:] * 3]))
    same(sums(padded.total), sums(once.total))


@pytest.mark.parametrize("scope", SCOPES)
def test_two_halves_merge_to_the_whole(scope: str) -> None:
    """As two ranks do it; each in rows of its own, which do not depend on the sharing."""
    requests = instances(("x", "y"))
    kwargs = {"exit_scope": scope, "logits_cache": False, "batch_size": 1}
    whole = account(requests, **kwargs)
    # Of whole documents: answers of one context decide together in context scope all the same.
    parts = [account([r for r in requests if r.doc_id % 2 == n], **kwargs) for n in (0, 1)]
    merged = Account(seconds=1.0)
    seconds = max(part.seconds for part in parts)
    merged.merge(parts)
    same(sums(merged.total), sums(whole.total))
    assert {*merged.tallies} == {"x", "y"}
    for task in "xy":
        same(sums(merged.tallies[task]), sums(whole.tallies[task]))
    for name in ("padding", "tokens_hf", "truncated_requests"):
        assert getattr(merged, name) == getattr(whole, name)
    assert merged.seconds == pytest.approx(1.0 + seconds)
    assert parts[0].total.requests == 24, "merging leaves the parts as they are"


def test_an_account_goes_on_over_calls() -> None:
    lm = build(SpadeExitLM, threshold=4.0, **EVERY)
    lm.loglikelihood(instances(("x",)))
    first = sums(lm.account.total)
    lm.loglikelihood(instances(("y",)))
    same(sums(lm.account.tallies["y"]), first)
    assert lm.account.total.requests == 96
