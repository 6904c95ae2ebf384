"""The small data sets of `data/`, for machines with neither network nor cache.

The harness calls a loader with the metadata of its task, into which it has merged all model
arguments. So a loader takes any keyword and reads none: no model argument can change the data or
clash with a parameter.
"""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset, DatasetDict

_DATA = Path(__file__).parent / "data"
_SPLITS = ("train", "validation", "test")


def science(**_: object) -> DatasetDict:
    """Four-choice science questions, with the columns of ARC."""
    return _load("science")


def yesno(**_: object) -> DatasetDict:
    """Yes/no questions about a passage, with the columns of BoolQ."""
    return _load("yesno")


def health(**_: object) -> DatasetDict:
    """Four-choice health questions, with the columns of HEAD-QA."""
    return _load("health")


def articles(**_: object) -> DatasetDict:
    """Short articles, one `page` each."""
    return _load("articles")


def _load(name: str) -> DatasetDict:
    """Read `data/{name}.{split}.jsonl` into memory, past the cache of `datasets`."""
    return DatasetDict({split: _read(_DATA / f"{name}.{split}.jsonl") for split in _SPLITS})


def _read(path: Path) -> Dataset:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: it belongs to this package, so the installation is incomplete; "
            "install spade_eval again"
        )
    with path.open(encoding="utf-8") as lines:
        return Dataset.from_list([json.loads(line) for line in lines if line.strip()])
