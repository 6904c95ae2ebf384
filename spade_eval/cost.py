"""The account of a run: what was scored, in which layout, and how much of the model was computed.

The unit is the token-layer, one token that is not padding through one layer. The baseline is the
same plan at full depth, so the ratio is what leaving layers out saves; what the plan itself saves
against `--model hf` is told by `tokens` against `tokens_hf`.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from spade_eval.batching import Batch


@dataclass
class Account:
    """Sums over batches, calls and processes.

    Attributes:
        requests: Requests, or windows of pages, that the model scored; those answered by a response
            cache are not among them.
        truncated_requests: Requests whose left end was cut off.
        positions_scored: Positions that reached a decoder.
        first_positions: Those of them at position 0, where there is no pair.
        requests_packed: Requests in rows that hold several sequences.
        requests_dense: Requests in rows of their own.
        tokens: Tokens fed to the model, without padding.
        padding: Padding fed beside them.
        tokens_hf: Tokens that one row per sequence would take, as `--model hf` feeds them.
        main_token_layers: Tokens times the layers they passed before a decoder read them.
        tail_token_layers: The same for answer tokens in the tail.
        start_token_layers: The same for start tokens, each of which is computed once.
        full_depth_token_layers: The same plan through all layers.
        seconds: Wall-clock of the request phase; of several processes, the longest.
    """

    requests: int = 0
    truncated_requests: int = 0
    positions_scored: int = 0
    first_positions: int = 0
    requests_packed: int = 0
    requests_dense: int = 0
    tokens: int = 0
    padding: int = 0
    tokens_hf: int = 0
    main_token_layers: int = 0
    tail_token_layers: int = 0
    start_token_layers: int = 0
    full_depth_token_layers: int = 0
    seconds: float = 0.0

    def add(self, batch: Batch, layer: int, n_layers: int, tail_tokens: int, starts: int) -> None:
        """Count a batch that left the main lane at `layer` and needed `starts` new start tokens."""
        scored, first = len(batch.scored), int((batch.scored_positions == 0).sum())
        here = len(set(batch.requests.tolist()))
        self.requests += here
        if batch.sees is None:
            self.requests_dense += here
        else:
            self.requests_packed += here
        self.positions_scored += scored
        self.first_positions += first
        self.tokens += batch.tokens
        self.padding += batch.ids.size - batch.tokens
        self.tokens_hf += batch.tokens_hf
        self.main_token_layers += batch.tokens * layer
        self.tail_token_layers += tail_tokens * (n_layers - layer)
        self.start_token_layers += starts * n_layers
        self.full_depth_token_layers += batch.tokens * n_layers

    def merge(self, parts: Sequence[Account]) -> None:
        """Add the sums of processes that ran side by side."""
        for f in fields(self):
            values = [getattr(part, f.name) for part in parts]
            more = max(values, default=0.0) if f.name == "seconds" else sum(values)
            setattr(self, f.name, getattr(self, f.name) + more)

    def report(self) -> dict[str, object]:
        """The sums for the results file, and the share of full depth that was computed."""
        done = self.main_token_layers + self.tail_token_layers + self.start_token_layers
        full = self.full_depth_token_layers
        ratio = {"token_layer_ratio": round(done / full, 4) if full else None}
        return asdict(self) | {"seconds": round(self.seconds, 3)} | ratio

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Add the time spent inside to `seconds`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - begin
