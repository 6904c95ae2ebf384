"""Is the difference between two runs more than chance? Tests, intervals, and Holm's correction.

Runs over the same documents are compared document by document, which is far sharper than comparing
two averages: most documents are answered alike, and only the others count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from spade_eval.report.extra import needs_report_extra

with needs_report_extra():
    from scipy import stats
    from statsmodels.stats.contingency_tables import mcnemar
    from statsmodels.stats.multitest import multipletests

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Values = NDArray[np.float64]

_BOOTSTRAP, _PERMUTATIONS = 1999, 9999
_BATCH = 250  # resamples held in memory at once
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """What changed from run a to run b.

    Attributes:
        a: Value of run a.
        b: Value of run b.
        low: Lower end of the 95 % interval of b - a; NaN if there is none.
        high: Its upper end.
        p: Two-sided, of "no difference"; NaN if nothing could be tested.
        test: "McNemar", "permutation", "z", or "none".
        n: Documents that were paired; None where averages were compared.
    """

    a: float
    b: float
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan
    test: str = "none"
    n: int | None = None


def paired(
    a: Values, b: Values, aggregate: Callable[[Values], Values], seed: int = 0
) -> Difference:
    """Compare two runs document by document.

    Outcomes that are 0 or 1 take McNemar's exact test (McNemar 1947), others a permutation test
    that swaps the runs of each document (Fisher's sign flips); the interval is a percentile
    bootstrap over documents (Efron 1979).

    Args:
        a: Outcomes of run a, (N,), or (N, 2) for log-likelihoods with their weights (nats, counts).
        b: Those of run b, for the same documents in the same order.
        aggregate: One of `AGGREGATIONS`.
        seed: Of the resamples.
    """
    n = len(a)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):  # a probability of 0
        with np.errstate(all="ignore"):
            return Difference(float(aggregate(a)), float(aggregate(b)))
    low, high = _bootstrap(a, b, aggregate, seed)
    binary = a.ndim == 1 and np.isin(np.stack([a, b]), (0.0, 1.0)).all()
    p = _mcnemar(a, b) if binary else _permutation(_gain(a, b), seed)
    test = "McNemar" if binary else "permutation"
    return Difference(float(aggregate(a)), float(aggregate(b)), low, high, p, test, n)


def unpaired(a: float, b: float, stderr_a: float | None, stderr_b: float | None) -> Difference:
    """Compare two averages by their standard errors, as if their documents were independent.

    For runs over the same documents that is cautious: a real difference may go unseen. Where both
    errors are 0, as of a few documents that are all right, they say nothing about a difference.

    Args:
        a: Value of run a.
        b: Value of run b.
        stderr_a: Its standard error; None if unknown.
        stderr_b: That of b.
    """
    if stderr_a is None or stderr_b is None or not math.isfinite(a) or not math.isfinite(b):
        return Difference(a, b)
    stderr = math.hypot(stderr_a, stderr_b)
    if stderr == 0 and a != b:
        return Difference(a, b)
    half = float(stats.norm.ppf((1 + _CONFIDENCE) / 2)) * stderr
    p = float(2 * stats.norm.sf(abs(b - a) / stderr)) if stderr > 0 else 1.0
    return Difference(a, b, b - a - half, b - a + half, p, "z")


def least_p(found: Difference) -> float:
    """The smallest p value that a paired test can have: all differences have one sign.

    0 where averages were compared.
    """
    if found.n is None:
        return 0.0
    drawn = 2 / (_PERMUTATIONS + 1) if found.test == "permutation" else 0.0
    return float(max(2.0 ** (1 - found.n), drawn))


def holm(p: Sequence[float]) -> list[float]:
    """Correct p values for their number (Holm 1979); NaN, nothing tested, stays and is not counted.

    Args:
        p: One per test.

    Returns:
        Corrected p values: below alpha with a chance of at most alpha if nothing differs anywhere.
    """
    values = np.array(p, dtype=float)
    tested = ~np.isnan(values)
    if tested.any():
        values[tested] = multipletests(values[tested], method="holm")[1]
    return values.tolist()


def aggregation_of(outcomes: Values, value: float) -> Callable[[Values], Values] | None:
    """The aggregation that makes the reported value of the outcomes; None if none of ours does.

    Args:
        outcomes: (N,) or (N, 2).
        value: What lm-eval reported for them.
    """
    for aggregate in AGGREGATIONS[outcomes.ndim]:
        with np.errstate(all="ignore"):
            if np.isclose(aggregate(outcomes), value, rtol=1e-6, atol=1e-9):
                return aggregate
    return None


def _mean(outcomes: Values) -> Values:
    """(..., N) -> (...)."""
    return outcomes.mean(-1)


def _perplexity(outcomes: Values) -> Values:
    """Log-likelihoods (..., N) -> (...)."""
    return np.exp(-outcomes.mean(-1))


def _weighted_perplexity(outcomes: Values) -> Values:
    """Log-likelihoods and weights (..., N, 2) -> (...)."""
    total = outcomes.sum(-2)
    return np.exp(-total[..., 0] / total[..., 1])


def _bits_per_unit(outcomes: Values) -> Values:
    """Log-likelihoods in nats and weights (..., N, 2) -> bits (...)."""
    total = outcomes.sum(-2)
    return -total[..., 0] / total[..., 1] / math.log(2)


AGGREGATIONS: dict[int, tuple[Callable[[Values], Values], ...]] = {
    1: (_mean, _perplexity),
    2: (_weighted_perplexity, _bits_per_unit),
}
"""How lm-eval makes one number of the documents' outcomes, by the number of their axes."""


def _gain(a: Values, b: Values) -> Values:
    """Each document's difference, (N,): of the outcome, or of the log-likelihood."""
    return b - a if a.ndim == 1 else b[:, 0] - a[:, 0]


def _mcnemar(a: Values, b: Values) -> float:
    table = [[np.sum((a == x) & (b == y)) for y in (1, 0)] for x in (1, 0)]
    return float(mcnemar(table, exact=True).pvalue)


def _permutation(gain: Values, seed: int) -> float:
    if len(gain) < 2 or not gain.any():
        return 1.0
    found = stats.permutation_test(
        (gain,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=_PERMUTATIONS,
        batch=_BATCH,
        rng=seed,
    )
    return float(found.pvalue)


def _bootstrap(
    a: Values, b: Values, aggregate: Callable[[Values], Values], seed: int
) -> tuple[float, float]:
    """The 95 % interval of b - a."""
    if len(a) < 2:  # nothing to resample
        return math.nan, math.nan

    def difference(at: NDArray[np.int64], axis: int) -> Values:  # (..., N), its last axis
        return aggregate(b[at]) - aggregate(a[at])

    found = stats.bootstrap(
        (np.arange(len(a)),),
        difference,
        vectorized=True,
        method="percentile",
        confidence_level=_CONFIDENCE,
        n_resamples=_BOOTSTRAP,
        batch=_BATCH,
        rng=seed,
    ).confidence_interval
    return float(found.low), float(found.high)
