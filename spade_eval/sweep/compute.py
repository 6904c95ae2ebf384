"""The pass that computes: one task through lm-eval, every batch kept."""

from __future__ import annotations

import logging
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lm_eval.api.metrics import weighted_perplexity
from lm_eval.evaluator import evaluate

from spade_eval.errors import UserError
from spade_eval.fit.rows import SPLITS, rows_of, source_of
from spade_eval.splits import Split
from spade_eval.sweep.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from spade_eval.sweep.collected import Collected
    from spade_eval.sweep.lm import SweepLM
    from spade_eval.sweep.settings import SweepSettings

SCORED = ("loglikelihood", "loglikelihood_rolling", "multiple_choice")


def require_scored(tasks: Mapping[str, Any]) -> None:
    """Make sure that all tasks score log-likelihoods.

    Raises:
        UserError: Names those that do not.
    """
    others = [name for name, task in tasks.items() if task.OUTPUT_TYPE not in SCORED]
    if others:
        raise UserError(
            f"{', '.join(others)}: a sweep scores log-likelihoods, and this task asks for "
            "generated text. Leave it out."
        )


def configure(name: str, task: Any, settings: SweepSettings) -> None:
    """Set a task up as lm-eval's command line does, with the documents of the asked split."""
    shared = False
    if settings.split is not None:
        rows = rows_of(name, task, settings.split)
        shared = _draw_no_document_for_itself(task, settings.split)
        # lm-eval evaluates the test's documents where there are any.
        task.has_test_docs = lambda: True
        task.test_docs = lambda: rows
    own = task.get_config("num_fewshot")
    if settings.num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=settings.num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    shots = task.get_config("num_fewshot")
    if shared and shots >= len(task.sampler.df):
        raise UserError(
            f"task {name}: prompts of {shots} examples are drawn from {len(task.sampler.df)} rows, "
            f"which are those of split={settings.split!r}, each without itself. Give fewer "
            "(--num_fewshot), or another split."
        )
    task.set_fewshot_seed(seed=settings.seed)


def _draw_no_document_for_itself(task: Any, split: str) -> bool:
    """Keep documents of a split out of their own few-shot prompts.

    lm-eval does that where examples come from the test split, and this split takes its place.

    Returns:
        Whether the examples come from this split.
    """
    config, examples = task.config, task.fewshot_cfg
    source = examples.split
    if source is None and not examples.samples:
        has = [s for s, theirs in SPLITS.items() if getattr(task, f"has_{theirs}_docs")()]
        source = source_of(task, has[0])  # lm-eval's own rule
    shared = source == source_of(task, Split.parse(split).name)
    if shared:
        examples.split = config.test_split = source
    return shared


def compute(lm: SweepLM, name: str, task: Any, folder: Path, settings: SweepSettings) -> Collected:
    """The pass that computes: every batch of a task, or what the store has of it."""
    keep_states = settings.keep_states and task.OUTPUT_TYPE == "multiple_choice"
    collected = lm.begin(Store(folder, (lm.rank, lm.world_size)), keep_states)
    with quiet(), unbounded(task):
        evaluate(
            lm,
            {"tasks": {name: task}, "groups": {}, "group_map": {}},
            limit=settings.limit,
            log_samples=False,
            bootstrap_iters=0,
            apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=settings.apply_chat_template,
        )
    return collected


@contextmanager
def quiet() -> Iterator[None]:
    """lm-eval reports each call of `evaluate`; a sweep makes hundreds."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def unbounded(task: Any) -> Iterator[None]:
    """Let perplexities of texts overflow to infinity, where lm-eval raises."""
    by_metric = {
        metric: _perplexity if aggregate is weighted_perplexity else aggregate
        for metric, aggregate in task.aggregation().items()
    }
    task.aggregation = lambda: by_metric
    try:
        yield
    finally:
        del task.aggregation


def _perplexity(items: Any) -> float:
    try:
        return weighted_perplexity(items)
    except OverflowError:  # 710 nats a word: an early lens on a script that many tokens spell
        return math.inf
