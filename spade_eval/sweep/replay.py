"""Every cell through lm-eval's own task code: its metrics, aggregation and standard errors.

The requests of a task are built once, by the pass that computes. For each cell lm-eval's
`evaluate` runs again with a model that answers from what the pass has kept.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from spade_eval.sweep.collected import Call
    from spade_eval.sweep.lm import SweepLM


class Replay(LM):
    """Answers lm-eval's instances from kept log-likelihoods, as one cell of a sweep gave them.

    Args:
        lm: The model of the sweep; its processes stay in step.
        calls: What it has kept.

    Attributes:
        cell: Row of the kept arrays that answers.
    """

    def __init__(self, lm: SweepLM, calls: Sequence[Call]):
        super().__init__()
        self._lm, self._rank, self._world_size = lm, lm.rank, lm.world_size
        self.cell = 0
        # A text's instance has a place for each window. Any other that was asked again, to keep
        # processes in step, has several too: its first one counts.
        self._places: dict[int, tuple[Call, list[int]]] = {}
        for call in calls:
            owners: dict[int, list[int]] = {}
            for index, instance in enumerate(call.instances):
                owners.setdefault(id(instance), []).append(index)
            for instance, places in owners.items():
                self._places[instance] = (call, places)

    @property
    def device(self) -> Any:
        """Where lm-eval puts the counts that processes exchange."""
        return self._lm.device

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The cell's log-likelihoods, and whether each continuation is the greedy one."""
        found = []
        for request in requests:
            call, places = self._places[id(request)]
            at = places[0]
            found.append((float(call.logprobs[self.cell, at]), bool(call.greedy[self.cell, at])))
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """The cell's log-likelihoods of whole texts; a text without tokens has none."""
        found = []
        for request in requests:
            call, places = self._places.get(id(request), (None, []))
            found.append(0.0 if call is None else float(call.logprobs[self.cell, places].sum()))
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Sweeps refuse tasks that generate before they load a model."""
        raise NotImplementedError

    def all_gather(self, tensor: Any) -> Any:
        """As the sweep's model does."""
        return self._lm.all_gather(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> Any:
        """As the sweep's model does."""
        return self._lm.gather_object(obj, dst)

    def barrier(self) -> None:
        """As the sweep's model does."""
        self._lm.barrier()


@contextmanager
def requests_kept(task: Any) -> Iterator[None]:
    """Let lm-eval's `evaluate` find a task's requests as they are, without their answers."""

    def forget(**_: Any) -> None:
        for instance in task.instances:
            instance.resps, instance.filtered_resps = [], {}

    task.build_all_requests = forget
    try:
        yield
    finally:
        del task.build_all_requests


def metrics(
    lm: LM,
    name: str,
    task: Any,
    limit: float | None,
    samples: bool = False,
    bootstrap_iters: int = 0,
) -> tuple[dict[str, tuple[float, float | None]], int, list[dict[str, Any]]] | None:
    """Evaluate a task by lm-eval.

    Args:
        lm: What answers.
        name: The task's name.
        task: The task.
        limit: Documents, as lm-eval's `--limit`.
        samples: Whether lm-eval's samples are wanted.
        bootstrap_iters: As lm-eval's; 0 leaves out all standard errors.

    Returns:
        Value and standard error of each metric, the number of documents, the samples; None on all
        processes but the first. A filter other than "none" is part of a metric's name.
    """
    results = evaluate(
        lm,
        {"tasks": {name: task}, "groups": {}, "group_map": {}},
        limit=limit,
        log_samples=samples,
        bootstrap_iters=bootstrap_iters,
    )
    if results is None:
        return None
    found: dict[str, tuple[float, float | None]] = {}
    own = results["results"][name]
    for entry, value in own.items():
        metric, comma, filter_ = entry.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = own.get(f"{metric}_stderr,{filter_}")
        label = metric if filter_ == "none" else f"{metric},{filter_}"
        found[label] = (float(value), float(error) if isinstance(error, (int, float)) else None)
    n = results["n-samples"][name]["effective"]
    return found, n, (results.get("samples") or {}).get(name, [])
