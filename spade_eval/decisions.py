"""Who decides about an exit, and whose answers it concerns: the exit scopes, in arrays.

    scope     one decision per        its confidence is read at
    context   last context token      that token
    token     scored position         that position
    request   request                 all its positions, averaged

A position may answer for two decisions (a context that is another one's beginning), so answers are
given per member, a pair of a position and a decision. No model and no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from spade_eval.batching import Batch, Ints
    from spade_eval.exits import Scope


@dataclass(frozen=True)
class Decisions:
    """The decisions of a batch.

    Attributes:
        count: D.
        check_at: Scored position at which a confidence is measured, (K,); in request scope several
            decisions may look at the same one.
        check_of: Decision that it counts for, (K,).
        member_at: Scored position of each answer that is to be given, (M,).
        member_of: Decision that it follows, (M,).
        read_from: For each of the batch's N reads the member it reads, (N,).
        requests: For each decision one request that it concerns, (D,).
    """

    count: int
    check_at: Ints
    check_of: Ints
    member_at: Ints
    member_of: Ints
    read_from: Ints
    requests: Ints


def decide(batch: Batch, scope: Scope) -> Decisions:
    """Find the decisions of a batch.

    Position 0 is never checked: there is no pair [start, token] to go on with.
    """
    read_at, requests = batch.read_at, batch.requests
    if scope == "token":
        keys = read_at
    elif scope == "request":
        keys = requests
    else:
        # A request's reads lie on one path, and a path's tokens are in ascending order.
        order = np.lexsort((batch.scored[read_at], requests))
        _, first, of = np.unique(requests[order], return_index=True, return_inverse=True)
        keys = np.empty_like(read_at)
        keys[order] = read_at[order][first][of]
    names, one, decision = np.unique(keys, return_index=True, return_inverse=True)
    pairs, read_from = np.unique(
        np.stack([read_at, decision]), axis=1, return_inverse=True
    )  # (2, M), (N,)
    check_at, check_of = (
        (pairs[0], pairs[1]) if scope == "request" else (names, np.arange(len(names)))
    )
    paired = batch.scored_positions[check_at] > 0
    return Decisions(
        count=len(names),
        check_at=check_at[paired],
        check_of=check_of[paired],
        member_at=pairs[0],
        member_of=pairs[1],
        read_from=read_from.reshape(-1),
        requests=requests[one],
    )


def answered_by_checks(who: Decisions, layers: Ints, n_layers: int) -> NDArray[np.bool_]:
    """Which answers a check has at hand: of positions that leave right where they were checked.

    Args:
        who: The decisions.
        layers: Exit layer of each, (D,).
        n_layers: L, where nothing is checked.

    Returns:
        For each member, (M,).
    """
    exits = layers[who.check_of] < n_layers
    place = who.check_at * (n_layers + 1) + layers[who.check_of]  # (K,)
    left = who.member_at * (n_layers + 1) + layers[who.member_of]  # (M,)
    return np.isin(left, place[exits])
