"""`spade-eval finetune`: the loss is the answers', the head sees nothing else, the same seed gives the
same adapter whatever interrupts it, and what is kept is the best, is PEFT's, and is its model's own."""

from __future__ import annotations

import copy
import functools
import json
import math
import random
import shutil
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from test_documents import ROWS, write_task
from test_lm import build, close, instances, model, task_pairs
from torch import nn
from transformers import Trainer
from zoo import BYTES, VOCAB, byte_tokenizer, random_ids, tiny

from spade_eval import adapter_files, adapters, lens_match
from spade_eval.cli import main
from spade_eval.errors import UserError
from spade_eval.fingerprint import adapter_fingerprint
from spade_eval.fit import documents, examples, lora, questions
from spade_eval.fit.lora_run import finetune
from spade_eval.fit.lora_settings import LoraSettings
from spade_eval.fit.precision import bf16_is_fast
from spade_eval.fit.run import fit
from spade_eval.fit.settings import FitSettings
from spade_eval.lm.layer import LogitLensLM, LSpadeLM, SpadeLayerLM
from spade_eval.scoring import Layout, Request

if TYPE_CHECKING:
    from pathlib import Path

TASKS = "letters", "words"
FAST = {"batch_size": 4, "micro_batch_size": 2, "learning_rate": 2e-2, "rank": 4, "alpha": 8, "epochs": 3, "dropout": 0.1}  # fmt: skip
TRAINING, VALIDATION = 8, 6  # rows of each task
ADAPTER = ["README.md", "adapter_config.json", "adapter_model.safetensors", "finetune.json"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _quick(few_tasks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tasks, and lm-eval's log not tied to this test's standard error."""
    monkeypatch.setattr(lora, "EVALUATIONS", 2)
    monkeypatch.setattr("lm_eval.utils.setup_logging", lambda: None)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks that can be learned: a letter of one token, and words of several."""
    folder = tmp_path_factory.mktemp("tasks")
    words = ["sea", "fire", "a hill"]
    rng = random.Random(0)

    def rows(n: int, begin: int) -> list[dict]:
        golds = [rng.randrange(3) for _ in range(n)]
        return [{"q": f"{i + begin}: {words[g]}", "gold": g} for i, g in enumerate(golds)]

    for name, choices, delimiter in (("letters", ["A", "B", "C"], ""), ("words", words, " ")):
        splits = {"train": rows(TRAINING, 0), "validation": rows(VALIDATION, 100)}
        write_task(folder, name, splits, output_type="multiple_choice", doc_to_text="{{q}}?", doc_to_target="gold", doc_to_choice=choices, target_delimiter=delimiter)  # fmt: skip
    write_task(folder, "chat", {"train": ROWS, "validation": ROWS}, output_type="generate_until", doc_to_text="{{q}}", doc_to_target="word")  # fmt: skip
    choice = {"output_type": "multiple_choice", "doc_to_text": "{{q}}?", "doc_to_target": "gold", "doc_to_choice": ["x", "y", "z"]}  # fmt: skip
    write_task(folder, "untrained", {"validation": ROWS, "test": ROWS}, **choice)
    many = [{"q": f"q{n}", "gold": n % 3} for n in range(40)]
    write_task(folder, "unvalidated", {"train": many, "test": ROWS}, **choice)
    write_task(folder, "tiny_one", {"train": ROWS[:1], "test": ROWS}, **choice)
    metric = {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}
    write_task(folder, "normed", {"train": many, "validation": ROWS}, **choice, metric_list=[metric])  # fmt: skip
    return folder


def fresh(saved: Path, **kwargs: Any) -> LogitLensLM:
    """A model of its own for each run: training puts an adapter into it."""
    return LogitLensLM(
        pretrained=str(saved), layer=-1, device="cpu", batch_size=8, max_length=60, **kwargs
    )


def settings(output: Path, **more: Any) -> LoraSettings:
    return LoraSettings(output, **({"tasks": TASKS} | FAST | more))


def run(
    saved: Path,
    include_path: Path,
    output: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    **more: Any,
) -> adapter_files.Record:
    return finetune(
        fresh(saved),
        settings(output, **more),
        resume=resume,
        overwrite=overwrite,
        include_path=include_path,
        command="spade-eval finetune ...",
    )


@pytest.fixture(scope="module")
def whole(saved: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole") / "adapter"
    with pytest.MonkeyPatch.context() as patch:
        few = functools.partial(TaskManager, include_defaults=False)
        patch.setattr(documents, "TaskManager", few)
        patch.setattr(lora, "EVALUATIONS", 2)
        run(saved, tasks, output)
    return output


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "finetune.json").read_text())


def adapted(base: nn.Module, seed: int = 0, **config: Any) -> peft.PeftModel:
    """A model with a random adapter that changes much."""
    torch.manual_seed(seed)
    config = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | config
    return peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(task_type="CAUSAL_LM", **config)
    ).eval()


