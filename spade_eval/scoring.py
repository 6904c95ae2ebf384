"""The plan of a scoring run: the tokens to compute, their rows, and the positions to read.

Pure bookkeeping on token ids; no tensors and no model. A request asks for the log-probabilities of
a continuation after a context. The model is fed `(context + continuation)[:-1]`, and the last
len(continuation) positions of that are read.

    requests -> feed: sequences -> plan: rows, with one sequence each or several

In a packed row the tokens form a forest in depth-first order: a token stands behind its parent,
sees its ancestors and itself, and counts its position from its root. What sequences have in common
at their beginning is computed once. A row with one sequence is a chain and needs no mask; it is
what `--model hf` feeds.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from spade_eval.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence

ONE_ROW = 8  # sequences whose tokens may share a row whatever the batch size
FILL = 8  # rows are filled up to crossover / FILL tokens: attention costs 1 / FILL of the rest


class BadRequestError(UserError):
    """A request that cannot be scored; `index` tells which."""

    def __init__(self, index: int, message: str):
        super().__init__(message)
        self.index = index


@dataclass(frozen=True)
class Request:
    """Score `continuation` after `context`; both are token ids and neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """What a row may hold.

    Attributes:
        max_length: Tokens that the model takes at once.
        packed: Whether branches may share a row; else every sequence has its own.
        window: Longest path from a root to a leaf in a packed row (a sliding window would vanish
            under a 4D mask).
        widest: Columns of a packed row, at most.
        crossover: Number of keys at which attention costs a token as much as the rest of its layer.
        quadratic: Whether attention holds a number for every pair of a row's tokens.
        batch_size: Sequences that may run at once; it bounds what a row may hold.
        kept: Token ids that truncation keeps at position 0.
    """

    max_length: int
    packed: bool = False
    window: int | None = None
    widest: int = sys.maxsize
    crossover: float = 1024.0
    quadratic: bool = False
    batch_size: int = 16
    kept: Collection[int] = ()


