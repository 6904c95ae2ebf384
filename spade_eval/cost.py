"""The account of a run: what was scored, in which layout, and how much of the model was computed.

The ratio is what leaving layers out saves, against the same plan at full depth; what the plan
itself saves against `--model hf` is told by `tokens` against `tokens_hf`.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from spade_eval.decisions import answered_by_checks, decide
from spade_eval.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from spade_eval.batching import Batch, Ints
    from spade_eval.decisions import Decisions
    from spade_eval.generation import Generated
    from spade_eval.tally import Prices, Source


@dataclass
class Account:
    """Sums over batches, calls and processes.

    Attributes:
        tallies: By task.
        truncated_requests: Requests whose left end was cut off.
        padding: Padding fed beside the tokens.
        tokens_hf: Tokens that one row per sequence would take, as `--model hf` feeds them.
        start_token_layers: Start tokens, each of which is computed once.
        seconds: Wall-clock of the request phase; of several processes, the longest.
        generation_seconds: What generated text took of it.
    """

    tallies: dict[str, Tally] = field(default_factory=dict)
    truncated_requests: int = 0
    padding: int = 0
    tokens_hf: int = 0
    start_token_layers: int = 0
    seconds: float = 0.0
    generation_seconds: float = 0.0

    def add(
        self,
        batch: Batch,
        source: Source,
        prices: Prices,
        passed: int | Ints,
        layers: int | Ints,
        tails: Ints,
        starts: int,
    ) -> None:
        """Count a batch.

        Args:
            batch: The batch.
            source: Where its requests come from.
            prices: Of the head.
            passed: Layers that the tokens went through: all alike, or each, (B, T).
            layers: Layer that each of the N reads was taken from, (N,), or one for all.
            tails: Tokens that each of the P scored positions sent on alone from that layer, (P,).
            starts: Start tokens that had to be computed.
        """
        n_layers = prices.n_layers
        self.padding += batch.ids.size - batch.tokens
        self.tokens_hf += batch.tokens_hf
        self.start_token_layers += starts * n_layers
        real = batch.real
        depth = np.broadcast_to(passed, batch.ids.shape)[real]
        self._by_task(source, owners(batch)[real], tokens=1, main_token_layers=depth)

        scored, one = np.unique(batch.read_at, return_index=True)
        self._by_task(
            source,
            batch.requests[one],
            positions_scored=1,
            first_positions=(batch.scored_positions[scored] == 0).astype(int),
        )
        # It is answered once, however many requests read it, unless from several layers.
        layer = np.broadcast_to(layers, batch.read_at.shape)
        (at, layer), one = np.unique(np.stack([batch.read_at, layer]), axis=1, return_index=True)
        self._by_task(
            source,
            batch.requests[one],
            tail_token_layers=tails[at] * (n_layers - layer),
            head_token_layers=prices.head,
        )
        self._set_baseline(prices)
        new = np.unique(batch.requests)
        new = new[source.counted[new]]
        kind = "requests_dense" if batch.ends is None else "requests_packed"
        self._by_task(source, new, requests=1, **{kind: 1})

    def add_exits(
        self,
        batch: Batch,
        source: Source,
        prices: Prices,
        who: Decisions,
        layers: Ints,
        checked: Ints,
    ) -> None:
        """Count a batch's decisions, except those that could not be checked.

        Args:
            batch: The batch.
            source: Where its requests come from.
            prices: Of a check, and whether it answers.
            who: The decisions.
            layers: Layer of each, (D,).
            checked: Confidences measured for each, in positions, (D,).
        """
        counted = source.counted[who.requests]
        times, of = _measured(who, checked, counted)
        self._by_task(source, who.requests[of], check_token_layers=times * prices.check)
        if prices.check_answers:
            # `add` has charged these heads, to the same requests.
            given = answered_by_checks(who, layers, prices.n_layers)[who.read_from]
            left = np.stack([batch.read_at, layers[who.member_of][who.read_from]])[:, given]
            _, one = np.unique(left, axis=1, return_index=True)
            owners_ = batch.requests[given][one]
            self._by_task(source, owners_, head_token_layers=-prices.head)
        could = np.zeros(who.count, dtype=bool)
        could[who.check_of] = True
        could &= counted
        for request, layer in zip(
            who.requests[could].tolist(), layers[could].tolist(), strict=True
        ):
            self._tally(source.tasks[request]).exits[layer] += 1
        contexts = decide(batch, "context")
        last = np.zeros(contexts.count, dtype=np.int64)
        of_read = who.member_of[who.read_from]
        np.maximum.at(last, contexts.member_of[contexts.read_from], layers[of_read])
        for request, layer in zip(contexts.requests.tolist(), last.tolist(), strict=True):
            self._tally(source.tasks[request]).row_exits[layer] += 1

    def add_generated(
        self,
        run: Generated,
        requests: Ints,
        source: Source,
        prices: Prices,
        exits: bool,
        starts: int,
    ) -> None:
        """Count a batch of generated texts.

        Args:
            run: What happened.
            requests: The request of each row, (B,).
            source: Where the requests come from.
            prices: Of heads and checks.
            exits: Whether its tokens decided about their layers.
            starts: Start tokens that had to be computed.
        """
        self.start_token_layers += starts * prices.n_layers
        work, new = run.work, np.array([len(tokens) for tokens in run.tokens])
        alone = run.prompt_lengths == 1  # the first token is read at position 0
        fed = run.prompt_lengths + new - 1  # the last token is not
        self.padding += int((run.prompt_lengths.max() - run.prompt_lengths).sum())
        self.tokens_hf += int(fed.sum())
        self._by_task(
            source,
            requests,
            tokens=fed,
            generated_tokens=new,
            positions_scored=new,
            first_positions=alone.astype(int),
            main_token_layers=work.prompt + work.decode + work.backfilled,
            prompt_token_layers=work.prompt,
            decode_token_layers=work.decode,
            backfilled_token_layers=work.backfilled,
            tail_token_layers=work.tail,
            check_token_layers=work.checks * prices.check,
            head_token_layers=work.heads * prices.head,
        )
        self._set_baseline(prices)
        counted = source.counted[requests]
        self._by_task(source, requests[counted], requests=1, requests_generated=1)
        if not exits:
            return
        for row in np.flatnonzero(counted).tolist():
            tally = self._tally(source.tasks[requests[row]])
            layers = run.exit_layers[row]
            tally.exits.update(layers[int(alone[row]) :])
            tally.row_exits[max(layers)] += 1

    def merge(self, parts: Sequence[Account]) -> None:
        """Add the sums of processes that ran side by side."""
        for part in parts:
            for task, tally in part.tallies.items():
                self._tally(task).merge(tally)
            self.truncated_requests += part.truncated_requests
            self.padding += part.padding
            self.tokens_hf += part.tokens_hf
            self.start_token_layers += part.start_token_layers
        self.seconds += max((part.seconds for part in parts), default=0.0)
        self.generation_seconds += max((part.generation_seconds for part in parts), default=0.0)

    @property
    def total(self) -> Tally:
        """All tasks together."""
        total = Tally()
        for tally in self.tallies.values():
            total.merge(tally)
        return total

    def report(self) -> dict[str, object]:
        """The sums for the results file, in all and by task."""
        return {
            **self.total.report(self.start_token_layers),
            "truncated_requests": self.truncated_requests,
            "padding": self.padding,
            "tokens_hf": self.tokens_hf,
            "start_token_layers": self.start_token_layers,
            "seconds": round(self.seconds, 3),
            "generation_seconds": round(self.generation_seconds, 3),
            "tokens_per_second": self.tokens_per_second,
            "tasks": {task: tally.report() for task, tally in sorted(self.tallies.items())},
        }

    @property
    def tokens_per_second(self) -> float | None:
        """Generated tokens per second of generation; None without any."""
        seconds = self.generation_seconds
        return round(self.total.generated_tokens / seconds, 2) if seconds else None

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Add the time spent inside to `seconds`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - begin

    def _set_baseline(self, prices: Prices) -> None:
        for tally in self.tallies.values():
            heads = tally.positions_scored * prices.head
            tally.full_depth_token_layers = tally.tokens * prices.n_layers + heads

    def _tally(self, task: str) -> Tally:
        return self.tallies.setdefault(task, Tally())

    def _by_task(self, source: Source, owners: Ints, **amounts: float | NDArray[Any]) -> None:
        """Add amounts, one for all or one for each owner, a request, to their tasks' sums."""
        names, codes = source.coded
        found = codes[owners]
        present = np.flatnonzero(np.bincount(found)).tolist()
        for name, amount in amounts.items():
            sums = np.bincount(found, weights=np.broadcast_to(amount, owners.shape)).tolist()
            for code in present:
                tally, value = self._tally(names[code]), sums[code]
                whole = isinstance(getattr(tally, name), int)
                setattr(tally, name, getattr(tally, name) + (int(value) if whole else value))


