"""Tests, intervals and Holm's correction against cases worked out by hand or by other means."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spade_eval.report.stats import AGGREGATIONS, aggregation_of, holm, paired, unpaired

MEAN, LONE_PERPLEXITY = AGGREGATIONS[1]
PERPLEXITY, BITS = AGGREGATIONS[2]


def outcomes(both: int, only_a: int, only_b: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Right and wrong answers of two runs, by how many documents each got right."""
    a = [1.0] * (both + only_a) + [0.0] * (only_b + neither)
    b = [1.0] * both + [0.0] * only_a + [1.0] * only_b + [0.0] * neither
    return np.array(a), np.array(b)


@pytest.mark.parametrize(
    ("table", "p"),
    [
        # Two-sided binomial tails of the documents that only one run got right.
        ((10, 5, 0, 3), 2 * 0.5**5),
        ((10, 1, 9, 3), 2 * (1 + 10) * 0.5**10),
        ((0, 3, 3, 0), 1.0),
        ((7, 0, 0, 7), 1.0),
        ((0, 2, 8, 90), 2 * (1 + 10 + 45) * 0.5**10),
    ],
)
def test_mcnemar(table: tuple[int, int, int, int], p: float) -> None:
    a, b = outcomes(*table)
    found = paired(a, b, MEAN)
    assert (found.test, found.n) == ("McNemar", sum(table))
    assert found.p == pytest.approx(p)
    assert (found.a, found.b) == pytest.approx((a.mean(), b.mean()))


def test_the_interval_of_paired_runs_is_that_of_their_differences() -> None:
    a, b = outcomes(60, 20, 5, 115)
    found = paired(a, b, MEAN)
    stderr = (b - a).std() / math.sqrt(len(a))
    assert found.low == pytest.approx(-15 / 200 - 1.96 * stderr, abs=0.006)
    assert found.high == pytest.approx(-15 / 200 + 1.96 * stderr, abs=0.006)
    assert stderr < 0.6 * math.hypot(a.std(), b.std()) / math.sqrt(len(a))  # why one pairs


def test_other_outcomes_take_a_permutation_test() -> None:
    a, b = np.array([0.1, 0.5, 0.25, 0.9, 0.3]), np.array([0.2, 0.75, 0.3, 1.0, 0.2])
    found = paired(a, b, MEAN)
    gains = b - a
    sums = [abs(np.dot(gains, signs)) for signs in itertools.product((1, -1), repeat=5)]
    assert found.test == "permutation"
    assert found.p == pytest.approx(np.mean(np.array(sums) >= abs(gains.sum()) - 1e-12))


def test_perplexity_weighs_documents_by_their_words() -> None:
    words = np.array([10.0, 30.0, 20.0, 5.0])
    a = np.stack([-words * np.array([2.0, 3.0, 2.5, 4.0]), words], axis=1)
    b = a - np.array([[1.0, 0.0]])  # each document is a nat less likely
    found = paired(a, b, PERPLEXITY)
    assert found.a == pytest.approx(math.exp(-a[:, 0].sum() / 65))
    assert found.b == pytest.approx(found.a * math.exp(4 / 65))
    assert found.test == "permutation"
    assert found.p == pytest.approx(2 * 0.5**4)
    assert 0 < found.low <= found.b - found.a <= found.high
    bits = paired(a, b, BITS)
    assert bits.a == pytest.approx(math.log2(found.a))
    assert bits.p == found.p


def test_equal_runs_differ_by_nothing() -> None:
    for a in (np.array([0.0, 1.0, 1.0]), np.array([0.3, 0.2])):
        found = paired(a, a, MEAN)
        assert (found.low, found.high, found.p) == (0.0, 0.0, 1.0)


def test_one_document_has_no_interval() -> None:
    found = paired(np.array([1.0]), np.array([0.0]), MEAN)
    assert math.isnan(found.low)
    assert found.p == 1.0


def test_unpaired() -> None:
    found = unpaired(0.60, 0.50, 0.03, 0.04)
    assert found.test == "z"
    assert found.p == pytest.approx(0.0455, abs=1e-4)  # two standard errors
    assert (found.low, found.high) == pytest.approx((-0.198, -0.002), abs=1e-3)
    assert math.isnan(unpaired(0.6, 0.5, None, 0.04).p)
    assert math.isnan(unpaired(0.6, math.nan, 0.03, 0.04).p)
    assert unpaired(1.0, 1.0, 0.0, 0.0).p == 1.0
    assert math.isnan(unpaired(1.0, 0.0, 0.0, 0.0).p)  # of 3 documents or of 3,000, nobody knows


def test_holm() -> None:
    # Sorted: 0.01 * 4, 0.02 * 3, 0.03 * 2, 0.5 * 1, and never less than the one before.
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    found = holm([math.nan, 0.02, math.nan])  # what was not tested costs nothing
    assert found[1] == pytest.approx(0.02)
    assert math.isnan(found[0])
    assert math.isnan(found[2])
    assert holm([]) == []


def test_the_aggregation_is_the_one_that_gives_the_reported_value() -> None:
    pairs = np.array([[-20.0, 10.0], [-30.0, 5.0]])
    assert aggregation_of(np.array([0.0, 1.0, 1.0]), 2 / 3) is MEAN
    assert aggregation_of(pairs, math.exp(50 / 15)) is PERPLEXITY
    # LAMBADA's, of log-likelihoods without weights.
    assert aggregation_of(np.array([-1.0, -2.5]), math.exp(3.5 / 2)) is LONE_PERPLEXITY
    assert aggregation_of(pairs, 50 / 15 / math.log(2)) is BITS
    assert aggregation_of(np.array([0.0, 1.0, 1.0]), 0.8) is None  # F1, say
    assert aggregation_of(np.array([0.0, math.nan]), 0.0) is None


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60), st.randoms())
@settings(max_examples=40)
def test_order_and_sides_do_not_matter(answers: list[tuple[bool, bool]], random: object) -> None:
    a, b = np.array(answers, dtype=float).T
    found, back = paired(a, b, MEAN), paired(b, a, MEAN)
    assert found.p == back.p
    order = list(range(len(a)))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = paired(a[order], b[order], MEAN)
    assert shuffled.p == found.p
    assert shuffled.b - shuffled.a == pytest.approx(found.b - found.a)


@pytest.mark.usefixtures("little_garbage")
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(max_examples=25)
def test_holm_only_raises_and_keeps_the_order(p: list[float]) -> None:
    found = np.array(holm(p))
    assert (found >= np.array(p)).all()
    assert (found <= 1).all()
    order = np.argsort(p, kind="stable")
    assert (np.diff(found[order]) >= 0).all()