@dataclass
class Row:
    """One row of a batch: a forest of tokens, in depth-first order.

    Attributes:
        ids: Token ids.
        positions: For each token its distance from its root.
        starts: For each token the index of its root.
        ends: For each token the index behind its last descendant (see `forests`).
        reads: (token index, target id, request index): the target's log-probability is read there.
        tokens_apart: Tokens of the distinct sequences in the row, which `--model hf` would feed as
            rows of their own.
        longest: Tokens of the longest of them.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    reads: list[tuple[int, int, int]] = field(default_factory=list)
    tokens_apart: int = 0
    longest: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def append(self, other: Row) -> None:
        """Put another row's trees behind this one's."""
        offset = len(self)
        self.ids += other.ids
        self.positions += other.positions
        self.starts += [s + offset for s in other.starts]
        self.ends += [e + offset for e in other.ends]
        self.reads += [(index + offset, target, request) for index, target, request in other.reads]
        self.tokens_apart += other.tokens_apart
        self.longest = max(self.longest, other.longest)

    @property
    def is_chain(self) -> bool:
        """Whether each token follows the one before it: causal attention is the right one."""
        return not self.ids or self.positions[-1] == len(self) - 1

    def add(self, ids: Sequence[int], path: list[int], shared: int) -> list[int]:
        """Add a sequence.

        Args:
            ids: Its token ids.
            path: Token indices of the sequence that was added last.
            shared: How many of its first tokens it shares with `path`.

        Returns:
            Its own path.
        """
        path = path[:shared]
        new = range(len(self), len(self) + len(ids) - shared)
        self.ids += ids[shared:]
        self.positions += range(shared, len(ids))
        self.starts += [path[0] if path else new.start] * len(new)
        self.ends += [new.stop] * len(new)
        for index in path:
            self.ends[index] = new.stop
        self.tokens_apart += len(ids)
        self.longest = max(self.longest, len(ids))
        return [*path, *new]


@dataclass(frozen=True)
class Plan:
    """Rows of a run.

    Attributes:
        rows: Longest first; chains before forests.
        truncated: Requests whose sequence was longer than the model takes.
    """

    rows: list[Row]
    truncated: int


def feed(request: Request, layout: Layout) -> tuple[tuple[int, ...], bool]:
    """The tokens that the model is given for a request, and whether the left had to be cut off.

    A sequence that is too long loses its left end, as in `--model hf`; if it starts with one of
    `layout.kept`, that token stays and the cut falls behind it.
    """
    whole = request.context + request.continuation
    if len(whole) <= layout.max_length + 1:
        return whole[:-1], False
    if whole[0] in layout.kept:
        return (whole[0], *whole[-layout.max_length :])[:-1], True
    return whole[-(layout.max_length + 1) :][:-1], True


def plan(
    requests: Sequence[Request],
    layout: Layout,
    *,
    which: Sequence[int] | None = None,
    askers: Sequence[Hashable] | None = None,
) -> Plan:
    """Lay out rows so that every request is read exactly once and nothing shared is computed twice.

    Args:
        requests: The requests.
        layout: What a row may hold.
        which: The numbers of those that are laid out; None is all.
        askers: Who asks each of the requests, if it matters: a context that several ask about is
            computed once for each, so that no two begin to read at the same token.

    Raises:
        BadRequestError: An empty continuation, or one longer than the model takes.
    """
    turns: list[dict[tuple[int, ...], list[int]]] = []  # by sequence, a turn for each asker
    known: dict[tuple[int, ...], dict[Hashable, int]] = {}
    contexts: dict[tuple[int, ...], int] = {}  # tokens of each sequence's context
    truncated = 0
    for index in range(len(requests)) if which is None else which:
        request = requests[index]
        _check(request, index, layout.max_length)
        ids, cut = feed(request, layout)
        truncated += cut
        contexts[ids] = max(contexts.get(ids, 0), len(ids) + 1 - len(request.continuation))
        turn = 0
        if askers is not None:
            own = known.setdefault(ids[: len(ids) + 1 - len(request.continuation)], {})
            turn = own.setdefault(askers[index], len(own))
        if turn == len(turns):
            turns.append({})
        turns[turn].setdefault(ids, []).append(index)
    rows: list[Row] = []
    for sequences in turns:
        for group in _groups(sorted(sequences), contexts, layout):
            rows.append(_row(group, sequences, requests))
    if layout.packed:
        rows = _fill(rows, layout)
    rows.sort(key=lambda row: (not row.is_chain, -len(row), row.ids))
    return Plan(rows, truncated)


def _row(
    group: Sequence[tuple[int, ...]],
    sequences: Mapping[tuple[int, ...], Sequence[int]],
    requests: Sequence[Request],
) -> Row:
    """A row of some sequences, in lexicographic order, and what is read of them."""
    row, path, previous = Row(), list[int](), tuple[int, ...]()
    for ids in group:
        path = row.add(ids, path, _common(previous, ids))
        previous = ids
        for index in sequences[ids]:
            targets = requests[index].continuation
            at = path[-len(targets) :]
            row.reads.extend((t, target, index) for t, target in zip(at, targets, strict=True))
    return row


def _groups(
    ordered: Sequence[tuple[int, ...]], contexts: Mapping[tuple[int, ...], int], layout: Layout
) -> Iterator[list[tuple[int, ...]]]:
    """Cut the sequences, in lexicographic order, into the rows they will share.

    A sequence joins the row of the one before it if that costs less than a row of its own. Sharing
    saves their common beginning; but in a packed row every token is compared with every other,
    which costs 1 / crossover of a token each.
    """
    group: list[tuple[int, ...]] = []
    size = 0
    for ids in ordered:
        shared = _common(group[-1], ids) if group else 0
        new = len(ids) - shared
        apart = _cost(size, layout) + _cost(len(ids), layout)
        if (
            group
            and _fits(group[-1], ids, size + new, shared >= contexts[ids], layout)
            and _cost(size + new, layout) < apart
        ):
            group.append(ids)
            size += new
        else:
            if group:
                yield group
            group, size = [ids], len(ids)
    if group:
        yield group


def _fill(rows: list[Row], layout: Layout) -> list[Row]:
    """Let short rows share a row (best fit, longest first): equal rows need little padding.

    The tokens of such a row are compared in vain with those of its other trees, which bounds its
    length.
    """
    capacity = min(int(layout.crossover / FILL), layout.max_length, layout.widest)
    filled: list[Row] = []
    free: list[tuple[int, int]] = []  # (room left, index into `filled`), ascending
    for row in sorted(rows, key=lambda row: (-len(row), row.ids)):
        at = bisect_left(free, (len(row), 0))
        in_window = layout.window is None or row.longest <= layout.window
        if at < len(free) and in_window:
            room, index = free.pop(at)
            filled[index].append(row)
        else:
            room = min(capacity, layout.batch_size * row.longest)
            index = len(filled)
            filled.append(row)
        if in_window and len(row) < room:
            insort(free, (room - len(row), index))
    return filled


def _fits(
    before: Sequence[int], ids: Sequence[int], size: int, same_context: bool, layout: Layout
) -> bool:
    """Whether two neighbours may share a row of `size` tokens."""
    longest = max(len(before), len(ids))
    in_window = layout.window is None or longest <= layout.window
    several = layout.batch_size
    if same_context or not layout.quadratic:
        several = max(several, ONE_ROW)
    small = size <= min(layout.max_length, layout.widest, several * longest)
    return layout.packed and in_window and small


def _cost(tokens: int, layout: Layout) -> float:
    return tokens * (1 + tokens / layout.crossover)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    n = 0
    for x, y in zip(a, b):  # noqa: B905 - the shorter one ends it
        if x != y:
            break
        n += 1
    return n


def _check(request: Request, index: int, max_length: int) -> None:
    if not request.continuation:
        raise BadRequestError(
            index,
            "the continuation is empty or its text is swallowed by the context's last token; there "
            "is nothing to score. Look for an empty answer choice.",
        )
    if len(request.continuation) > max_length:
        raise BadRequestError(
            index,
            f"the continuation has {len(request.continuation)} tokens, and the model takes "
            f"{max_length} (max_length). Raise max_length or shorten the answers.",
        )
