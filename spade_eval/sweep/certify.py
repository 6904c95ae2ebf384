"""Learn then Test: the least cautious threshold whose risk is bounded with high probability.

Risk: the share of documents that the full model answers right and the exit run wrong. Thresholds
are tested from the most cautious one on, each by an exact binomial test of "the risk is above the
bound", and testing stops at the first that is not rejected; this fixed sequence needs no
correction for testing many (Angelopoulos et al., 2021, arXiv 2110.01052; for early exit Schuster et
al., 2022, "CALM", arXiv 2207.07061, section 4). The thresholds must be chosen before the documents
are seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from scipy.stats import binom

if TYPE_CHECKING:
    from collections.abc import Sequence


def p_values(harmed: Sequence[int], n: int, max_drop: float) -> list[float]:
    """Probability of as few harmed documents, or fewer, if the risk were `max_drop`.

    Args:
        harmed: Documents harmed at each threshold.
        n: Documents.
        max_drop: The bound, within (0, 1).
    """
    return binom.cdf(harmed, n, max_drop).tolist() if harmed else []


def certify(harmed: Sequence[int], n: int, max_drop: float, confidence: float) -> int | None:
    """Find the last threshold whose risk is certified to be at most `max_drop`.

    Args:
        harmed: Documents harmed at each threshold, the most cautious first.
        n: Documents.
        max_drop: The bound, within (0, 1).
        confidence: Probability that the risk of the threshold found is within the bound.

    Returns:
        Its index; None if not even the first one is certified.
    """
    found = None
    for index, p in enumerate(p_values(harmed, n, max_drop)):
        if p > 1 - confidence:
            break
        found = index
    return found


def least_drop(n: int, confidence: float) -> float:
    """The smallest bound that n documents can certify: that of no harmed document among them."""
    return 1 - (1 - confidence) ** (1 / n)