# ---------------------------------------------------------------- what is learned


def requests(seed: int = 0, n: int = 6) -> list[Request]:
    """Contexts of 1 to 9 tokens with answers of 1 to 3."""
    rng = random.Random(seed)
    ids = [tuple(random_ids(1, 12, seed + i)[0].tolist()) for i in range(n)]
    cuts = [1, *(rng.randint(2, 9) for _ in range(n - 1))]
    return [
        Request(row[:c], row[c : c + rng.randint(1, 3)]) for row, c in zip(ids, cuts, strict=True)
    ]


def nats(logits_of: Any, request: Request) -> list[float]:
    """Minus the log-probability of each answer token, from the logits of the whole sequence."""
    ids = torch.tensor([request.context + request.continuation])
    with torch.no_grad():
        logprobs = logits_of(input_ids=ids).logits[0].float().log_softmax(-1)
    first = len(request.context)
    return [-float(logprobs[first + i - 1, token]) for i, token in enumerate(request.continuation)]


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere", "gpt2", "bloom"])
def test_the_loss_is_that_of_the_answer_tokens(family: str) -> None:
    net = adapted(tiny(family))
    asked = requests()
    batch = examples.Collator(net)([examples.example(r, Layout(64)) for r in asked])
    labels = batch.pop("labels")
    with torch.no_grad():
        loss = examples.answer_loss(net(**batch), labels)
        of_a_step = examples.answer_loss(net(**batch), labels, torch.tensor(100))
    each = [nats(net, request) for request in asked]
    n = sum(map(len, each))
    assert float(loss) == pytest.approx(sum(map(sum, each)) / n, abs=1e-4)
    assert float(of_a_step) == pytest.approx(sum(map(sum, each)) / 100, abs=1e-4)


def test_the_head_sees_answer_positions_only() -> None:
    net = adapted(tiny("llama"))
    seen: list[tuple[int, ...]] = []
    net.get_output_embeddings().register_forward_hook(
        lambda _m, _i, out: seen.append(tuple(out.shape))
    )
    asked = requests()
    batch = examples.Collator(net)([examples.example(r, Layout(64)) for r in asked])
    labels = batch.pop("labels")
    examples.answer_loss(net(**batch), labels)
    assert seen == [(sum(len(r.continuation) for r in asked), VOCAB)]


def test_a_model_that_cannot_narrow_its_head_learns_the_same() -> None:
    class Wide(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: torch.Tensor) -> Any:
            return self.inner(input_ids=input_ids)

    net = tiny("llama")
    made = [examples.example(r, Layout(64)) for r in requests()]
    narrow, wide = examples.Collator(net)(made), examples.Collator(Wide(net))(made)
    assert "logits_to_keep" not in wide
    losses = []
    for batch in (narrow, wide):
        labels = batch.pop("labels")
        losses.append(float(examples.answer_loss(net(**batch), labels).detach()))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_document_that_is_too_long_loses_its_left_end() -> None:
    made = examples.example(Request(tuple(range(10, 20)), (30, 31)), Layout(6))
    assert made == {"input_ids": [15, 16, 17, 18, 19, 30], "labels": [-100] * 5 + [30, 31]}


