"""Training documents: a task's prompts with their right answers, or the text of a file.

    rows of tasks, texts of a file -> shuffled -> token ids -> documents, from each task in turn

A task formats its own rows, by the methods that `lm_eval` scores it with. A row is formatted and
tokenised when its turn comes: a few hundred documents of a large data set cost no more than that.
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections import Counter, deque
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from lm_eval.api.utils import maybe_delimit
from lm_eval.tasks import TaskManager

from spade_eval.errors import UserError, did_you_mean
from spade_eval.fit.rows import blaming, rows_of, shuffled, usable
from spade_eval.lm.pages import token_windows
from spade_eval.scoring import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

    from lm_eval.models.huggingface import HFLM

log = logging.getLogger(__name__)

T = TypeVar("T")
TokenPair = tuple[list[int], list[int]]  # context, continuation


@dataclass(frozen=True)
class Document(Request):
    """A request whose continuation is the right one, from row `doc_id` of a task or file."""

    task: str
    doc_id: int


def from_tasks(
    lm: HFLM,
    names: Sequence[str],
    split: str = "train",
    include_path: str | Path | Sequence[str | Path] | None = None,
    *,
    seed: int = 0,
    most: int | None = None,
) -> list[Document]:
    """Zero-shot prompts of lm-eval tasks, with their right answers.

    Args:
        lm: The model that will read them.
        names: Tasks, groups, tags, wildcards or YAML files, as in `--tasks` of lm-eval.
        split: See `spade_eval.splits.Split`.
        include_path: Folders of further tasks.
        seed: Decides about the order.
        most: Number of documents, over all tasks; None takes all.

    Returns:
        Documents in shuffled order, from each task in turn until it has no more: the first n are
        as balanced as the tasks allow, and the same ones whatever `most` is.

    Raises:
        UserError: An unknown task or split, data that cannot be loaded, no usable row.
    """
    return of_tasks(lm, load_tasks(names, include_path), split, seed=seed, most=most)


def of_tasks(
    lm: HFLM, tasks: dict[str, Any], split: str, *, seed: int = 0, most: int | None = None
) -> list[Document]:
    """`from_tasks` for tasks that are loaded: {name: task}."""
    streams = []
    for name, task in tasks.items():
        rows = rows_of(name, task, split)
        streams.append(_documents(name, rows, partial(right_answer, lm, task), seed))
    return take(streams, most)


def from_text(lm: HFLM, path: Path, *, seed: int = 0) -> Generator[Document, None, None]:
    """The texts of a file in shuffled order, in windows of at most `lm.max_length` tokens.

    Each text becomes tokens when it is its turn, as a corpus may be far more than is needed.

    Args:
        lm: The model that will read them.
        path: `.jsonl` with a "text" on each line, or plain text with blank lines between texts.
        seed: Decides about the order of the texts.

    Raises:
        UserError: The file cannot be read, or has no text.
    """
    with blaming(f"{path} cannot be read as UTF-8 text"):
        content = path.read_text("utf-8-sig")
    if path.suffix == ".jsonl":
        lines = enumerate(content.split("\n"), 1)
        texts = [_json_text(f"{path}, line {n}", line) for n, line in lines if line.strip()]
    else:
        texts = re.split(r"\n\s*\n", content)
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UserError(f"{path} has no text in it.")
    return _documents(path.name, texts, partial(_windows, lm), seed)


def _json_text(place: str, line: str) -> str:
    with blaming(f"{place} is not JSON"):
        row = json.loads(line)
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return row["text"]
    found = f"the keys {', '.join(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
    raise UserError(f'{place} has no string under "text"; found {found}.')


def _documents(
    name: str, rows: Sequence[Any], encode: Callable[[Any], list[TokenPair]], seed: int
) -> Generator[Document, None, None]:
    """Distinct documents in shuffled order; when closed, tells how many rows were left out."""
    seen: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    for doc_id, pairs in usable(name, rows, shuffled(name, len(rows), seed), encode):
        for pair in pairs:
            context, continuation = map(tuple, pair)
            if (context, continuation) not in seen:
                seen.add((context, continuation))
                yield Document(context, continuation, task=name, doc_id=doc_id)


def take(streams: Sequence[Generator[T, None, None]], most: int | None) -> list[T]:
    """One item of each stream in turn."""
    if most is not None and most < 1:
        raise UserError(f"{most} documents are asked for: give a number from 1 up.")
    items: list[T] = []
    turns = deque(streams)
    while turns and len(items) != most:
        if (item := next(turns[0], None)) is None:
            turns.popleft()
        else:
            items.append(item)
            turns.rotate(-1)
    for stream in streams:
        stream.close()
    return items


def enough(
    stream: Iterable[Document], size: Callable[[Document], int], budget: float, share: float
) -> list[Document]:
    """Documents of `budget` tokens, of two texts at least.

    Args:
        stream: All there are, those of a text one after another.
        size: Tokens of one.
        budget: Tokens wanted.
        share: Of the budget; while there are others, no text, which may be a whole book, gives many
            more.
    """
    taken: list[Document] = []
    of_text: Counter[tuple[str, int]] = Counter()
    spared: dict[tuple[str, int], deque[Document]] = {}
    tokens = 0

    def keep(document: Document, source: tuple[str, int]) -> None:
        nonlocal tokens
        taken.append(document)
        of_text[source] += size(document)
        tokens += size(document)

    for document in stream:
        if tokens >= budget and len(of_text) > 1:
            break
        source = document.task, document.doc_id
        if of_text[source] < share * budget:
            keep(document, source)
        elif of_text[source] + sum(map(size, spared.get(source, ()))) < budget:
            spared.setdefault(source, deque()).append(document)
    while tokens < budget and spared:  # there are few texts: each gives the same
        source = min(spared, key=of_text.__getitem__)
        keep(spared[source].popleft(), source)
        if not spared[source]:
            del spared[source]
    return taken


@lru_cache(maxsize=4)
def _manager(folders: tuple[str, ...], files: tuple[tuple[str, int], ...]) -> TaskManager:
    """lm-eval's index of tasks; it parses 13,000 files, which takes seconds.

    Args:
        folders: Of further tasks.
        files: What they hold, and since when.
    """
    return TaskManager(include_path=list(folders) or None)


def task_manager(include_path: Any) -> TaskManager:
    """lm-eval's index of tasks, made once for the same folders with the same files."""
    paths = [include_path] if isinstance(include_path, (str, Path)) else include_path or ()
    folders = [Path(path) for path in paths]
    files = sorted(
        (str(file), file.stat().st_mtime_ns)
        for folder in folders
        for file in folder.rglob("*.yaml")
    )
    return _manager(tuple(map(str, folders)), tuple(files))


