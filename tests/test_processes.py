"""Two processes that share the documents, over gloo on CPU: what one process finds alone.

lm-eval splits documents over the processes of `accelerate launch` on GPUs only, so rank and number
of processes are set here on the model, as it would set them.
"""

from __future__ import annotations

import functools
import json
import os
import socket
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file
from test_lm import build
from test_sweep import ask, lens

from spade_eval.arguments import tasks_path
from spade_eval.fit import documents
from spade_eval.fit.run import fit
from spade_eval.fit.settings import FitSettings
from spade_eval.lm.base import SpadeLM
from spade_eval.lm.exit import SpadeExitLM
from spade_eval.sweep.lm import SweepLM
from spade_eval.sweep.run import sweep
from spade_eval.sweep.settings import SweepSettings

TASKS = ("spade_mini_science", "spade_mini_articles")
LIMIT = 5  # an odd number: lm-eval asks the second process for a sixth document


def _work(rank: int, count: int, port: int, root: str) -> None:
    """Everything that processes share, in one of them."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # accelerate meets on GPUs if there are any
    accelerator = None
    if count > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        accelerator = Accelerator(cpu=True)
        assert accelerator.num_processes == count
    torch.set_num_threads(1)
    manager = functools.partial(TaskManager, include_defaults=False)
    documents.TaskManager = manager  # type: ignore[misc]  # the index of all tasks takes seconds

    def made(cls: Any, **kwargs: Any) -> Any:
        lm = build(cls, max_length=255, **kwargs)
        lm._rank, lm._world_size = rank, count
        if accelerator is not None:
            lm.accelerator = accelerator
        return lm

    folder = Path(root)
    lm = made(SpadeExitLM, lens=lens("l_spade", 1), interval=1, min_layer=1, threshold=3.9)
    index = manager(include_path=str(tasks_path()))
    found = simple_evaluate(lm, tasks=[TASKS[0]], limit=LIMIT, task_manager=index)
    if rank == 0 and found is not None:
        told = {"results": found["results"], "spade": lm.get_model_info()["spade"]}
        (folder / "exits.json").write_text(json.dumps(told, default=str))

    few = ask(scopes=("context",), thresholds=(3.5, 3.9))
    lm = made(SweepLM, ask=few, maps=[("x", lens("l_spade", 1))])
    settings = SweepSettings(
        folder / "sweep", TASKS, few, limit=LIMIT, log_samples=True, keep_states=True
    )
    sweep(lm, documents.load_tasks(TASKS, tasks_path()), settings)

    lm = made(SpadeLM)
    for decoder in ("l_spade", "tuned_lens"):
        given = FitSettings(decoder, folder / decoder, tasks=TASKS[:1], max_positions=300, epochs=2)
        fit(lm, given, include_path=tasks_path())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What one process writes, and what two do."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for folder, count in ((one, 1), (two, 2)):
        torch.multiprocessing.spawn(_work, args=(count, port, str(folder)), nprocs=count)
    return one, two


def test_exits_have_one_account(runs: tuple[Path, Path]) -> None:
    one, two = (json.loads((folder / "exits.json").read_text()) for folder in runs)
    assert (one["spade"]["ranks_counted"], two["spade"]["ranks_counted"]) == (1, 2)
    scores = [
        {name: value for name, value in run["results"][TASKS[0]].items() if "," in name}
        for run in (one, two)
    ]
    assert scores[0] == pytest.approx(scores[1])
    alone, both = (run["spade"]["account"]["tasks"][TASKS[0]] for run in (one, two))
    # Which contexts share a row, and so how many layers a row climbs, is another matter.
    for key in ("requests", "positions_scored", "exits", "mean_exit_layer", "check_token_layers"):
        assert alone[key] == both[key], key
    assert len(alone["exits"]) > 1


def test_sweeps_have_the_same_cells(runs: tuple[Path, Path]) -> None:
    tables, samples = (
        [pd.read_parquet(folder / "sweep" / f"{name}.parquet") for folder in runs]
        for name in ("sweep", "samples")
    )
    # How much is computed depends on which contexts share a row.
    one, two = (table.drop(columns=["seconds", "token_layer_ratio"]) for table in tables)
    pd.testing.assert_frame_equal(one, two, rtol=1e-4, check_dtype=False)
    order = [name for name in samples[0] if name not in ("loglikelihood", "is_greedy")]
    ours, theirs = (frame.sort_values(order, ignore_index=True) for frame in samples)
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-4, atol=1e-4, check_dtype=False)
    states, others = (
        load_file(folder / "sweep" / f"states_{TASKS[0]}.safetensors") for folder in runs
    )
    assert torch.equal(states["labels"], others["labels"])
    torch.testing.assert_close(states["states"], others["states"], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("decoder", ["l_spade", "tuned_lens"])
def test_maps_are_the_same(decoder: str, runs: tuple[Path, Path]) -> None:
    one, two = (load_file(folder / decoder / "model.safetensors") for folder in runs)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-5)
    configs = [json.loads((folder / decoder / "config.json").read_text()) for folder in runs]
    for key in ("documents", "n_positions", "tokens", "layers", "fingerprint"):
        assert configs[0][key] == configs[1][key]