def owners(batch: Batch) -> Ints:
    """A request for each token of the rows, (B, T): the first one that is read behind the token.

    What requests of several tasks have in common, such as a system prompt, is the first one's.
    Padding has none, -1.
    """
    at = batch.scored[batch.read_at]
    order = np.argsort(at, kind="stable")
    # A token's descendants stand right behind it, and the last of a branch is read.
    first = np.searchsorted(at[order], np.arange(batch.ids.size)).reshape(batch.ids.shape)
    found = np.full(batch.ids.shape, -1, dtype=np.int64)
    found[batch.real] = batch.requests[order][first[batch.real]]
    return found


def _measured(who: Decisions, checked: Ints, counted: NDArray[np.bool_]) -> tuple[Ints, Ints]:
    """How often each position was measured, and a decision that paid for it.

    One that several look at is measured once at each layer, until the last of them has left.

    Returns:
        Of the U positions that decisions which count look at: times (U,) and decisions (U,).
    """
    looked_at = np.bincount(who.check_of, minlength=who.count)  # positions, (D,)
    times = checked // np.maximum(looked_at, 1)  # candidate layers, (D,)
    mine = counted[who.check_of]
    at, of = who.check_at[mine], who.check_of[mine]
    longest = np.lexsort((-times[of], at))  # of each position's decisions the last to leave, first
    _, first = np.unique(at[longest], return_index=True)
    one = of[longest][first]
    return times[one], one
