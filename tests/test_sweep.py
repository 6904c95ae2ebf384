"""A sweep's cells against separate runs of the models they stand for, on tiny models."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import simple_evaluate
from test_lm import build, instances, model, task_pairs, text
from zoo import byte_tokenizer

from spade_eval.arguments import tasks_path
from spade_eval.cli import main
from spade_eval.errors import UserError
from spade_eval.fingerprint import fingerprint
from spade_eval.fit.documents import load_tasks, task_manager
from spade_eval.fit.rows import SPLITS
from spade_eval.lens import LinearLens
from spade_eval.lens_config import LensConfig
from spade_eval.lm.exit import LensExitLM, SpadeExitLM
from spade_eval.lm.layer import LogitLensLM, LSpadeLM, SpadeLayerLM, TunedLensLM
from spade_eval.report.spaces import read_states
from spade_eval.sweep import contexts, table
from spade_eval.sweep.collected import Call, Collected
from spade_eval.sweep.command import layers, named, summary
from spade_eval.sweep.compute import configure, require_scored
from spade_eval.sweep.grid import IDENTITY, Ask, Reading, grid, thresholds
from spade_eval.sweep.lm import SweepLM
from spade_eval.sweep.run import sweep
from spade_eval.sweep.samples import samples_of
from spade_eval.sweep.settings import SweepSettings
from spade_eval.sweep.store import Store

pytestmark = pytest.mark.usefixtures("one_thread")

ATOL = 1e-4
LAYERS = 4


def lens(
    kind: str, seed: int, family: str = "llama", at: tuple[int, ...] = (1, 2, 3)
) -> LinearLens:
    """Random maps for the model of `build`."""
    mark = fingerprint(model(family))
    made = LinearLens(LensConfig(kind, family, LAYERS, 32, at, fingerprint=mark))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    for layer in at:
        weight = torch.randn(32, 32, generator=generator) * 0.1
        made.set_map(layer, weight, torch.randn(32, generator=generator) * 0.1)
    return made


def ask(**kwargs: Any) -> Ask:
    every: dict[str, Any] = {
        "thresholds": (3.0, 4.2, -1.0),
        "confidences": ("entropy", "choice_entropy"),
        "scopes": ("context", "token", "request"),
        "interval": 1,
        "min_layer": 1,
    }
    return Ask(**(every | kwargs))


MAPS = [("x", lens("l_spade", 1)), ("y", lens("l_spade", 2)), ("x", lens("tuned_lens", 3))]


def alone(columns: dict[str, Any], family: str, maps: dict[Any, LinearLens], **kwargs: Any) -> Any:
    """The model that a cell stands for."""
    decoder, name = columns["decoder"], columns["lens_data"]
    if "threshold" in columns:
        kind, _, own = name.rpartition(":")
        source: Any = maps[kind or "l_spade", own] if name != IDENTITY else "identity"
        arguments = {k: columns[k] for k in ("threshold", "confidence", "readout", "exit_scope")}
        cls = SpadeExitLM if decoder == "spade_exit" else LensExitLM
        return build(cls, family, lens=source, interval=1, min_layer=1, **arguments, **kwargs)
    layer = columns["layer"]
    if decoder in ("l_spade", "tuned_lens"):
        cls = LSpadeLM if decoder == "l_spade" else TunedLensLM
        return build(cls, family, layer=layer, lens=maps[decoder, name], **kwargs)
    if decoder in ("logit_lens", "full"):
        return build(LogitLensLM, family, layer=layer, **kwargs)
    start = "keep" if decoder == "spade" else "none"
    return build(SpadeLayerLM, family, layer=layer, start=start, **kwargs)


def compare(
    found: Any, call: Any, separate: Any, requests: list[Any], rolling: bool, most: int
) -> int:
    """Compare some cells with their own runs; returns how many there are."""
    cells = table.cells(found.grid, rolling)
    for columns, cell in random.Random(most).sample(cells, min(most, len(cells))):
        lm = separate(columns)
        if rolling:
            theirs = np.array(lm.loglikelihood_rolling(requests))
            ours = np.zeros(len(requests))
            places = {id(request): i for i, request in enumerate(requests)}
            at = [places[id(instance)] for instance in call.instances]
            np.add.at(ours, at, call.logprobs[cell])
        else:
            answers = lm.loglikelihood(requests)
            theirs = np.array([value for value, _ in answers])
            ours = call.logprobs[cell]
            assert call.greedy[cell].tolist() == [greedy for _, greedy in answers], columns
        np.testing.assert_allclose(
            ours, theirs, atol=ATOL * (3 if rolling else 1), rtol=0, err_msg=str(columns)
        )
        cost = table.cost(found.collected.accounts[cell], columns)
        report = lm.account.report()
        assert cost["token_layer_ratio"] == report["token_layer_ratio"], columns
        if "threshold" in columns:
            assert cost["mean_exit_layer"] == report["mean_exit_layer"], columns
    return len(cells)


@pytest.mark.parametrize(
    ("family", "packed", "most"),
    [
        ("llama", True, 60),
        ("llama", False, 20),
        ("mistral_sliding", True, 20),
        ("gpt2", True, 20),
        ("qwen3_5", True, 20),
    ],
)
def test_cells_are_those_of_separate_runs(
    family: str, packed: bool, most: int, tmp_path: Path
) -> None:
    maps = {
        ("l_spade", "x"): lens("l_spade", 1, family),
        ("tuned_lens", "x"): lens("tuned_lens", 3, family),
    }
    named_maps = [(name, found) for (_, name), found in maps.items()]
    lm = build(SweepLM, family, ask=ask(), maps=named_maps, logits_cache=packed)
    collected = lm.begin(Store(tmp_path, (0, 1)))
    requests = instances(task_pairs())
    lm.loglikelihood(requests)

    def separate(columns: dict[str, Any]) -> Any:
        return alone(columns, family, maps, logits_cache=packed)

    checked = compare(lm, collected.calls[0], separate, requests, rolling=False, most=most)
    # Layers 0..4 of three decoders, 1..4 of two lenses, the model itself; per scope and threshold
    # SPADE, L-SPADE, tuned lens and logit lens, and again for the entropy over choices.
    assert checked == 1 + 3 * 5 + 2 * 4 + (3 + 1) * 3 * 4


def test_whole_texts_decide_by_token(tmp_path: Path) -> None:
    rng = random.Random(1)
    pages = instances([(text(rng, n),) for n in (40, 3, 25, 1)], "loglikelihood_rolling")
    lm = build(SweepLM, ask=ask(), maps=MAPS)
    collected = lm.begin(Store(tmp_path, (0, 1)))
    lm.loglikelihood_rolling(pages)
    maps = {(found.config.decoder, name): found for name, found in MAPS}
    checked = compare(
        lm, collected.calls[0], lambda c: alone(c, "llama", maps), pages, rolling=True, most=30
    )
    assert checked == 1 + 3 * 5 + 3 * 4 + 3 * (2 + 3 + 1)  # one scope, no entropy over choices


def test_positions_are_kept_on_request(tmp_path: Path) -> None:
    lm = build(SweepLM, ask=ask(thresholds=()), positions="keep")
    collected = lm.begin(Store(tmp_path, (0, 1)))
    requests = instances(task_pairs())
    lm.loglikelihood(requests)
    cell = lm.grid.index(Reading("spade", "", 2))
    alone_ = build(SpadeLayerLM, layer=2, positions="keep").loglikelihood(requests)
    np.testing.assert_allclose(collected.calls[0].logprobs[cell], [x for x, _ in alone_], atol=ATOL)
    reset = build(SpadeLayerLM, layer=2).loglikelihood(requests)
    assert np.abs(collected.calls[0].logprobs[cell] - [x for x, _ in reset]).max() > 0.01


# ---------------------------------------------------------------- through lm-eval

TASKS = ("spade_mini_science", "spade_mini_articles")


def settings(output: Path, **kwargs: Any) -> SweepSettings:
    few = ask(scopes=("context",), confidences=("entropy",), thresholds=(3.0, 4.0))
    return SweepSettings(**({"output": output, "tasks": TASKS, "ask": few, "limit": 3} | kwargs))


def run(
    output: Path, names: tuple[str, ...] = TASKS, lm: Any = None, **kwargs: Any
) -> pd.DataFrame:
    once = {k: kwargs.pop(k) for k in ("resume", "overwrite") if k in kwargs}
    wanted = settings(output, **kwargs)
    lm = lm or build(SweepLM, ask=wanted.ask, maps=MAPS, max_length=255)
    found = sweep(lm, load_tasks(names, tasks_path()), wanted, command="spade-eval sweep", **once)
    assert found is not None
    return found


def test_metrics_and_their_errors_are_lm_evals(tmp_path: Path) -> None:
    found = run(tmp_path / "out")
    assert list(found.columns) == list(table.COLUMNS)
    manager = task_manager(tasks_path())
    maps = {(made.config.decoder, name): made for name, made in MAPS}
    fixed = found[(found["decoder"] == "spade") & (found["layer"] == 2)]
    exits = found[
        (found["decoder"] == "spade_exit")
        & (found["threshold"] == 3.0)
        & (found["lens_data"] == "y")
    ]
    for rows in (fixed, exits):
        columns = {
            k: v
            for k, v in rows.iloc[0].items()
            if k
            in ("decoder", "lens_data", "layer", "threshold", "confidence", "readout", "exit_scope")
            and not pd.isna(v)
        }
        lm = alone(columns, "llama", maps, max_length=255)
        theirs = simple_evaluate(lm, tasks=list(TASKS), limit=3, task_manager=manager)
        assert theirs is not None
        for row in rows.to_dict("records"):
            own = theirs["results"][row["task"]]
            assert row["value"] == pytest.approx(own[f"{row['metric']},none"], rel=ATOL)
            error = own[f"{row['metric']}_stderr,none"]
            if isinstance(error, float):
                assert row["stderr"] == pytest.approx(error, rel=ATOL)
            else:
                assert pd.isna(row["stderr"])
        counted = {
            task: {row["metric"] for row in rows.to_dict("records") if row["task"] == task}
            for task in TASKS
        }
        for task, names in counted.items():
            own = {
                k.split(",")[0]
                for k, v in theirs["results"][task].items()
                if "," in k and "_stderr" not in k
            }
            assert names == own


def test_a_perplexity_may_overflow(tmp_path: Path) -> None:
    """Some thousand nats a word, as an early lens may need: lm-eval's own aggregation raises."""
    network = copy.deepcopy(model())
    network.lm_head.weight.data *= 1e4
    few = ask(layers=(2,), decoders=("logit_lens",), thresholds=())
    lm = SweepLM(pretrained=network, tokenizer=byte_tokenizer(), ask=few, max_length=255)
    whole = run(tmp_path / "out", (TASKS[1],), lm, ask=few)
    assert re.search(r"logit_lens +inf$", summary(whole), re.MULTILINE)
    large = whole.assign(value=9.4e10)
    assert re.search(r"logit_lens +9\.40e\+10$", summary(large), re.MULTILINE)
    found = whole.set_index("metric")["value"]
    assert np.isinf(found["word_perplexity"]).all()
    assert np.isfinite(found["bits_per_byte"]).all()
    assert np.isinf(pd.read_csv(tmp_path / "out/sweep.csv")["value"]).any()
    assert main(["report", str(tmp_path / "out"), "--output", str(tmp_path / "report")]) == 0