def load_tasks(names: Sequence[str], include_path: Any) -> dict[str, Any]:
    """Build the named tasks, each once, in the order of the names.

    Some shuffle their answers as they are built, with the random numbers of the process: each is
    built as `lm_eval --tasks NAME` alone builds it.
    """
    manager = task_manager(include_path)
    tasks: dict[str, Any] = {}
    for name in names:
        found = manager.match_tasks([name]) or ([name] if Path(name).is_file() else [])
        if not found:
            hint = did_you_mean(name, manager.all_tasks)
            raise UserError(f"unknown task {name!r}.{hint} `lm_eval ls tasks` lists lm-eval's own.")
        for spec in found:
            if spec not in tasks:
                with blaming(f"task {spec} cannot be loaded"):
                    _seed_like_lm_eval()
                    tasks.update(manager.load(spec)["tasks"])
    if not tasks:
        raise UserError("no task is named: give at least one.")
    return tasks


def _seed_like_lm_eval() -> None:
    """The defaults of lm-eval's `--seed`, which it sets before it builds tasks."""
    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)


def right_answer(lm: HFLM, task: Any, row: Any) -> list[TokenPair]:
    """Token ids of a row: what the task asks, and the first right answer."""
    prefix = task.doc_to_prefix(row)
    context = task.fewshot_context(row, num_fewshot=0, gen_prefix=prefix)
    requests = task.construct_requests(row, context)
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return _windows(lm, *requests.args)
    if task.OUTPUT_TYPE == "loglikelihood":
        return [token_pair(lm, *requests.args)]
    # Where the choices are contexts, the question is the index of the right one.
    gold = task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row)
    gold = gold[0] if isinstance(gold, list) else gold
    if task.config.doc_to_choice is not None:
        choices = task.doc_to_choice(row)
        if isinstance(gold, str) and gold in choices:
            gold = choices.index(gold)
        if not isinstance(gold, int) or not 0 <= gold < len(choices):
            raise UserError(f"the right answer is {gold!r}, of {len(choices)} choices")
        if task.OUTPUT_TYPE == "multiple_choice":
            # Requests behind those of the choices belong to acc_mutual_info.
            return [token_pair(lm, *requests[gold].args)]
        gold = choices[gold]
    if not isinstance(gold, (str, int, float)):
        raise UserError(f"the right answer is {gold!r}")
    # As lm-eval joins question, prefix and answer in its few-shot examples.
    joined = maybe_delimit(prefix, str(gold))[len(prefix) :] if prefix else None
    return [token_pair(lm, context, joined or f"{task.config.target_delimiter}{gold}")]


def token_pair(lm: HFLM, context: str, continuation: str) -> TokenPair:
    """Token ids as lm-eval's `loglikelihood` makes them."""
    if not continuation.strip():
        raise UserError("the right answer is empty")
    if context:
        before, answer = lm._encode_pair(context, continuation)
    else:
        answer = lm.tok_encode(continuation, add_special_tokens=False)
        before = [lm.prefix_token_id]
        if answer[:1] == before:
            answer = answer[1:]
    if not 0 < len(answer) <= lm.max_length:
        raise UserError(f"the right answer has {len(answer)} tokens (max_length={lm.max_length})")
    return before, answer


def _windows(lm: HFLM, text: str) -> list[TokenPair]:
    """Disjoint windows of a text, as lm-eval's `loglikelihood_rolling` makes them."""
    if not (windows := token_windows(lm, text)):
        raise UserError("the text is empty")
    return windows
