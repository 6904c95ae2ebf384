"""The plan by itself: every request is read exactly once, at positions that see exactly its own
prefix."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spade_eval.batching import Batch, collate, cut
from spade_eval.forests import sees
from spade_eval.scoring import FILL, BadRequestError, Layout, Request, Row, feed, plan

tokens = st.lists(st.integers(0, 3), min_size=1, max_size=7).map(tuple)  # few ids: much is shared
requests = st.lists(st.builds(Request, tokens, tokens), max_size=25)
layouts = st.builds(
    Layout,
    max_length=st.integers(8, 30),
    packed=st.booleans(),
    window=st.one_of(st.none(), st.integers(3, 12)),
    crossover=st.sampled_from([3.0, 50.0, 1e9]),
    widest=st.sampled_from([10, 99]),
    quadratic=st.booleans(),
    batch_size=st.sampled_from([1, 4, 99]),
    kept=st.sampled_from([(), (0,)]),
)


def prefix(row: Row, index: int) -> tuple[int, ...]:
    """The tokens from a root down to `index`."""
    return tuple(row.ids[i] for i in range(index + 1) if row.ends[i] > index)


@given(requests, layouts)
def test_every_request_is_read_once_behind_its_own_prefix(
    asked: list[Request], layout: Layout
) -> None:
    laid = plan(asked, layout)
    read = Counter()
    for row in laid.rows:
        for index, target, request in row.reads:
            read[request, prefix(row, index), target] += 1
    expected = Counter()
    for i, request in enumerate(asked):
        fed, _ = feed(request, layout)
        n = len(request.continuation)
        for k, target in enumerate(request.continuation):
            expected[i, fed[: len(fed) - n + k + 1], target] += 1
    assert read == expected


@given(requests, layouts)
def test_rows_keep_to_the_layout(asked: list[Request], layout: Layout) -> None:
    laid = plan(asked, layout)
    assert laid.truncated == sum(feed(r, layout)[1] for r in asked)
    for row in laid.rows:
        assert len(row) <= layout.max_length
        assert row.is_chain or len(row) <= layout.widest
        assert row.longest == max(row.positions) + 1
        longest = max(row.positions) + 1
        if not row.is_chain:
            assert layout.packed
            assert layout.window is None or longest <= layout.window
        # Nothing that two sequences of a tree have in common at their beginning is there twice.
        prefixes = [prefix(row, i) for i in range(len(row))]
        assert row.is_chain == all(len(before) == i + 1 for i, before in enumerate(prefixes))
        assert len(set(zip(row.starts, prefixes, strict=True))) == len(row)
        for i, before in enumerate(prefixes):
            assert row.positions[i] == len(before) - 1
            assert row.ids[row.starts[i]] == before[0]
            assert row.ends[row.starts[i]] > i >= row.starts[i]


@given(requests, layouts, st.integers(1, 9))
def test_batches_hold_every_row_once_and_keep_their_size(
    asked: list[Request], layout: Layout, batch_size: int
) -> None:
    rows = plan(asked, layout).rows
    made = [collate(group) for group in cut(rows, batch_size)]
    assert sum(len(b.ids) for b in made) == len(rows)
    assert sum(b.tokens for b in made) == sum(len(row) for row in rows)
    read = Counter(int(r) for b in made for r in b.requests)
    assert read == Counter({i: len(r.continuation) for i, r in enumerate(asked)})
    for batch in made:
        longest = batch.scored_positions.max() + 1
        assert batch.ids.size <= batch_size * longest or len(batch.ids) == 1
        assert len(set(batch.scored.tolist())) == len(batch.scored)
        check_masks(batch)


def check_masks(batch: Batch) -> None:
    """A scored token sees exactly as many tokens as its position says; no token sees a later one
    or padding."""
    if batch.ends is None:
        return
    width = batch.ids.shape[1]
    mask = sees(torch.from_numpy(batch.ends)).numpy()
    assert not np.triu(mask, 1).any()
    assert mask[:, np.arange(width), np.arange(width)].all()
    flat = mask.reshape(-1, width)
    assert (flat[batch.scored].sum(1) == batch.scored_positions + 1).all()
    for b, t in zip(*np.nonzero(~batch.real), strict=True):
        assert np.flatnonzero(mask[b, t]).tolist() == [t], "padding sees itself alone"


@given(requests, layouts, st.data())
def test_askers_never_read_the_same_token_of_a_context(
    asked: list[Request], layout: Layout, data: st.DataObject
) -> None:
    askers = [data.draw(st.integers(0, 2)) for _ in asked]
    rows = plan(asked, layout, askers=askers).rows
    read = Counter(index for row in rows for _, _, index in row.reads)
    assert read == Counter({i: len(r.continuation) for i, r in enumerate(asked)})
    for row in rows:
        first: dict[int, int] = {}
        for at, _, index in row.reads:
            first[index] = min(at, first.get(index, at))
        owners: dict[int, int] = {}
        for index, at in first.items():
            assert owners.setdefault(at, askers[index]) == askers[index]
    assert [r.ids for r in plan(asked, layout, askers=[7] * len(asked)).rows] == [
        r.ids for r in plan(asked, layout).rows
    ]


@given(requests, layouts, st.data())
def test_some_requests_are_laid_out_alone_under_their_own_numbers(
    asked: list[Request], layout: Layout, data: st.DataObject
) -> None:
    which = [i for i in range(len(asked)) if data.draw(st.booleans())]
    found = plan(asked, layout, which=which).rows
    alone = plan([asked[i] for i in which], layout).rows
    assert [row.ids for row in found] == [row.ids for row in alone]
    assert [row.reads for row in found] == [
        [(at, target, which[index]) for at, target, index in row.reads] for row in alone
    ]


def test_eager_attention_keeps_questions_apart_below_their_batch_size() -> None:
    prefix = tuple(range(10, 60))
    asked = [Request((*prefix, q), (a, a)) for q in range(4) for a in (1, 2)]
    rows = {
        (size, quadratic): sorted(
            len(row) for row in plan(
                asked, Layout(999, packed=True, crossover=1e6, batch_size=size, quadratic=quadratic)
            ).rows
        )
        for size in (1, 8) for quadratic in (False, True)
    }  # fmt: skip
    assert rows[1, True] == [53] * 4
    assert rows[1, False] == rows[8, False] == rows[8, True] == [50 + 4 * 3]


@given(requests, layouts)
def test_order_of_requests_does_not_change_the_rows(asked: list[Request], layout: Layout) -> None:
    forward = [row.ids for row in plan(asked, layout).rows]
    assert forward == [row.ids for row in plan(asked[::-1], layout).rows]


def test_a_context_is_fed_once_for_all_its_choices() -> None:
    context = (5, 6, 7, 8)
    asked = [Request(context, (c, 9, c)) for c in (1, 2, 3)] + [Request(context, (4,))]
    (row,) = plan(asked, Layout(max_length=99, packed=True)).rows
    assert row.ids == [5, 6, 7, 8, 1, 9, 2, 9, 3, 9]
    assert row.tokens_apart == 3 * 6 + 4  # one-token answers end at the context
    dense = plan(asked, Layout(max_length=99)).rows
    assert sorted(map(len, dense)) == [4, 6, 6, 6]


def test_one_token_choices_and_duplicates_share_one_sequence() -> None:
    asked = [Request((1, 2), (3,)), Request((1, 2), (4,)), Request((1, 2), (3,))]
    (row,) = plan(asked, Layout(max_length=9)).rows
    assert row.ids == [1, 2]
    assert row.reads == [(1, 3, 0), (1, 4, 1), (1, 3, 2)]
    batch = collate([row])
    assert batch.scored.tolist() == [1]


def test_equal_tokens_split_at_different_points_are_read_where_each_begins() -> None:
    asked = [Request((1, 2), (3, 4)), Request((1, 2, 3), (4,))]
    (row,) = plan(asked, Layout(max_length=9)).rows
    assert row.reads == [(1, 3, 0), (2, 4, 0), (2, 4, 1)]


def test_neighbours_with_a_long_common_prefix_share_a_row_and_strangers_do_not() -> None:
    shots = tuple(range(100, 160))
    layout = Layout(max_length=999, packed=True, crossover=400.0)
    few_shot = [Request((*shots, i, i), (1,)) for i in range(4)]
    (row,) = plan(few_shot, layout).rows
    assert len(row) == 60 + 4 * 2
    strangers = [Request((i, *shots, i), (1,)) for i in range(4)]
    assert [len(row) for row in plan(strangers, layout).rows] == [62] * 4


def test_short_rows_are_filled_up_and_keep_to_themselves() -> None:
    asked = [Request((i,) * n, (1,)) for i, n in enumerate([30, 20, 12, 9, 9, 3], start=2)]
    layout = Layout(max_length=999, packed=True, crossover=32.0 * FILL)
    rows = plan(asked, layout).rows
    assert sorted(map(len, rows)) == [21, 30, 32]
    assert sum(row.tokens_apart for row in rows) == 30 + 20 + 12 + 9 + 9 + 3
    dense = Layout(max_length=999, packed=False, crossover=32.0 * FILL)
    assert len(plan(asked, dense).rows) == 6


def test_a_batch_is_cut_before_it_is_mostly_padding() -> None:
    lengths = [600, 310, 305, 300, 299]
    asked = [Request((i,) * n, (1,)) for i, n in enumerate(lengths)]
    rows = plan(asked, Layout(max_length=999)).rows
    assert [collate(group).ids.shape for group in cut(rows, 16)] == [(1, 600), (4, 310)]


def test_truncation_keeps_a_special_first_token_and_cuts_behind_it() -> None:
    request = Request((0, 1, 2, 3, 4), (5, 6))
    assert feed(request, Layout(max_length=4)) == ((2, 3, 4, 5), True)
    assert feed(request, Layout(max_length=4, kept=(0,))) == ((0, 3, 4, 5), True)
    assert feed(request, Layout(max_length=6)) == ((0, 1, 2, 3, 4, 5), False)


def test_a_small_batch_size_bounds_what_a_row_holds() -> None:
    """A single row is the smallest batch: filled without bound it would not get smaller on less memory."""
    asked = [Request((i,) * 10, (1,)) for i in range(40)]
    for batch_size, most in [(1, 10), (4, 40), (999, 100)]:
        layout = Layout(max_length=999, packed=True, crossover=100.0 * FILL, batch_size=batch_size)
        assert max(map(len, plan(asked, layout).rows)) == most
    context = tuple(range(50))
    choices = [Request(context, (i, *range(49))) for i in range(40)]
    layout = Layout(max_length=9999, packed=True, crossover=1e9, batch_size=1)
    assert max(map(len, plan(choices, layout).rows)) <= 8 * 99


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((1,), ()), "the continuation is empty.*nothing to score"),
        (Request((1,), (1,) * 9), "the continuation has 9 tokens, and the model takes 8"),
    ],
)
def test_requests_that_cannot_be_scored(request_: Request, message: str) -> None:
    with pytest.raises(BadRequestError, match=message) as error:
        plan([Request((1,), (2,)), request_], Layout(max_length=8))
    assert error.value.index == 1