def test_every_epoch_has_every_example_and_lengths_are_grouped() -> None:
    made = [{"input_ids": [i] * (i % 7 + 1), "labels": []} for i in range(50)]
    order = examples.in_training_order(made, 3, 4, seed=1)
    epochs = [[one["input_ids"][0] for one in order[e * 50 : e * 50 + 50]] for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert order == examples.in_training_order(made, 3, 4, seed=1)
    assert order != examples.in_training_order(made, 3, 4, seed=2)

    def padding(rows: list[int]) -> int:
        batches = [[len(made[i]["input_ids"]) for i in rows[n : n + 4]] for n in range(0, 50, 4)]
        return sum(max(b) * len(b) - sum(b) for b in batches)

    assert padding(epochs[0]) < padding(list(range(50))) / 2
    begins = [len(order[e * 50]["input_ids"]) for e in range(3)]
    assert begins != [7, 7, 7]  # the longest first would make a short training one of long ones


def test_a_step_does_not_depend_on_its_micro_batches(tmp_path: Path) -> None:
    """Answers of one and of several tokens: a mean of the micro-batches' means would differ."""
    results = []
    for n in (1, 4):
        net = adapted(model())
        given = settings(tmp_path / str(n), micro_batch_size=n, max_steps=2, learning_rate=1e-2)
        made = [examples.example(r, Layout(64)) for r in requests(n=8)]
        lora.train(net, made, lambda: {"accuracy": 0.5}, given, bf16=False, use_cpu=True)
        results.append(peft.get_peft_model_state_dict(net))
    first = peft.get_peft_model_state_dict(adapted(model()))
    moved = sum(float((tensor - first[name]).abs().sum()) for name, tensor in results[0].items())
    apart = sum(
        float((tensor - results[1][name]).abs().sum()) for name, tensor in results[0].items()
    )
    assert apart < 1e-2 * moved


def test_validation_documents_are_not_trained_on(
    saved: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[Any] = []
    asked: list[Any] = []
    example, score = examples.example, questions.score
    monkeypatch.setattr(
        examples,
        "example",
        lambda r, layout: learned.append((*r.context, *r.continuation)) or example(r, layout),
    )
    monkeypatch.setattr(questions, "score", lambda lm, some: asked.extend(some) or score(lm, some))
    found = run(saved, tasks, tmp_path / "out", tasks=("unvalidated",), max_steps=2)
    answers = {question.answer for question in asked}
    assert len(answers) == found.validation_documents == 4  # a tenth
    assert len(learned) == found.documents == 36
    assert not answers & {*learned}


# ---------------------------------------------------------------- the run


def test_the_adapter_folder(whole: Path, saved: Path) -> None:
    assert sorted(p.name for p in whole.iterdir()) == ADAPTER
    assert sorted(p.name for p in whole.parent.iterdir()) == ["adapter"]  # no work folder is left
    told = record(whole)
    assert (told["base_model"], told["tasks"]) == (str(saved), list(TASKS))
    assert (told["documents"], told["validation_documents"]) == (2 * TRAINING, 2 * VALIDATION)
    assert told["multi_token_documents"] == TRAINING  # those of "words"
    assert told["steps"] == 3 * 2 * TRAINING // 4
    assert 0 < told["best_step"] <= told["steps"]
    assert told["settings"]["rank"] == 4
    assert told["after"].keys() == {*TASKS, "all"}
    assert told["after"]["all"]["n"] == 2 * VALIDATION
    p, n = told["after"]["all"]["mean"], 2 * VALIDATION
    assert told["after"]["all"]["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))
    card = (whole / "README.md").read_text()
    for text in (
        "spade-eval finetune ...",
        str(saved),
        "letters",
        f"{told['after']['all']['mean']:.3f} ±",
    ):
        assert text in card
    config = json.loads((whole / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (
        str(saved),
        4,
        8,
    )


def test_it_has_learned(whole: Path, saved: Path, tasks: Path) -> None:
    found = documents.from_tasks(fresh(saved), TASKS, include_path=tasks)
    net = peft.PeftModel.from_pretrained(copy.deepcopy(model()), whole)
    plain, adapted = (sum(sum(nats(m, d)) for d in found) / len(found) for m in (model(), net))
    assert adapted < plain - 2


def test_another_seed_gives_another_adapter(
    whole: Path, saved: Path, tasks: Path, tmp_path: Path
) -> None:
    run(saved, tasks, tmp_path / "other", seed=1)
    assert weights(tmp_path / "other") != weights(whole)


class Killed(BaseException):
    """Not an error that anything could handle on the way."""


def killed_in(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Stop the run in the n-th call of a function, before it does anything."""
    inner, calls = getattr(owner, name), []

    def dies(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            raise Killed
        return inner(*args, **kwargs)

    patch.setattr(owner, name, dies)


def test_a_run_that_is_killed_again_and_again_ends_in_the_same_adapter(
    whole: Path, saved: Path, tasks: Path, tmp_path: Path
) -> None:
    output, work = tmp_path / "out", tmp_path / ".out.finetune"
    kills = [
        (Trainer, "_save_optimizer_and_scheduler", 1, 2),  # the first checkpoint, at step 2
        (lora.KeepWhole, "on_save", 3, 6),  # all files are written, not the mark
        (Trainer, "training_step", 3, None),  # in step 6: each has 2 micro-batches
        (Trainer, "_save_optimizer_and_scheduler", 2, 8),  # the adapter is written, no more
        (adapter_files, "save", 1, None),  # all but the adapter's folder
    ]
    for n, (owner, name, call, torn) in enumerate(kills):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            killed_in(patch, owner, name, call)
            # The third run leaves a checkpoint between two evaluations.
            patch.setattr(lora, "CHECKPOINT_SECONDS", 0 if n == 2 else 300)
            run(saved, tasks, output, resume=n > 0)
        assert not output.exists()
        assert n != 2 or (work / "checkpoint-5" / lora.WHOLE).exists()
        assert torn is None or not (work / f"checkpoint-{torn}" / lora.WHOLE).exists()
        assert torn is None or (work / f"checkpoint-{torn}" / "adapter_model.safetensors").exists()
    with pytest.raises(UserError, match=r"has not ended: --resume goes on"):
        run(saved, tasks, output)
    with pytest.raises(UserError, match=r"other settings \(learning_rate was 0.02, is 0.5\)"):
        run(saved, tasks, output, resume=True, learning_rate=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "training_step", None)  # nothing is left to train
        told = run(saved, tasks, output, resume=True)
    assert weights(output) == weights(whole)
    assert asdict_without_bill(told) == asdict_without_bill(adapter_files.Record(**record(whole)))
    assert not work.exists()


def asdict_without_bill(told: adapter_files.Record) -> dict[str, Any]:
    entries = json.loads(json.dumps(vars(told)))
    assert entries["bill"]["cpu"]
    del entries["bill"]
    return entries


def scripted(values: list[float], net: Any, seen: list[dict]) -> Any:
    """A validation that returns these accuracies and notes the adapter that each is of."""
    left = iter(values)

    def validate() -> dict[str, float]:
        state = peft.get_peft_model_state_dict(net)
        seen.append({name: tensor.clone() for name, tensor in state.items()})
        return {"accuracy": next(left)}

    return validate


def test_early_stopping_brings_the_best_adapter_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "PATIENCE", 2)
    monkeypatch.setattr(lora, "EVALUATIONS", 4)
    net = adapted(model(), init_lora_weights=True)
    made = [examples.example(r, Layout(64)) for r in requests(n=16)]
    given = settings(tmp_path / "out", epochs=3)
    seen: list[dict] = []
    validate = scripted([0.5, 0.7, 0.7, 0.6], net, seen)  # one more would raise
    state = lora.train(net, made, validate, given, bf16=False, use_cpu=True)
    assert (state.global_step, state.best_global_step) == (4, 2)
    now = peft.get_peft_model_state_dict(net)
    assert all(torch.equal(tensor, seen[1][name]) for name, tensor in now.items())
    assert not all(torch.equal(tensor, seen[3][name]) for name, tensor in now.items())

    # Had it been killed here, a run that resumes must not train on.
    again = adapted(model(), init_lora_weights=True)
    state = lora.train(again, made, scripted([], again, []), given, bf16=False, use_cpu=True)
    assert (state.global_step, state.best_global_step) == (4, 2)
    for name, tensor in peft.get_peft_model_state_dict(again).items():
        assert torch.equal(tensor, seen[1][name])


def test_checkpoints_ask_nobody(
    saved: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = fresh(saved)
    lm.model.name_or_path = "someone/model"  # of the Hub, where a folder would be looked into
    asked: list[str] = []
    where = "peft.utils.save_and_load.check_file_exists_on_hf_hub"
    monkeypatch.setattr(where, lambda name, *_: asked.append(name))
    told = finetune(lm, settings(tmp_path / "out", max_steps=2), include_path=tasks, command="")
    assert told.steps == 2
    assert asked == []
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(saved)


def test_time_ends_the_training_with_an_adapter(saved: Path, tasks: Path, tmp_path: Path) -> None:
    told = run(saved, tasks, tmp_path / "out", minutes=1e-6)
    assert told.steps == 2
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ADAPTER


def test_the_time_before_a_break_counts() -> None:
    class Control:
        global_step = 2
        should_training_stop = should_evaluate = should_save = False

    clock = lora.Clock(minutes=1)
    clock.on_train_begin()
    assert not clock.on_step_end(None, Control, Control()).should_training_stop
    kept = json.loads(json.dumps(clock.state()))
    kept["attributes"]["seconds"] += 59.999
    resumed = lora.Clock.from_state(kept)
    resumed.on_train_begin()
    resumed._last -= 0.01
    told = resumed.on_step_end(None, Control, Control())
    assert told.should_training_stop and told.should_evaluate and told.should_save


def test_an_adapter_that_changes_nothing_is_an_error(
    saved: Path, tasks: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"adapter is not active.*higher --learning_rate"):
        run(saved, tasks, tmp_path / "out", learning_rate=1e-30, max_steps=2)
    assert not (tmp_path / "out").exists()


def test_accuracy_is_that_of_lm_eval(whole: Path, saved: Path, tasks: Path) -> None:
    """Before and after, from the unmodified harness on the same documents."""
    told = record(whole)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    for part, adapter in (("before", {}), ("after", {"peft": str(whole)})):
        lm = SpadeLayerLM(pretrained=str(saved), layer=-1, device="cpu", max_length=60, **adapter)
        found = simple_evaluate(lm, tasks=[*TASKS], task_manager=manager, bootstrap_iters=0)
        for name in TASKS:
            assert told[part][name]["mean"] == pytest.approx(found["results"][name]["acc,none"])
    loaded = documents.load_tasks(TASKS, tasks)
    some = questions.validation(lm, loaded, seed=0, most=5)
    assert [question.task for question in some] == ["letters", "words"] * 2 + ["letters"]


@pytest.mark.parametrize(
    ("name", "split", "rows"),
    [
        ("letters", "validation", slice(None)),
        ("letters", "validation[2:4]", slice(2, 4)),
        ("unvalidated", "test", slice(None)),
    ],
)
def test_validation_documents_are_those_of_their_split(
    name: str, split: str, rows: slice, saved: Path, tasks: Path
) -> None:
    task = documents.load_tasks([name], tasks)[name]
    lm = fresh(saved)
    asked = questions.validation(lm, {name: task}, split, seed=0, most=50)
    held = list(task.dataset[split.partition("[")[0]])[rows]
    right = [(*c, *a) for row in held for c, a in documents.right_answer(lm, task, row)]
    assert sorted(question.answer for question in asked) == sorted(right)


# ---------------------------------------------------------------- the adapter in use


def test_peft_loads_it_and_scores_are_those_of_the_merged_model(
    whole: Path, saved: Path, tmp_path: Path
) -> None:
    net = peft.PeftModel.from_pretrained(copy.deepcopy(model()), whole)
    net.merge_and_unload().save_pretrained(tmp_path / "merged")
    byte_tokenizer().save_pretrained(tmp_path / "merged")
    pairs = instances(task_pairs())
    common = {"device": "cpu", "batch_size": 4, "max_length": 60}
    plain = SpadeLayerLM(pretrained=str(saved), layer=-1, **common).loglikelihood(pairs)
    theirs = HFLM(pretrained=str(saved), peft=str(whole), **common).loglikelihood(pairs)
    for layer in (-1, 2):
        merged = SpadeLayerLM(pretrained=str(tmp_path / "merged"), layer=layer, **common)
        ours = SpadeLayerLM(pretrained=str(saved), peft=str(whole), layer=layer, **common)
        answers = ours.loglikelihood(pairs)
        close(answers, merged.loglikelihood(pairs))
        if layer == -1:
            close(answers, theirs)
            assert max(abs(a - b) for (a, _), (b, _) in zip(answers, plain, strict=True)) > 0.1


def test_a_lens_belongs_to_the_adapter(whole: Path, saved: Path, tmp_path: Path) -> None:
    common = {"device": "cpu", "max_length": 60}
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the {word} and the {word}" for word in ("sea", "sun", "moon")))
    lm = SpadeLayerLM(pretrained=str(saved), peft=str(whole), layer=-1, **common)
    given = FitSettings("l_spade", tmp_path / "lens", text=text, max_positions=30, epochs=0)
    told, its = fit(lm, given).config.to_json(), lens_match.owner(lm.model)
    assert {name: told[name] for name in its} == its
    use = {"layer": 2, "lens": str(tmp_path / "lens"), **common}
    LSpadeLM(pretrained=str(saved), peft=str(whole), **use)
    adapted(model()).save_pretrained(tmp_path / "another")
    for other in ({}, {"peft": str(tmp_path / "another")}):
        with pytest.raises(UserError, match="adapter"):
            LSpadeLM(pretrained=str(saved), **other, **use)


@pytest.fixture
def bases(tmp_path: Path, saved: Path) -> Any:
    """Folders of models: the adapter's own under another name, and others."""

    def make(kind: str) -> Path:
        folder = tmp_path / kind
        if kind == "moved":
            shutil.copytree(saved, folder)
            return folder
        differs = {"wider": {"hidden_size": 48}, "shorter": {"num_hidden_layers": 2}, "longer": {"num_hidden_layers": 6}}  # fmt: skip
        differs |= {"retrained": {"seed": 5}, "family": {}}
        family = "gpt2" if kind == "family" else "llama"
        net = tiny(family, vocab_size=BYTES, max_position_embeddings=256, **differs[kind])
        net.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        return folder

    return make


def test_a_moved_model_is_the_same_model(whole: Path, bases: Any) -> None:
    base = str(bases("moved"))
    for dtype in ("float32", "bfloat16", "float16"):
        SpadeLayerLM(pretrained=base, peft=str(whole), layer=2, device="cpu", dtype=dtype)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("wider", "size mismatch"),
        ("shorter", "find no place, such as .*layers.2"),
        ("longer", "no weights for .*layers.4"),
        ("retrained", "the weights that it changes were"),
        ("family", "Target modules"),
    ],
)
def test_an_adapter_of_another_model_is_refused(
    kind: str, reason: str, whole: Path, saved: Path, bases: Any
) -> None:
    base = bases(kind)
    with pytest.raises(UserError, match=reason) as err:
        SpadeLayerLM(pretrained=str(base), peft=str(whole), layer=1, device="cpu")
    assert f"was trained for {saved} and does not fit {base}" in str(err.value)
    assert "\n" not in str(err.value)


def test_an_adapter_made_elsewhere_is_taken(saved: Path, tmp_path: Path) -> None:
    """It says nothing about its model's weights."""
    adapted(model()).save_pretrained(tmp_path / "theirs")
    SpadeLayerLM(pretrained=str(saved), peft=str(tmp_path / "theirs"), layer=1, device="cpu")


def test_an_adapter_of_experts_is_taken(tmp_path: Path) -> None:
    """Their weights are no `weight`, so that they cannot be compared."""
    base = tmp_path / "base"
    net = tiny("gpt_oss", vocab_size=BYTES, max_position_embeddings=256)
    net.save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    theirs = adapted(net, target_modules=["q_proj"], target_parameters=experts)
    assert adapters.adapted(theirs) == ""
    theirs.save_pretrained(tmp_path / "theirs")
    lm = SpadeLayerLM(pretrained=str(base), peft=str(tmp_path / "theirs"), layer=1, device="cpu")
    assert adapter_fingerprint(lm.model) == adapter_fingerprint(theirs)


@pytest.mark.parametrize("kind", ["packed", "integers"])
def test_quantised_weights_are_not_compared(kind: str) -> None:
    theirs = adapted(model(), target_modules=["q_proj", "v_proj"])
    assert adapters.adapted(theirs)
    layer = theirs.get_submodule("base_model.model.model.layers.1.self_attn.v_proj.base_layer")
    weight = layer.weight.to(torch.int8)
    del layer.weight
    layer.register_buffer("qweight" if kind == "packed" else "weight", weight)
    assert adapters.adapted(theirs) == ""


def test_what_is_no_adapter_is_refused(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    for name in (saved, tmp_path / "nowhere", tmp_path / "broken"):
        with pytest.raises(UserError, match="no PEFT adapter can be read there"):
            SpadeLayerLM(pretrained=str(saved), peft=str(name), layer=1, device="cpu")
    with pytest.raises(UserError, match="pass the result as pretrained"):
        build(SpadeLayerLM, layer=1, peft=str(saved))
    with pytest.raises(UserError, match="exclude each other"):
        SpadeLayerLM(pretrained=str(saved), peft="a", delta="b", layer=1)


# ---------------------------------------------------------------- the command


def arguments(output: Path, saved: Path, tasks: Path, *more: str) -> list[str]:
    given = {"--tasks": ",".join(TASKS), "--output": str(output), "--include_path": str(tasks)}
    given |= {"--model_args": f"pretrained={saved},max_length=60", "--device": "cpu"}
    given |= {f"--{name}": str(value) for name, value in FAST.items()}
    return ["finetune", *(word for pair in given.items() for word in pair), *more]


def test_the_command(
    whole: Path, saved: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "deep" / "adapter"
    assert main(arguments(output, saved, tasks)) == 0
    table = capsys.readouterr().out.split("task  ")[-1].splitlines()
    assert [line.split()[0] for line in table[1:4]] == [*TASKS, "all"]
    told = record(output)
    assert (
        f"{told['before']['all']['mean']:.3f} ± {told['before']['all']['stderr']:.3f}" in table[3]
    )
    assert f"{told['after']['all']['mean']:.3f} ± {told['after']['all']['stderr']:.3f}" in table[3]
    assert table[-1] == f"Adapter: {output}"
    assert told["command"].startswith("spade-eval finetune --tasks letters,words")
    assert weights(output) == weights(whole)

    argv = arguments(output, saved, tasks, "--max_steps", "2")
    assert main(argv) == 2
    assert f"{output} exists" in capsys.readouterr().err
    assert main([*argv, "--overwrite"]) == 0
    assert record(output)["steps"] == 2
    assert "--overwrite" not in record(output)["command"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "untrained"], "task untrained has no training split"),
        (["--tasks", "chat"], "task chat is of type generate_until"),
        (["--tasks", "normed"], "task normed has no metric acc"),
        (["--tasks", "leters"], "unknown task 'leters'. Did you mean 'letters'?"),
        (["--tasks", "tiny_one"], "Validation needs all training documents there are"),
        (["--rank", "0"], "rank=0: give a whole number from 1 up"),
        (["--minutes", "0"], "minutes=0.0: give a number above 0"),
        (["--dropout", "1"], "dropout=1.0: give a number from 0 to below 1"),
        (["--validation_documents", "1"], "validation_documents=1: give a whole number from 2 up"),
        (["--validation_split", "validation[4:4]"], "has no rows"),
        (["--validation_split", "validation[900:]"], "task letters has 6 of them"),
        (["--validation_split", "test"], "task letters has no test split; it has: train, "),
        (["--batch_size", "5"], "batch_size=5 is no multiple of micro_batch_size=2 times 1"),
        (["--resume"], "There is nothing to resume"),
        (["--epoch", "3"], "Did you mean '--epochs'? `spade-eval finetune --help`"),
        (["--model_args", "pretrained={whole_base},peft={whole}"], "has an adapter already"),
    ],
)  # fmt: skip
def test_bad_input_ends_in_a_sentence(
    more: list[str],
    message: str,
    whole: Path,
    saved: Path,
    tasks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = [word.format(whole=whole, whole_base=saved) for word in more]
    assert main(arguments(tmp_path / "out", saved, tasks, *more)) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not any(tmp_path.iterdir())


def test_a_folder_with_other_files_is_not_replaced(
    saved: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main(arguments(tmp_path, saved, tasks, "--overwrite")) == 2
    assert "holds other files (notes.txt), and the adapter replaces" in capsys.readouterr().err


def test_bf16_is_chosen_by_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for has, fast in (
        ({"amx_bf16": True}, True),
        ({"amx_bf16": False, "avx512_bf16": True}, True),
        ({"amx_bf16": False, "avx512_f": True}, False),
        ({}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has, raising=False)
        assert bf16_is_fast(cpu) is fast
    assert not bf16_is_fast(torch.device("mps"))


def test_bf16_trains_an_adapter_in_fp32(saved: Path, tasks: Path, tmp_path: Path) -> None:
    told = run(saved, tasks, tmp_path / "out", precision="bfloat16", max_steps=2)
    assert told.settings["precision"] == "bfloat16"
    found = peft.utils.load_peft_weights(str(tmp_path / "out"), device="cpu")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


@pytest.mark.slow
def test_the_default_model(
    default_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained without pretrained=, used without it, and by the harness's own class."""
    output = tmp_path / "adapter"
    fast = ["--max_steps", "2", "--validation_documents", "4", "--output", str(output)]
    assert main(["finetune", "--tasks", "spade_mini_science", *fast]) == 0
    assert record(output)["base_model"] == "SmolLM2-135M-Instruct"
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "SmolLM2-135M-Instruct"
    common = {"peft": str(output), "device": "cpu", "batch_size": 4}
    pairs = instances([("Question: Is water wet?\nAnswer:", answer) for answer in (" A", " B")])
    close(
        SpadeLayerLM(layer=-1, **common).loglikelihood(pairs),
        HFLM(pretrained=str(default_model_dir), **common).loglikelihood(pairs),
    )
