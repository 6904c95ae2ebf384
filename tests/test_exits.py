"""Confidence measures against float64 references and naive loops, the exit rule, the candidates."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import special, stats
from torch import Tensor

from spade_eval import exits
from spade_eval.confidence import CONFIDENCES, choice_entropy, entropy, max_prob, top2_margin
from spade_eval.errors import UserError
from spade_eval.exits import ExitRule, candidates, confident, never

VOCABULARY = ["entropy", "top2_margin", "max_prob"]
LOW = ["entropy", "choice_entropy"]
HIGH = ["top2_margin", "max_prob"]

numbers = st.floats(-60, 60, width=32)
rows = st.lists(numbers, min_size=2, max_size=12)
thresholds = st.floats(-1, 3, width=32)


def reference(name: str, row: Tensor) -> float:
    """One row at a time in float64."""
    p = special.softmax(row.double().numpy())
    if name == "entropy":
        return float(stats.entropy(p))
    top = np.sort(p)
    return float(top[-1] - top[-2] if name == "top2_margin" else top[-1])


def expected(name: str, logits: Tensor) -> Tensor:
    return torch.tensor([reference(name, row) for row in logits], dtype=torch.float32)


def random_logits(p: int, v: int, scale: float = 4.0) -> Tensor:
    return torch.randn(p, v, generator=torch.Generator().manual_seed(p * v)) * scale


# ------------------------------------------------------------------ the measures


# The last two are more than one block of rows, with a remainder, and rows longer than a block.
@pytest.mark.parametrize("shape", [(1, 2), (7, 5), (50, 30_000), (3, 1_100_000)])
@pytest.mark.parametrize("name", VOCABULARY)
def test_measures_agree_with_float64(name: str, shape: tuple[int, int]) -> None:
    logits = random_logits(*shape)
    before = logits.clone()
    values = CONFIDENCES[name].measure(logits)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, expected(name, logits), atol=2e-6, rtol=2e-6)
    assert torch.equal(logits, before)  # the caller's logits are not overwritten


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", VOCABULARY)
def test_any_dtype_is_computed_in_fp32(name: str, dtype: torch.dtype) -> None:
    logits = random_logits(9, 4000).to(dtype)
    values = CONFIDENCES[name].measure(logits)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, expected(name, logits), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("name", VOCABULARY)
def test_minus_infinity_is_a_token_that_is_not_there(name: str) -> None:
    logits = random_logits(5, 8)
    holes = torch.full((5, 3), -torch.inf)
    values = CONFIDENCES[name].measure(torch.cat([holes, logits, holes], -1))
    torch.testing.assert_close(values, CONFIDENCES[name].measure(logits))


@pytest.mark.parametrize(("name", "certain"), [("entropy", 0), ("top2_margin", 1), ("max_prob", 1)])
def test_a_single_finite_logit_is_certain(name: str, certain: float) -> None:
    logits = torch.full((1, 6), -torch.inf)
    logits[0, 4] = -3.0
    assert CONFIDENCES[name].measure(logits).tolist() == [certain]


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("name", VOCABULARY)
def test_huge_logits_do_not_cancel(name: str, offset: float) -> None:
    logits = (random_logits(6, 1000) * 64).round() / 64  # exact in fp32 beside the offset
    values = CONFIDENCES[name].measure(logits + offset)
    torch.testing.assert_close(values, expected(name, logits), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("name", VOCABULARY)
def test_the_largest_numbers_of_the_type_do_not_overflow(name: str) -> None:
    most = torch.finfo(torch.float32).max
    values = CONFIDENCES[name].measure(torch.tensor([[most, -most, most], [most, -most, 0.0]]))
    certain = expected(name, torch.tensor([[0.0, -1e4, 0.0], [0.0, -1e4, -1e4]]))
    torch.testing.assert_close(values, certain)


def test_small_entropies_keep_their_digits() -> None:
    # ln n - mean(z) over logits that are not shifted loses them all beside an offset of 20.
    logits = torch.tensor([[20.0, 0.0], [30.0, 10.0], [-20.0, 0.0]])
    values = entropy(logits).double()
    exact = math.log1p(math.exp(-20)) + 20 * math.exp(-20) / (1 + math.exp(-20))
    torch.testing.assert_close(values, torch.full((3,), exact).double(), atol=0, rtol=0.06)


@pytest.mark.parametrize("v", [2, 17, 49_152])
def test_uniform_and_tied_rows(v: int) -> None:
    logits = torch.full((3, v), 2.5)
    torch.testing.assert_close(entropy(logits), torch.full((3,), math.log(v)))
    torch.testing.assert_close(max_prob(logits), torch.full((3,), 1 / v))
    assert top2_margin(logits).tolist() == [0, 0, 0]


@given(row=rows, shift=st.integers(-100, 100), data=st.data())
def test_measures_ignore_shift_and_order_and_stay_in_range(
    row: list[float], shift: int, data: st.DataObject
) -> None:
    logits = torch.tensor([row]).mul(64).round().div(64)  # shifting them is exact
    other = torch.tensor([data.draw(st.permutations(logits[0].tolist()))]) + shift
    for name in VOCABULARY:
        measure = CONFIDENCES[name].measure
        torch.testing.assert_close(measure(other), measure(logits), atol=1e-6, rtol=1e-5)
        bound = math.log(len(row)) if name == "entropy" else CONFIDENCES[name].most
        assert 0 <= measure(logits).item() <= bound + 1e-6


@pytest.mark.parametrize("name", VOCABULARY)
def test_a_position_does_not_depend_on_its_neighbours(name: str) -> None:
    logits = random_logits(25, 50_000)
    measure = CONFIDENCES[name].measure
    alone = torch.cat([measure(row[None]) for row in logits])
    torch.testing.assert_close(measure(logits), alone, atol=2e-6, rtol=2e-6)
    assert measure(logits[:0]).shape == (0,)


@pytest.mark.parametrize("name", VOCABULARY)
def test_a_broken_position_never_exits_and_leaves_the_others_alone(name: str) -> None:
    logits = random_logits(3, 10)
    broken = logits.clone()
    broken[1, 4] = torch.nan
    values = CONFIDENCES[name].measure(broken)
    torch.testing.assert_close(values[[0, 2]], CONFIDENCES[name].measure(logits)[[0, 2]])
    everything = math.inf if CONFIDENCES[name].low else -math.inf
    assert confident(values, everything, name).tolist() == [True, False, True]


@given(data=st.data(), logits=st.lists(numbers, min_size=5, max_size=5))
def test_choice_entropy_sees_only_the_choices_that_exist(
    data: st.DataObject, logits: list[float]
) -> None:
    exists = data.draw(st.lists(st.booleans(), min_size=5, max_size=5).filter(any))
    values = choice_entropy(torch.tensor([logits, logits]), torch.tensor([exists, [True] * 5]))
    for value, mask in zip(values, (exists, [True] * 5), strict=True):
        kept = torch.tensor([z for z, there in zip(logits, mask, strict=True) if there])
        probabilities = special.softmax(kept.double().numpy())
        assert value.item() == pytest.approx(stats.entropy(probabilities), abs=2e-6, rel=1e-5)


def test_choice_entropy_of_one_choice_is_0_and_of_none_is_not_confident() -> None:
    exists = torch.tensor([[False, True, False], [False, False, False]])
    values = choice_entropy(torch.tensor([[9.0, -4.0, 1.0]] * 2), exists)
    assert values[0] == 0
    assert confident(values, math.inf, "choice_entropy").tolist() == [True, False]


# ------------------------------------------------------------------ the rule


@pytest.mark.parametrize("name", CONFIDENCES)
def test_a_value_equal_to_the_threshold_exits(name: str) -> None:
    values = torch.tensor([0.25, 0.5, 0.75])
    found = confident(values, 0.5, name).tolist()
    assert found == ([True, True, False] if name in LOW else [False, True, True])


@pytest.mark.parametrize("name", CONFIDENCES)
@given(values=st.lists(st.floats(0, 1, width=32), min_size=1), a=thresholds, b=thresholds)
def test_exits_only_grow_as_the_threshold_is_relaxed(
    name: str, values: list[float], a: float, b: float
) -> None:
    strict, lax = (min(a, b), max(a, b)) if name in LOW else (max(a, b), min(a, b))
    measured = torch.tensor(values)
    assert (confident(measured, strict, name) <= confident(measured, lax, name)).all()
    assert confident(measured, math.inf if name in LOW else -math.inf, name).all()


@pytest.mark.parametrize("name", CONFIDENCES)
@given(threshold=thresholds | st.sampled_from([math.inf, -math.inf]))
def test_never_is_exactly_the_thresholds_that_no_value_meets(name: str, threshold: float) -> None:
    most = 1e6 if name in LOW else 1.0
    ends = torch.tensor([0.0, most])
    assert never(name, threshold) == (not confident(ends, threshold, name).any())


@pytest.mark.parametrize("name", CONFIDENCES)
def test_nan_thresholds_are_refused(name: str) -> None:
    for ask in (
        lambda: never(name, math.nan),
        lambda: confident(torch.zeros(1), math.nan, name),
    ):
        with pytest.raises(UserError, match="nan"):
            ask()


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0, 9, width=32)), max_size=20))
def test_request_mean_agrees_with_a_loop(pairs: list[tuple[int, float]]) -> None:
    members = torch.tensor([m for m, _ in pairs], dtype=torch.long)
    means = exits.request_mean(torch.tensor([v for _, v in pairs]), members, 5)
    for request, mean in enumerate(means.tolist()):
        own = [value for member, value in pairs if member == request]
        if own:
            assert mean == pytest.approx(np.mean(own), abs=1e-5)
        else:
            assert math.isnan(mean)


# ------------------------------------------------------------------ the candidates


@pytest.mark.parametrize(
    ("arguments", "layers"),
    [
        ({"n_layers": 30}, (16, 18, 20, 22, 24, 26, 28)),
        ({"n_layers": 7}, (4, 6)),  # ceil(7 / 2) = 4
        ({"n_layers": 7, "interval": 1}, (4, 5, 6)),
        ({"n_layers": 5, "interval": 1}, (3, 4)),
        ({"n_layers": 2, "interval": 1}, (1,)),
        ({"n_layers": 6, "interval": 1, "min_layer": 0}, (1, 2, 3, 4, 5)),
        ({"n_layers": 12, "interval": 4, "min_layer": 0}, (4, 8)),
        ({"n_layers": 12, "interval": 4, "min_layer": 4}, (4, 8)),
        ({"n_layers": 12, "interval": 4, "min_layer": 5}, (8,)),
        ({"n_layers": 12, "interval": 11}, (11,)),
        ({"n_layers": 12, "interval": 6.0, "min_layer": 6.0}, (6,)),
        ({"n_layers": 30, "maps": {29, 30, 24, 7, 20, 10, 0}}, (20, 24)),
        ({"n_layers": 30, "maps": [28, 4], "min_layer": 0}, (4, 28)),
        ({"n_layers": 30, "interval": 15, "maps": {15: "map"}.keys()}, (15,)),
    ],
)
def test_candidates(arguments: dict[str, Any], layers: tuple[int, ...]) -> None:
    assert candidates(**arguments) == layers


@given(
    n_layers=st.integers(2, 40),
    interval=st.integers(1, 40),
    min_layer=st.none() | st.integers(0, 40),
    maps=st.none() | st.sets(st.integers(0, 45)),
)
def test_candidates_are_those_of_a_naive_loop_and_never_empty(
    n_layers: int, interval: int, min_layer: int | None, maps: set[int] | None
) -> None:
    least = math.ceil(n_layers / 2) if min_layer is None else min_layer
    naive = []
    for layer in range(n_layers + 1):
        mapped = maps is None or layer in maps
        if mapped and layer >= least and layer % interval == 0 and 0 < layer < n_layers:
            naive.append(layer)
    if naive:
        assert candidates(n_layers, interval, min_layer, maps) == tuple(naive)
    else:
        with pytest.raises(UserError):
            candidates(n_layers, interval, min_layer, maps)


@given(n_layers=st.integers(2, 200), data=st.data())
def test_with_every_map_the_default_min_layer_fits_every_interval(
    n_layers: int, data: st.DataObject
) -> None:
    assert candidates(n_layers, data.draw(st.integers(1, n_layers - 1)))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"interval": 0}, ["interval=0", "from 1 up"]),
        ({"interval": -2}, ["interval=-2", "from 1 up"]),
        ({"interval": 2.5}, ["interval=2.5", "whole number"]),
        ({"interval": True}, ["interval=True", "whole number"]),
        ({"interval": "2"}, ["interval='2'", "whole number"]),
        ({"interval": math.inf}, ["interval=inf", "whole number"]),
        ({"interval": 31}, ["interval=31", "30 layers", "1 to 29"]),
        ({"interval": 30}, ["interval=30", "30 layers", "1 to 29"]),
        ({"min_layer": -1}, ["min_layer=-1", "from 0 up"]),
        ({"min_layer": 1.5}, ["min_layer=1.5", "whole number"]),
        ({"min_layer": 31}, ["min_layer=31", "30 layers", "0 to 28"]),
        ({"min_layer": 30}, ["min_layer=30", "last exit is at layer 28", "0 to 28"]),
        ({"min_layer": 29}, ["min_layer=29", "interval=2", "0 to 28"]),
        (
            {"interval": 5, "maps": {30, 12, 7}},
            ["maps: 7, 12, 30;", "interval=5,min_layer=15: 15, 20, 25.", "interval=1,min_layer=7"],
        ),
        ({"maps": ()}, ["maps: none;", "16, 18", "a lens with maps there."]),
        ({"maps": {0, 30}}, ["maps: 0, 30;", "a lens with maps there."]),
    ],
)
def test_errors_of_candidates(arguments: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        candidates(**{"n_layers": 30, **arguments})
    for part in parts:
        assert part in str(error.value)


def test_a_model_of_one_layer_has_no_exit() -> None:
    with pytest.raises(UserError, match="1 layer "):
        candidates(1, 1)


@given(n_layers=st.integers(2, 40), maps=st.sets(st.integers(0, 40), min_size=1))
def test_what_the_lens_error_advises_works(n_layers: int, maps: set[int]) -> None:
    try:
        candidates(n_layers, 1, n_layers - 1, maps)
    except UserError as error:
        assume("interval=1,min_layer=" in str(error).partition("Give")[2])
        advised = int(str(error).partition("Give")[2].split("min_layer=")[1].split()[0])
        usable = tuple(layer for layer in sorted(maps) if 0 < layer < n_layers)
        assert candidates(n_layers, 1, advised, maps) == usable


# ------------------------------------------------------------------ the settings


@pytest.mark.parametrize(
    ("given_threshold", "number"),
    [
        (1.2, 1.2),
        (2, 2.0),
        (-1, -1.0),
        (np.float32(0.5), 0.5),
        ("inf", math.inf),
        ("-inf", -math.inf),
        (math.inf, math.inf),
    ],
)
def test_thresholds_become_floats(given_threshold: Any, number: float) -> None:
    threshold = ExitRule(given_threshold).threshold
    assert type(threshold) is float
    assert threshold == number


def test_whole_floats_become_ints() -> None:
    rule = ExitRule(1.2, interval=2.0, min_layer=8.0)
    assert (type(rule.interval), type(rule.min_layer)) == (int, int)
    assert rule == ExitRule(1.2, interval=2, min_layer=8)
    with pytest.raises(FrozenInstanceError):
        rule.threshold = 1.3


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"threshold": None}, ["threshold is missing", "entropy in nats", "1.2"]),
        ({"threshold": None, "confidence": "max_prob"}, ["missing", "probability", "0.9"]),
        ({"threshold": math.nan}, ["threshold=nan"]),
        ({"threshold": "nan"}, ["threshold=nan"]),
        ({"threshold": True}, ["threshold=True is not a number"]),
        ({"threshold": "1.2"}, ["threshold='1.2' is not a number"]),
        ({"threshold": "low"}, ["threshold='low' is not a number", "entropy in nats"]),
        ({"threshold": [1.2]}, ["threshold=[1.2] is not a number"]),
        ({"threshold": 1 + 0j}, ["is not a number"]),
        (
            {"confidence": "entrpy"},
            ["confidence='entrpy'", *CONFIDENCES, "Did you mean 'entropy'?"],
        ),
        ({"confidence": None}, ["confidence=None", "max_prob"]),
        (
            {"scope": "tokens"},
            ["exit_scope='tokens'", "context, token, request", "Did you mean 'token'?"],
        ),
        ({"readout": "Spade"}, ["readout='Spade'", "spade, lens", "Did you mean 'spade'?"]),
        ({"interval": 0}, ["interval=0", "from 1 up"]),
        ({"interval": "two"}, ["interval='two'", "whole number"]),
        ({"interval": None}, ["interval=None", "whole number"]),
        ({"min_layer": -1}, ["min_layer=-1", "from 0 up"]),
        ({"min_layer": 7.5}, ["min_layer=7.5", "whole number"]),
    ],
)
def test_errors_of_the_settings(arguments: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        ExitRule(**{"threshold": 1.2, **arguments})
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("name", CONFIDENCES)
@pytest.mark.parametrize("threshold", [-math.inf, -1, 0, 0.5, 1, 1.5, math.inf])
def test_the_rule_is_the_functions_with_its_settings(name: str, threshold: float) -> None:
    rule = ExitRule(threshold, name, interval=3, min_layer=4)
    assert rule.never == (threshold < 0 if name in LOW else threshold > 1)
    logits = random_logits(6, 4)
    exists = torch.arange(4) < torch.tensor([[1], [2], [3], [4], [2], [1]])
    if name == "choice_entropy":
        values = rule.measure(logits, exists)
        assert torch.equal(values, choice_entropy(logits, exists))
    else:
        values = rule.measure(logits)
        assert torch.equal(values, getattr(exits, name)(logits))
    assert torch.equal(rule.confident(values), confident(values, threshold, name))
    assert rule.candidates(12) == (6, 9)
    assert rule.candidates(12, {3, 9, 12}) == (9,)


def test_defaults() -> None:
    rule = ExitRule(1.2)
    assert rule.describe() == {
        "threshold": 1.2,
        "confidence": "entropy",
        "interval": 2,
        "min_layer": None,
        "exit_scope": "context",
        "readout": "spade",
    }


@pytest.mark.parametrize("threshold", [0.7, math.inf, -math.inf])
def test_the_description_is_strict_json_and_makes_the_same_rule(threshold: float) -> None:
    rule = ExitRule(threshold, "max_prob", interval=3, min_layer=6, scope="token", readout="lens")
    settings = json.loads(json.dumps(rule.describe(), allow_nan=False))
    assert ExitRule(scope=settings.pop("exit_scope"), **settings) == rule