def test_errors_without_a_formula_take_the_iterations_that_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ask(layers=(2,), decoders=("logit_lens",), thresholds=())
    asked = []

    def bootstrapped(metric: Any, bootstrap_iters: int) -> Any:
        asked.append(bootstrap_iters)

    monkeypatch.setattr("lm_eval.evaluator_utils.stderr_for_metric", bootstrapped)
    for n, options in enumerate(({}, {"bootstrap_iters": 7})):
        lm = build(SweepLM, ask=few, max_length=255)
        run(tmp_path / f"{n}", TASKS[:1], lm, ask=few, **options)
        assert set(asked) == {1000 if n == 0 else 7}
        asked.clear()


def test_the_files_hold_the_table(tmp_path: Path) -> None:
    found = run(tmp_path / "out", log_samples=True)
    again = pd.read_parquet(tmp_path / "out/sweep.parquet")
    pd.testing.assert_frame_equal(found, again, check_dtype=False)
    csv = pd.read_csv(tmp_path / "out/sweep.csv", keep_default_na=False, na_values={"value": [""]})
    assert list(csv.columns) == list(table.COLUMNS)
    assert len(csv) == len(found)
    record = json.loads((tmp_path / "out/sweep.json").read_text())
    assert record["n_layers"] == LAYERS
    assert set(record["tasks"]) == set(TASKS)
    assert record["machine"].keys() == {"cpu"}
    samples = pd.read_parquet(tmp_path / "out/samples.parquet")
    one = samples[(samples["decoder"] == "full") & (samples["task"] == TASKS[0])]
    best = (
        one.sort_values(["doc_id", "request"])
        .groupby("doc_id")["loglikelihood"]
        .apply(lambda x: int(np.argmax(x)))
    )
    task = load_tasks([TASKS[0]], tasks_path())[TASKS[0]]
    docs = list(task.eval_docs)[:3]
    hits = [best[i] == task.doc_to_target(doc) for i, doc in enumerate(docs)]
    row = found[
        (found["decoder"] == "full") & (found["task"] == TASKS[0]) & (found["metric"] == "acc")
    ]
    assert row["value"].item() == pytest.approx(np.mean(hits))
    assert not (tmp_path / ".out.sweep").exists()


