"""The default model on the official benchmark files: the same numbers as `--model hf`, and known
ones below L.

The files stand in `../shared/data` beside the repository; without them these tests are skipped.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import datasets
import pytest
import torch
from conftest import ROOT
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from test_decoders import naive_tail
from transformers import AutoModelForCausalLM, AutoTokenizer

from spade_eval.lm.layer import LogitLensLM, SpadeLayerLM

if TYPE_CHECKING:
    from pathlib import Path

SHARED = ROOT.parent / "shared"
TASKS = ROOT / "tasks"
real_data = [
    pytest.mark.real_data,
    pytest.mark.skipif(
        not (SHARED / "data").is_dir(),
        reason="the official benchmark files (../shared/data) are not on this machine",
    ),
]


@pytest.fixture(scope="session")
def hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Hugging Face cache with the official files, in use for the whole session."""
    home = tmp_path_factory.mktemp("hf")
    subprocess.run(
        [sys.executable, str(SHARED / "tools" / "build_hf_cache.py"), str(home)],
        check=True,
        capture_output=True,
    )
    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, home / "datasets"
    yield home
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="session")
def loaded(default_model_dir: Path) -> dict[str, Any]:
    """The default model in fp32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(default_model_dir, dtype=torch.float32).eval()
    return {"pretrained": model, "tokenizer": AutoTokenizer.from_pretrained(default_model_dir)}


def evaluate(lm: Any, tasks: list[str], limit: int, **kwargs: Any) -> dict[str, Any]:
    return simple_evaluate(
        model=lm,
        tasks=tasks,
        limit=limit,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(TASKS)),
        **kwargs,
    )


def compare(ours: dict[str, Any], theirs: dict[str, Any], atol: float) -> None:
    """Equal metrics, greedy flags and, up to `atol`, log-likelihoods."""
    assert ours["samples"].keys() == theirs["samples"].keys()
    for task, samples in theirs["samples"].items():
        for mine, other in zip(ours["samples"][task], samples, strict=True):
            assert mine["doc_id"] == other["doc_id"]
            for a, b in zip(mine["filtered_resps"], other["filtered_resps"], strict=True):
                a, b = (
                    a if isinstance(a, tuple) else (a, None),
                    b if isinstance(b, tuple) else (b, None),
                )
                assert bool(a[1]) == bool(b[1])
                # hf adds a page up in fp32, whose spacing at a few thousand nats is 2.4e-4.
                assert a[0] == pytest.approx(float(b[0]), abs=atol, rel=2e-7)
        for metric, value in theirs["results"][task].items():
            if isinstance(value, float):
                assert ours["results"][task][metric] == pytest.approx(value, rel=1e-6)


RUNS = {
    "text answers and yes/no": (["arc_easy", "arc_challenge", "boolq", "headqa_en", "headqa_es"], 3, {}),
    "few-shot": (["arc_easy", "headqa_en"], 2, {"num_fewshot": 2}),
    "chat template": (["arc_easy", "boolq"], 2, {"apply_chat_template": True}),
    "letters, few-shot": (["spade_paper"], 2, {"num_fewshot": 1}),
    "pages": (["wikitext"], 1, {}),
}  # fmt: skip


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.usefixtures("hub_cache")
class TestOfficialData:
    pytestmark = real_data

    def test_at_the_last_layer_results_are_those_of_hf(self, run: str, loaded: dict) -> None:
        tasks, limit, kwargs = RUNS[run]
        settings = loaded | {"batch_size": 8, "max_length": 512 if run == "pages" else None}
        theirs = evaluate(HFLM(**settings), tasks, limit, **kwargs)
        for cls, sharing in [(SpadeLayerLM, True), (LogitLensLM, False)]:
            lm = cls(layer=-1, logits_cache=sharing, **settings)
            compare(evaluate(lm, tasks, limit, **kwargs), theirs, atol=1e-4)


def test_built_in_tasks_give_what_hf_gives(loaded: dict) -> None:
    """One-token answers in several tasks at once, as in MMLU, and whole texts."""
    tasks, settings = ["spade_mini"], loaded | {"batch_size": 8, "max_length": 512}
    theirs = evaluate(HFLM(**settings), tasks, 3, num_fewshot=1)
    compare(evaluate(SpadeLayerLM(layer=-1, **settings), tasks, 3, num_fewshot=1), theirs, 1e-4)


# ---------------------------------------------------------------- golden numbers

# First 50 ARC-Easy test items, stock prompt, fp32: accuracy, and mean log-likelihood per token of
# the right answer.
GOLDEN = {
    ("spade", 10): (0.26, -6.418),
    ("spade", 22): (0.42, -4.895),
    ("spade", 30): (0.46, -4.165),
    ("logit_lens", 10): (0.26, -23.294),
    ("logit_lens", 22): (0.26, -22.017),
}


def mean_gold(results: dict[str, Any], tokenizer: Any) -> float:
    """Mean log-likelihood per token of the right answers, in nats."""
    total, tokens = 0.0, 0
    for sample in results["samples"]["arc_easy"]:
        context, answer = sample["arguments"][sample["target"]]
        total += sample["filtered_resps"][sample["target"]][0]
        tokens += len(tokenizer.encode(context + answer)) - len(tokenizer.encode(context))
    return total / tokens


@pytest.mark.parametrize(("decoder", "layer"), GOLDEN)
@pytest.mark.usefixtures("hub_cache")
class TestGolden:
    pytestmark = real_data

    def test_known_numbers(self, decoder: str, layer: int, loaded: dict) -> None:
        cls = {"spade": SpadeLayerLM, "logit_lens": LogitLensLM}[decoder]
        results = evaluate(cls(layer=layer, batch_size=16, **loaded), ["arc_easy"], 50)
        accuracy, gold = GOLDEN[decoder, layer]
        assert results["results"]["arc_easy"]["acc,none"] == pytest.approx(accuracy, abs=0.021)
        assert mean_gold(results, loaded["tokenizer"]) == pytest.approx(gold, abs=0.01)


@pytest.mark.parametrize("layer", [10, 22])
@pytest.mark.usefixtures("hub_cache")
class TestNaive:
    pytestmark = real_data

    def test_scores_of_real_questions_are_those_of_the_naive_loop(
        self, layer: int, loaded: dict
    ) -> None:
        """The model's own states, and for each answer token two tokens through the upper layers."""
        model, tokenizer = loaded["pretrained"], loaded["tokenizer"]
        with (SHARED / "data" / "ARC-Easy.test.jsonl").open(encoding="utf-8") as f:
            rows = [json.loads(next(f)) for _ in range(3)]
        results = evaluate(SpadeLayerLM(layer=layer, batch_size=4, **loaded), ["arc_easy"], 3)
        for row, sample in zip(rows, results["samples"]["arc_easy"], strict=True):
            assert sample["doc"]["id"] == row["id"]
            context = f"Question: {row['question']}\nAnswer:"
            for choice, (ours, _) in zip(
                row["choices"]["text"], sample["filtered_resps"], strict=True
            ):
                n = len(tokenizer.encode(context))
                ids = torch.tensor([tokenizer.encode(f"{context} {choice}")])
                with torch.no_grad():
                    out = model(ids[:, :-1], output_hidden_states=True, use_cache=False)
                    expected = sum(
                        naive_tail(model, list(out.hidden_states), 0, at, layer, ids, [0, 1], True)
                        .log_softmax(-1)[ids[0, at + 1]]
                        .item()
                        for at in range(n - 1, ids.shape[1] - 1)
                    )
                assert ours == pytest.approx(expected, abs=2e-4)
