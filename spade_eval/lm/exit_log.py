"""The file of `exit_log`: one JSON line per scored position or generated token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spade_eval.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from spade_eval.batching import Batch, Ints
    from spade_eval.generation import Generated
    from spade_eval.trace import Trace

    Named = Callable[[int], dict[str, object] | None]


class ExitLog:
    """Appends lines to a file, which begins empty.

    Args:
        path: The file; processes but the first append ".rankN" to its name.
        rank: The number of this process.
    """

    def __init__(self, path: Path, rank: int):
        self.path = path.with_name(f"{path.name}.rank{rank}") if rank else path
        self.path.write_text("")

    def scored(self, batch: Batch, trace: Trace, layers: Ints, named: Named) -> None:
        """Write a line for each token that a batch scores.

        Args:
            batch: What was read.
            trace: Where it exited, and what it answers.
            layers: The exit layer of each of the batch's reads.
            named: Task, document and number of a request; None leaves it out.
        """
        who = trace.decisions
        values = trace.confidence[who.member_of][who.read_from].tolist()
        positions = batch.scored_positions[batch.read_at].tolist()
        self._append(
            {
                **name,
                **_line(positions[n], int(layers[n]), values[n], int(batch.targets[n])),
                "logprob": trace.answers.logprobs[n],
            }
            for n, request in enumerate(batch.requests.tolist())
            if (name := named(request)) is not None
        )

    def generated(self, run: Generated, requests: Ints, named: Named) -> None:
        """Write a line for each token that was generated.

        Args:
            run: The tokens and where they exited.
            requests: The request of each of the run's rows.
            named: As in `scored`.
        """
        self._append(
            {**name, **_line(position, *each)}
            for row, request in enumerate(requests.tolist())
            if (name := named(request)) is not None
            for position, each in enumerate(
                zip(run.exit_layers[row], run.confidence[row], run.tokens[row], strict=True),
                int(run.prompt_lengths[row]) - 1,
            )
        )

    def _append(self, lines: Iterable[dict[str, object]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def writable(path: str | Path) -> Path:
    """Make sure that a file can be written, before the model is loaded.

    Raises:
        UserError: It cannot.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as err:
        raise UserError(f"exit_log={path} cannot be written: {err.strerror}.") from err
    return path


def _line(position: int, layer: int, value: float, token: int) -> dict[str, object]:
    return {
        "position": position,
        "exit_layer": layer,
        "confidence": None if np.isnan(value) else round(value, 6),
        "token": token,
    }
