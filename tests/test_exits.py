"""The exit rule, the candidates, the settings."""

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

from spade_eval import exits
from spade_eval.confidence import CONFIDENCES, choice_entropy
from spade_eval.errors import UserError
from spade_eval.exits import ExitRule, candidates, confident, never

LOW = ["entropy", "choice_entropy"]

thresholds = st.floats(-1, 3, width=32)


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
            {"exit_scope": "tokens"},
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
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) * 4
    exists = torch.arange(4) < torch.tensor([[1], [2], [3], [4], [2], [1]])
    if name == "choice_entropy":
        values = rule.measure(logits, exists)
        assert torch.equal(values, choice_entropy(logits, exists))
    else:
        values = rule.measure(logits)
        assert torch.equal(values, CONFIDENCES[name].measure(logits))
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
    rule = ExitRule(
        threshold, "max_prob", interval=3, min_layer=6, exit_scope="token", readout="lens"
    )
    settings = json.loads(json.dumps(rule.describe(), allow_nan=False))
    assert ExitRule(exit_scope=settings.pop("exit_scope"), **settings) == rule
