"""What is counted of each task, and in which unit.

The unit is the token-layer, one token that is not padding through one layer; heads and checks are
converted by their multiply-adds. The baseline is the same plan at full depth, so the ratio is what
leaving layers out saves.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from spade_eval.batching import Ints


@dataclass(frozen=True)
class Prices:
    """What things cost in token-layers of this model, by multiply-adds.

    Attributes:
        n_layers: L.
        head: Final norm and head at one position.
        check: A confidence at one position: the map, and what it needs of the head.
        check_answers: Whether what leaves where it is checked takes its answer from the check, so
            that no head is paid for it again.
    """

    n_layers: int
    head: float
    check: float = 0.0
    check_answers: bool = False


@dataclass(frozen=True)
class Source:
    """Where requests come from.

    Attributes:
        tasks: For each request the name of its task.
        counted: For each whether it is counted; a rank may be given copies of its last request to
            keep step with the others.
    """

    tasks: Sequence[str]
    counted: NDArray[np.bool_]

    @cached_property
    def coded(self) -> tuple[list[str], Ints]:
        """The names of the tasks, and for each request the index of its own."""
        names, codes = np.unique(np.array(self.tasks), return_inverse=True)
        return names.tolist(), codes


@dataclass
class Tally:
    """Sums over the requests of one task.

    Attributes:
        requests: Requests, or windows of pages, that the model scored; those answered by a response
            cache are not among them.
        requests_packed: Requests in rows that hold several sequences.
        requests_dense: Requests in rows of their own.
        requests_generated: Requests that were answered with generated text.
        positions_scored: Positions that reached a decoder.
        first_positions: Those of them at position 0, where there is no pair.
        tokens: Tokens fed to the model, without padding.
        generated_tokens: Tokens that it gave.
        main_token_layers: Tokens times the layers they passed before a decoder read them.
        prompt_token_layers: Of them in generation, what the first token of an answer needed,
        decode_token_layers: what each further token needed of itself,
        backfilled_token_layers: and what exits had left out and a later, deeper token needed, with
            what was computed again so that rows could share a call.
        tail_token_layers: The same for answer tokens in the tail.
        check_token_layers: Confidence checks.
        head_token_layers: Heads at the scored positions, but where a check has answered.
        full_depth_token_layers: The same plan through all layers, heads included.
        exits: Decisions by the layer they exited at, L where they did not.
        row_exits: Contexts by the layer at which the last of their continuations exited; in dense
            rows, each continuation by itself.
    """

    requests: int = 0
    requests_packed: int = 0
    requests_dense: int = 0
    requests_generated: int = 0
    positions_scored: int = 0
    first_positions: int = 0
    tokens: int = 0
    generated_tokens: int = 0
    main_token_layers: int = 0
    prompt_token_layers: int = 0
    decode_token_layers: int = 0
    backfilled_token_layers: int = 0
    tail_token_layers: int = 0
    check_token_layers: float = 0.0
    head_token_layers: float = 0.0
    full_depth_token_layers: float = 0.0
    exits: Counter[int] = field(default_factory=Counter)
    row_exits: Counter[int] = field(default_factory=Counter)

    def merge(self, other: Tally) -> None:
        """Add another's sums."""
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))

    def report(self, starts: int = 0) -> dict[str, object]:
        """The sums, and the share of full depth that was computed."""
        sums = {f.name: getattr(self, f.name) for f in fields(self)}
        done = starts + sum(
            sums[f"{part}_token_layers"] for part in ("main", "tail", "check", "head")
        )
        full = self.full_depth_token_layers
        return {
            **{k: round(v, 1) if isinstance(v, float) else v for k, v in sums.items()},
            "exits": {str(layer): n for layer, n in sorted(self.exits.items())},
            "row_exits": {str(layer): n for layer, n in sorted(self.row_exits.items())},
            "mean_exit_layer": _mean(self.exits),
            "mean_row_exit_layer": _mean(self.row_exits),
            "token_layer_ratio": round(done / full, 4) if full else None,
            "implied_speedup": round(full / done, 3) if done else None,
        }


def _mean(exits: Counter[int]) -> float | None:
    n = exits.total()
    return round(sum(layer * k for layer, k in exits.items()) / n, 2) if n else None