def test_the_record_is_about_each_task_and_each_lens(tmp_path: Path) -> None:
    sources = {}
    for name, made in MAPS:
        folder = tmp_path / f"{made.config.decoder}-{name}"
        made.save_pretrained(folder)
        sources[str(folder)] = name
    few = settings(tmp_path).ask
    maps = [(name, folder) for folder, name in sources.items()]
    lm = build(SweepLM, ask=few, maps=maps, max_length=40)
    run(tmp_path / "out", lm=lm)
    record = json.loads((tmp_path / "out/sweep.json").read_text())
    assert {about["lens"] for about in record["sweep"]["lenses"].values()} == set(sources)
    each = [about["truncated_requests"] for about in record["tasks"].values()]
    assert min(each[:1]) > 0  # the questions are longer than 40 tokens
    assert sum(each) == lm.account.truncated_requests


def test_the_kept_states_are_the_models_where_contexts_end(tmp_path: Path) -> None:
    few = ask(scopes=("context",), layers=(2,), decoders=("logit_lens",), thresholds=())
    lm = build(SweepLM, ask=few, max_length=255)
    run(tmp_path / "out", lm=lm, ask=few, keep_states=True)
    assert [p.name for p in (tmp_path / "out").glob("states_*")] == [
        f"states_{TASKS[0]}.safetensors"
    ]
    path = tmp_path / "out" / f"states_{TASKS[0]}.safetensors"
    assert path.stat().st_mode == (tmp_path / "out/sweep.json").stat().st_mode
    kept = read_states(path)
    task = load_tasks([TASKS[0]], tasks_path())[TASKS[0]]
    docs = list(task.eval_docs)[:3]
    assert kept.labels.tolist() == [task.doc_to_target(doc) for doc in docs]
    assert kept.answers() == [task.doc_to_choice(doc)[task.doc_to_target(doc)] for doc in docs]
    assert kept.states.shape == (LAYERS + 1, 3, 32)
    network = model("llama")
    for n, doc in enumerate(docs):
        ids = torch.tensor([lm.tok_encode(task.doc_to_text(doc))])
        with torch.no_grad():
            own = network(ids, output_hidden_states=True).hidden_states
        ours = torch.from_numpy(kept.states[:, n])
        for layer in range(LAYERS):
            torch.testing.assert_close(ours[layer], own[layer][0, -1], atol=2e-3, rtol=2e-3)
        normed = network.model.norm(ours[LAYERS])  # transformers gives the last one normalised
        torch.testing.assert_close(normed, own[LAYERS][0, -1], atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize(
    ("answers", "shown"),
    [
        ([(1, "yes"), (0, "no"), (1, "yes"), (0, "no")], ["yes", "no", "yes", "no"]),
        ([(1, "an ox"), (0, "a fox"), (1, "an eel"), (0, "a fox")], ["B", "A", "B", "A"]),
        ([(1, "an ox"), (0, "a fox"), (0, "a fox"), (2, "an eel")], ["B", "A", "A", "C"]),
        ([(1, "that it is so of it"), (0, "no")] * 2, ["B", "A", "B", "A"]),
        ([(1, ""), (0, "no")] * 2, ["B", "A", "B", "A"]),
        ([(1, "no"), (0, "no")] * 2, ["B", "A", "B", "A"]),
    ],
)
def test_answers_are_named_where_all_documents_call_them_so(
    answers: list[tuple[int, str]], shown: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "states_task.safetensors"
    states = {n: np.zeros((2, 4), np.float16) for n in range(4)}
    contexts.write(path, states, dict(enumerate(answers)))
    assert read_states(path).answers() == shown


def test_a_split_takes_its_documents(tmp_path: Path) -> None:
    few = ask(scopes=("context",), layers=(2,), decoders=("logit_lens",), thresholds=())
    found = {}
    for split in (None, "test", "validation"):
        lm = build(SweepLM, ask=few, max_length=255)
        run(tmp_path / f"{split}", TASKS[:1], lm, ask=few, split=split, log_samples=True)
        samples = pd.read_parquet(tmp_path / f"{split}" / "samples.parquet")
        found[split] = samples["loglikelihood"].tolist()
        record = json.loads((tmp_path / f"{split}" / "sweep.json").read_text())
        assert record["tasks"][TASKS[0]]["split"] == (split or "test")
    assert found[None] == found["test"]
    assert found["test"] != found["validation"]
    lm = build(SweepLM, ask=few, max_length=255)
    part = {"split": "test[1:]", "limit": 2, "log_samples": True}
    run(tmp_path / "part", TASKS[:1], lm, ask=few, **part)
    values = pd.read_parquet(tmp_path / "part" / "samples.parquet")["loglikelihood"].tolist()
    kept = pd.read_parquet(tmp_path / "test" / "samples.parquet").query("doc_id in (1, 2)")
    np.testing.assert_allclose(values, kept["loglikelihood"], atol=ATOL)
    task = load_tasks(TASKS[:1], tasks_path())[TASKS[0]]
    rows = list(task.validation_docs())[:3]
    lm = build(LogitLensLM, layer=LAYERS, max_length=255)
    pairs = [
        (task.doc_to_text(row), f" {choice}") for row in rows for choice in task.doc_to_choice(row)
    ]
    theirs = [value for value, _ in lm.loglikelihood(instances(pairs))]
    full = samples[samples["decoder"] == "full"]["loglikelihood"]
    np.testing.assert_allclose(full, theirs, atol=ATOL)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_no_document_is_an_example_for_itself(split: str, named: bool, tmp_path: Path) -> None:
    task = load_tasks(["spade_mini_science"], tasks_path())["spade_mini_science"]
    rows = list(task.training_docs() if split == "train" else task.validation_docs())
    if named:  # as a task's fewshot_split does
        task.fewshot_cfg.split = getattr(task.config, f"{SPLITS[split]}_split")
        task.sampler.replace_df(rows)
    configure("science", task, settings(tmp_path, split=split, num_fewshot=5))
    shared = named or split == "train"  # without a name lm-eval draws from the training rows
    for row in rows:
        prompt = task.fewshot_context(row, num_fewshot=5)
        assert prompt.count(task.doc_to_text(row)) == 1
        assert prompt.count("Answer:") == 6
    if shared:
        with pytest.raises(UserError, match=f"are drawn from {len(rows)} rows.*without itself"):
            configure("science", task, settings(tmp_path, split=split, num_fewshot=len(rows)))


def test_a_split_without_rows_is_told_before_anything_is_computed(tmp_path: Path) -> None:
    few = ask(layers=(2,), decoders=("logit_lens",), thresholds=())
    lm = build(SweepLM, ask=few, max_length=255)
    with pytest.raises(UserError, match=r"has no rows: task spade_mini_articles has \d+ of them"):
        run(tmp_path / "out", TASKS, lm, ask=few, split="validation[20:]")
    assert lm.account.seconds == 0
    assert not (tmp_path / ".out.sweep").exists()


def test_a_text_is_greedy_if_all_its_windows_are() -> None:
    lm = build(SweepLM, ask=ask(thresholds=(), decoders=("logit_lens",), layers=(LAYERS,)))
    (task,) = load_tasks(["spade_mini_articles"], tasks_path()).values()
    pages = [Instance("loglikelihood_rolling", {}, ("text",), 0, ("x", doc, 1)) for doc in (0, 1)]
    windows = [pages[0], pages[0], pages[1], pages[1]]
    n = len(lm.grid.readings)
    logprobs = np.tile(np.array([-1.0, -2.0, -4.0, -8.0]), (n, 1))
    greedy = np.tile(np.array([True, False, True, True]), (n, 1))
    nothing = Call([], np.zeros((n, 0)), np.ones((n, 0), dtype=bool))
    calls = [nothing, Call(windows, logprobs, greedy)]
    found = samples_of(lm, "x", task, Collected(Store(Path("unused"), (0, 1)), calls))
    full = found[found["decoder"] == "full"].sort_values("doc_id")
    assert full["loglikelihood"].tolist() == [-3, -12]
    assert full["is_greedy"].tolist() == [False, True]
    assert samples_of(lm, "x", task, Collected(Store(Path("unused"), (0, 1)), [nothing])).empty


# ---------------------------------------------------------------- stopped and resumed


class Killed(BaseException):
    """Not an error: the process is gone."""


@pytest.mark.parametrize("after", [0, 1, 2, 4])
def test_a_killed_sweep_goes_on_and_ends_the_same(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole", keep_states=True).drop(columns="seconds")
    kept, keep = [], Store.keep

    def dying(self: Store, path: Path, *args: Any) -> None:
        if len(kept) == after:
            half = path.parent / f".{path.name}-xyz" / path.name
            half.parent.mkdir(parents=True)
            half.write_bytes(b"half of i")
            raise Killed
        kept.append(path)
        keep(self, path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "keep", dying)
        with pytest.raises(Killed):
            run(tmp_path / "out", keep_states=True)
    if kept:
        kept[-1].write_bytes(kept[-1].read_bytes()[:100])  # the disk was full
    again = run(tmp_path / "out", keep_states=True, resume=True).drop(columns="seconds")
    pd.testing.assert_frame_equal(whole, again)
    one, other = (tmp_path / name / f"states_{TASKS[0]}.safetensors" for name in ("whole", "out"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_sweeps_killed_at_random_moments_end_the_same(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole").drop(columns="seconds")
    begin = time.monotonic()
    run(tmp_path / "whole", overwrite=True)  # lm-eval's index is read by now
    seconds = time.monotonic() - begin
    rng, kills = random.Random(0), 0
    work, out = tmp_path / ".out.sweep", tmp_path / "out"
    while kills < 20:
        child = os.fork()
        if not child:
            run(out, resume=work.exists())
            os._exit(0)
        time.sleep(rng.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
        if out.exists():  # it was faster, once more from the beginning
            found = pd.read_parquet(out / "sweep.parquet").drop(columns="seconds")
            pd.testing.assert_frame_equal(whole, found, check_dtype=False, check_exact=True)
            shutil.rmtree(out)
            shutil.rmtree(work, ignore_errors=True)
    found = run(out, resume=work.exists()).drop(columns="seconds")
    pd.testing.assert_frame_equal(whole, found, check_exact=True)


def test_batches_that_are_there_are_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spade_eval.sweep.batch import Reader

    run(tmp_path / "out")
    work = tmp_path / ".again.sweep"
    with monkeypatch.context() as patch:
        patch.setattr("spade_eval.sweep.run._write", lambda *_: None)
        run(tmp_path / "again")
    assert list(work.rglob("*.safetensors"))
    monkeypatch.setattr(Reader, "read", lambda *_: pytest.fail("computed again"))
    found = run(tmp_path / "again", resume=True)
    pd.testing.assert_frame_equal(
        found.drop(columns="seconds"),
        pd.read_parquet(tmp_path / "out/sweep.parquet").drop(columns="seconds"),
        check_dtype=False,
    )
    assert found["seconds"].min() > 0


# ---------------------------------------------------------------- bad input


def test_a_finished_sweep_is_not_replaced(tmp_path: Path) -> None:
    run(tmp_path / "out")
    with pytest.raises(UserError, match=r"holds a sweep\. Give another --output"):
        run(tmp_path / "out")
    with pytest.raises(UserError, match=r"of another configuration \(limit was 3, is 2\)"):
        run(tmp_path / "out", limit=2)
    assert len(run(tmp_path / "out", limit=2, overwrite=True))
    with pytest.raises(UserError, match="nothing to resume"):
        run(tmp_path / "new", resume=True)


def test_a_sweep_is_not_resumed_with_another_model_or_other_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spade_eval.sweep.run._write", lambda *_: None)
    run(tmp_path / "out")
    with pytest.raises(UserError, match="holds a run that has not ended: --resume"):
        run(tmp_path / "out")
    for resume in (True, False):
        with pytest.raises(UserError, match="num_fewshot was None, is 2"):
            run(tmp_path / "out", resume=resume, num_fewshot=2)
    other = build(SweepLM, "mistral_sliding", ask=settings(tmp_path).ask, max_length=255)
    with pytest.raises(UserError, match="model's config was"):
        run(tmp_path / "out", resume=True, lm=other)


@pytest.mark.parametrize("overwrite", [True, False])
def test_an_empty_folder_is_free(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").mkdir()
    assert len(run(tmp_path / "out", overwrite=overwrite))


def test_what_another_run_made_meanwhile_stays_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "out" / "sweep.json"

    def meanwhile() -> dict[str, str]:
        other.parent.mkdir()
        other.write_text("{}")
        return {}

    with monkeypatch.context() as patch:
        patch.setattr("spade_eval.sweep.run._versions", meanwhile)
        with pytest.raises(UserError, match=r"made by another run meanwhile.*--resume"):
            run(tmp_path / "out")
    assert other.read_text() == "{}"
    other.parent.rename(tmp_path / "theirs")
    computed = []
    monkeypatch.setattr(Store, "keep", lambda *args: computed.append(args))
    assert len(run(tmp_path / "out", resume=True))
    assert not computed


def test_other_files_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="no sweep's folder"):
            run(tmp_path / "out", overwrite=overwrite)
    (tmp_path / "out/sweep.json").write_text("{}")  # a sweep, and a report inside
    (tmp_path / "out/report").mkdir()
    with pytest.raises(UserError, match=r"holds other files \(report, thesis.tex\), and the sweep"):
        run(tmp_path / "out", overwrite=True)
    with pytest.raises(UserError, match=r"holds a sweep.* or --overwrite"):
        run(tmp_path / "out")
    assert (tmp_path / "out/report").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--decoders spad", "decoders='spad' is not known.*Did you mean 'spade'"),
        ("--confidence entropi", "Did you mean 'entropy'"),
        ("--exit_scope text", "exit_scope='text' is not known"),
        ("--readout map", "readout='map' is not known"),
        ("--thresholds 1:2", "FROM:TO:STEP"),
        ("--thresholds 4:1:0.5", "0 values"),
        ("--thresholds 0:1:0", "FROM:TO:STEP"),
        ("--layers x", "layers='x'"),
        ("--layers 5:5:1", "names no layer"),
        ("--limit 0", "limit 0"),
        ("--lens =x", "NAME=FOLDER"),
        ("--decodes spade", "Did you mean '--decoders'"),
    ],
)
def test_bad_arguments_are_told_at_once(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["sweep", "--tasks", "arc_easy", "--output", str(tmp_path / "out"), *arguments.split()]
    assert main(argv) == 2
    assert re.search(message, capsys.readouterr().err)


def test_what_the_model_cannot_give_is_told_before_it_is_loaded() -> None:
    known = {"x": ("x", lens("l_spade", 1))}
    with pytest.raises(UserError, match="tuned_lens needs a lens of its kind"):
        grid(Ask(decoders=("tuned_lens",)), LAYERS, known)
    with pytest.raises(UserError, match=r"this model has layers 0\.\.4"):
        grid(Ask(layers=(3, 5)), LAYERS, known)
    with pytest.raises(UserError, match="two l_spade lenses are called x"):
        build(SweepLM, maps=[MAPS[0], MAPS[0]])


def test_tasks_that_generate_are_refused(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"q": "a", "a": "b"}\n')
    task = ConfigurableTask(
        config={
            "task": "writes", "dataset_path": "json", "output_type": "generate_until",
            "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test",
            "doc_to_text": "{{q}}", "doc_to_target": "{{a}}", "generation_kwargs": {"until": ["."]},
        }
    )  # fmt: skip
    with pytest.raises(UserError, match="writes: a sweep scores"):
        require_scored({"writes": task})


# ---------------------------------------------------------------- arguments


def test_ranges_and_lists_are_read() -> None:
    assert thresholds("0.2:4:0.2") == tuple(round(0.2 * i, 10) for i in range(1, 21))
    assert thresholds("0.1:0.3:0.1") == (0.1, 0.2, 0.3)
    assert thresholds("2,1,1") == (1.0, 2.0)
    assert thresholds("none") == ()
    assert layers("all") is None
    assert layers("4:12:4") == (4, 8)
    assert layers("3,1") == (3, 1)
    assert named("a=b/c,d/e") == (("a", "b/c"), ("e", "d/e"))


def test_exits_read_layers_that_the_table_does_not_show() -> None:
    known = {"x": ("x", lens("l_spade", 1))}
    found = grid(
        ask(layers=(2,), decoders=("spade", "l_spade"), scopes=("context",)), LAYERS, known
    )
    assert {r.layer for r in found.readings if r.decoder == "spade"} == {1, 2, 3}
    assert {r.layer for r in found.table if r.decoder == "spade"} == {2}
    without = grid(ask(layers=(2,), thresholds=()), LAYERS, known)
    assert {r.layer for r in without.readings} == {2, LAYERS}
