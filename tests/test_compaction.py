"""Who decides about an exit, and which tokens then leave the lane: against loops over requests and
tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spade_eval.batching import Batch, collate, cut
from spade_eval.compaction import WORTH, Rows, compact
from spade_eval.decisions import decide
from spade_eval.departures import rows_of
from spade_eval.forests import sees
from spade_eval.scoring import Layout, Request, Row, plan

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from spade_eval.exits import Scope

# Few distinct tokens, so that contexts are each other's beginnings and continuations meet them.
tokens = st.lists(st.integers(3, 5), min_size=1, max_size=5).map(tuple)
asked = st.lists(st.builds(Request, tokens, tokens), min_size=1, max_size=12)
scopes = st.sampled_from(["context", "token", "request"])


def batches(requests: list[Request], packed: bool, batch_size: int = 16) -> list[Batch]:
    layout = Layout(64, packed, crossover=200.0, batch_size=batch_size)
    return [collate(rows) for rows in cut(plan(requests, layout).rows, batch_size)]


# ---------------------------------------------------------------- decisions


@given(asked, st.booleans(), scopes)
def test_decisions_are_those_of_a_loop_over_requests(
    requests: list[Request], packed: bool, scope: Scope
) -> None:
    for batch in batches(requests, packed):
        who = decide(batch, scope)
        reads: dict[int, list[tuple[int, int]]] = {}  # of each request: (position, scored index)
        for at, request in zip(batch.read_at.tolist(), batch.requests.tolist(), strict=True):
            reads.setdefault(request, []).append((int(batch.scored_positions[at]), at))
        names: dict[object, int] = {}  # decision by what names it
        checks, members = set(), set()
        for n, request in enumerate(batch.requests.tolist()):
            at = int(batch.read_at[n])
            last = min(reads[request])  # the last context token is read first
            assert last[0] == len(requests[request].context) - 1
            decided_at = {"context": [last], "token": [(int(batch.scored_positions[at]), at)], "request": reads[request]}[scope]  # fmt: skip
            key = request if scope == "request" else decided_at[0][1]
            mine = int(who.member_of[who.read_from[n]])
            assert names.setdefault(key, mine) == mine
            assert who.member_at[who.read_from[n]] == at
            members.add((at, mine))
            checks |= {(p, mine) for position, p in decided_at if position > 0}
        assert sorted(names.values()) == list(range(who.count))  # one each, and none without reads
        assert sorted(zip(who.member_at.tolist(), who.member_of.tolist(), strict=True)) == sorted(members)  # fmt: skip
        assert sorted(zip(who.check_at.tolist(), who.check_of.tolist(), strict=True)) == sorted(checks)  # fmt: skip
        of_request = {
            (request, int(who.member_of[m]))
            for request, m in zip(batch.requests.tolist(), who.read_from.tolist(), strict=True)
        }
        assert {(r, d) for d, r in enumerate(who.requests.tolist())} <= of_request


def test_a_position_answers_for_every_context_that_it_follows() -> None:
    """(3, 4) is the beginning of (3, 4, 5): at 5 both are read, and they decide apart."""
    (batch,) = batches([Request((3, 4), (5, 6)), Request((3, 4, 5), (7,))], packed=True)
    assert batch.ids.tolist() == [[3, 4, 5]]
    context, token = decide(batch, "context"), decide(batch, "token")
    assert (context.count, token.count) == (2, 2)
    assert batch.scored_positions[context.check_at].tolist() == [1, 2]
    assert batch.scored_positions[context.member_at].tolist() == [1, 2, 2]
    assert batch.scored_positions[token.member_at].tolist() == [1, 2]
    one, other = context.member_of[context.read_from[batch.requests == 0]]
    assert one == other != context.member_of[context.read_from[batch.requests == 1]][0]


@pytest.mark.parametrize("scope", ["context", "token", "request"])
def test_position_0_is_never_checked(scope: Scope) -> None:
    (batch,) = batches([Request((3,), (4, 5)), Request((6,), (7,))], packed=False)
    who = decide(batch, scope)
    checked = batch.scored_positions[who.check_at].tolist()
    assert checked == ([] if scope == "context" else [1])
    assert len(who.member_at) == 3  # but it is answered


# ---------------------------------------------------------------- compaction


def mask(rows: Rows) -> NDArray[np.bool_]:
    assert rows.ends is not None
    return sees(torch.from_numpy(rows.ends)).numpy()


def seen_by(rows: Rows, origin: int) -> list[tuple[int, ...]]:
    """What a token sees, in order: (origin, id, position id)."""
    at = np.flatnonzero((rows.origin == origin) & rows.real)
    assert len(at) == 1, "a token stands in one place"
    b, t = divmod(int(at[0]), rows.ids.shape[1])
    visible = range(t + 1) if rows.ends is None else np.flatnonzero(mask(rows)[b, t]).tolist()
    assert all(rows.real[b, s] for s in visible)
    positions = np.arange(rows.ids.shape[1]) if rows.positions is None else rows.positions[b]
    return [(int(rows.origin[b, s]), int(rows.ids[b, s]), int(positions[s])) for s in visible]


def inspect(before: Rows, after: Rows, source: np.ndarray, first: Rows, still: list[int]) -> None:
    """Compare rows before and after a compaction that leaves the origins `still` open."""
    needed: set[int] = set()
    for origin in still:
        seen = seen_by(first, origin)
        assert seen_by(after, origin) == seen
        needed |= {token[0] for token in seen}
    assert sorted(after.origin[after.real].tolist()) == sorted(needed)
    assert after.ids.shape == after.real.shape == after.origin.shape == source.shape
    assert after.ids.size <= before.ids.size * (1 - WORTH)
    taken = source[after.real]
    assert (before.origin.reshape(-1)[taken] == after.origin[after.real]).all()
    assert before.real.reshape(-1)[taken].all()
    assert ((source >= 0) & (source < before.ids.size)).all()
    assert not after.ids[~after.real].any()
    assert after.real.any(0).all(), "no column of padding only"
    assert (after.ends is None) == (before.ends is None)
    if after.ends is None:
        lengths = after.real.sum(1)
        assert (after.real == (np.arange(after.ids.shape[1]) < lengths[:, None])).all()
        return
    for b, t in zip(*np.nonzero(~after.real), strict=True):
        assert np.flatnonzero(mask(after)[b, t]).tolist() == [t], "padding sees itself"
        assert np.flatnonzero(mask(after)[b, :, t]).tolist() == [t], "and nobody else sees it"


@given(asked, st.booleans(), st.integers(1, 16), st.data())
def test_open_positions_see_what_they_saw(
    requests: list[Request], packed: bool, batch_size: int, data: st.DataObject
) -> None:
    for batch in batches(requests, packed, batch_size):
        first = rows = rows_of(batch)
        still = batch.scored.tolist()
        for _ in range(3):  # the lane may shrink more than once
            still = data.draw(st.lists(st.sampled_from(still), min_size=1, unique=True))
            found = compact(rows, np.array(still))
            if found is None:
                not_worth_it(rows, still)
                continue
            inspect(rows, *found, first, still)
            rows = found[0]


def not_worth_it(rows: Rows, still: list[int]) -> None:
    """The rows that remain, laid out without skill, are not much smaller than those there are."""
    seen = [[token[0] for token in seen_by(rows, origin)] for origin in still]
    if rows.ends is None:
        kept = {int(np.argmax(((rows.origin == s[0]) & rows.real).any(1))) for s in seen}
        size = len(kept) * max(map(len, seen))
    else:
        trees: dict[int, set[int]] = {}
        for s in seen:
            trees.setdefault(s[0], set()).update(s)
        sizes = [len(tree) for tree in trees.values()]
        n = -(-sum(sizes) // rows.ids.shape[1])
        size = sum(sizes) + n * max(sizes)
    assert size > rows.ids.size * (1 - WORTH)


def test_nothing_moves_where_nothing_can_leave() -> None:
    for packed in (False, True):
        (batch,) = batches([Request((3, 4, 5), (6, 7)), Request((3, 4, 5), (8, 9))], packed)
        assert compact(rows_of(batch), batch.scored) is None


def test_chains_lose_rows_and_their_ends() -> None:
    requests = [Request((3, 4), (5,) * 6), Request((6, 7, 8), (9,)), Request((7, 7), (9, 9))]
    (batch,) = batches(requests, packed=False)
    rows = rows_of(batch)
    assert rows.ids.shape == (3, 7)
    found = compact(rows, batch.scored[batch.scored_positions == 2])  # one in every row
    assert found is not None
    assert found[0].ids.tolist() == [[3, 4, 5], [6, 7, 8], [7, 7, 9]]
    found = compact(found[0], batch.scored[batch.token_ids == 8])
    assert found is not None
    assert (found[0].ids.tolist(), found[0].real.all()) == ([[6, 7, 8]], True)


def test_finished_branches_leave_before_their_context_does() -> None:
    requests = [Request((3, 4, 5), (i, 9, 9, 9)) for i in (10, 11, 12)]
    (batch,) = batches(requests, packed=True)
    rows = rows_of(batch)
    assert rows.ids.shape == (1, 12)
    on_branch_11 = batch.scored[batch.read_at[(batch.requests == 1)]][-1:]
    found = compact(rows, on_branch_11)
    assert found is not None
    assert found[0].ids.tolist() == [[3, 4, 5, 11, 9, 9]]
    assert found[0].positions is not None
    assert found[0].positions.tolist() == [[0, 1, 2, 3, 4, 5]]
    found = compact(found[0], batch.scored[batch.scored_positions == 2])
    assert found is not None
    assert found[0].ids.tolist() == [[3, 4, 5]]


def test_what_is_left_of_several_rows_moves_together() -> None:
    requests = [Request((3 + k, 20 + k, 30), (i, 9, 9, 9)) for k in range(6) for i in (10, 11, 12)]
    layout = Layout(64, packed=True, crossover=200.0, batch_size=4)
    batch = collate(plan(requests, layout).rows)
    rows = rows_of(batch)
    assert rows.ids.shape[0] > 1
    found = compact(rows, batch.scored[batch.scored_positions == 2])  # the six contexts
    assert found is not None
    assert found[0].ids.shape[0] == 1
    assert found[0].real.sum() == 18


def test_trees_are_shared_out_longest_first_each_to_the_emptiest_row() -> None:
    rows = []
    for sizes in ((5, 3), (2, 2, 1), (8,)):
        row = Row()
        for size in sizes:
            path = row.add((10 * size + len(rows),) * size, [], 0)
            row.reads.append((path[-1], 0, len(row.reads)))
        rows.append(row)
    batch = collate(rows)
    found = compact(rows_of(batch), batch.scored[batch.token_ids != 82])
    assert found is not None
    assert found[0].ids.tolist() == [[50] * 5 + [21] * 2, [30] * 3 + [21] * 2 + [11, 0]]
