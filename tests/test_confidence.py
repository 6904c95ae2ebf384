"""Confidence measures against float64 references and naive loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats
from torch import Tensor

from spade_eval.confidence import CONFIDENCES, choice_entropy, entropy, max_prob, top2_margin
from spade_eval.exits import confident

VOCABULARY = ["entropy", "top2_margin", "max_prob"]

numbers = st.floats(-60, 60, width=32)
rows = st.lists(numbers, min_size=2, max_size=12)


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
