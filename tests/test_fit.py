"""`spade-eval fit` as a whole: from text or tasks to a lens folder, again and again the same, killed
and resumed, refused in a sentence."""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_lm import WORDS, build, model
from zoo import byte_tokenizer

from spade_eval.cli import main
from spade_eval.errors import UserError
from spade_eval.fingerprint import fingerprint
from spade_eval.fit import states
from spade_eval.fit.descent import Descent
from spade_eval.fit.precision import bf16_is_fast
from spade_eval.fit.progress import Progress
from spade_eval.fit.run import fit
from spade_eval.fit.settings import FitSettings, layer_list
from spade_eval.lens import LinearLens
from spade_eval.lm.base import SpadeLM

TASKS = Path(__file__).parents[1] / "tasks"
FAST = {"max_positions": 150, "epochs": 2}


@pytest.fixture(autouse=True)
def _quick(few_tasks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tasks, and lm-eval's log not tied to this test's standard error."""
    monkeypatch.setattr("lm_eval.utils.setup_logging", lambda: None)


@functools.cache
def lm() -> Any:
    return build(SpadeLM)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    lines = [" ".join(rng.choice(WORDS) for _ in range(rng.randint(4, 9))) for _ in range(30)]
    path.write_text("\n\n".join(dict.fromkeys(lines)))
    return path


def settings(output: Path, decoder: Any = "l_spade", **more: Any) -> FitSettings:
    return FitSettings(decoder, output, **(FAST | more))


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def arguments(output: Path, saved: Path, *more: str, decoder: str = "l_spade") -> list[str]:
    """A command line of the smallest fit; later options win."""
    given = {"--max_positions": "150", "--epochs": "2", "--batch_size": "4", "--device": "cpu"}
    given |= {"--decoder": decoder, "--output": str(output)}
    given |= {"--model_args": f"pretrained={saved},max_length=60"}
    return ["fit", *itertools.chain(*given.items()), *more]


def plausible(folder: Path, layers: list[int]) -> None:
    metrics = config(folder)["metrics"]
    assert sorted(map(int, metrics)) == layers
    for values in metrics.values():
        assert values["ce"] <= values["ce_ridge"] + 1e-4
        assert values["ce"] <= values["logit_lens_ce"] + 1e-4
        assert 0 <= values["kl"] < values["ce"]
        assert values["kl"] <= values["logit_lens_kl"] + 1e-4
        for name in ("agree_teacher", "agree_full"):
            assert 0 <= values[name] <= 1
            assert 0 <= values[f"logit_lens_{name}"] <= 1


# ---------------------------------------------------------------- from text and from tasks


@pytest.mark.parametrize("decoder", ["l_spade", "tuned_lens"])
def test_a_lens_from_a_text_file(decoder: str, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "lens"
    given = settings(output, decoder, text=text, layers="all", seed=3)
    lens = fit(lm(), given, command="spade-eval fit ...")
    assert sorted(p.name for p in output.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert sorted(p.name for p in output.parent.iterdir()) == ["lens"]  # no work folder is left
    loaded = LinearLens.from_pretrained(output)
    assert loaded.config == lens.config
    for name, tensor in lens.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    plausible(output, [0, 1, 2, 3])
    told = config(output)
    n = len(text.read_text().split("\n\n"))
    assert told["decoder"] == decoder
    assert told["teacher"] == {"l_spade": "spade", "tuned_lens": "model"}[decoder]
    assert told["fingerprint"] == fingerprint(model())
    assert (told["layers"], told["n_layers"], told["width"]) == ([0, 1, 2, 3], 4, 32)
    assert (told["tasks"], told["split"]) == ([str(text)], "")
    assert told["documents"] + told["bill"]["held_out_documents"] == n
    assert told["bill"]["held_out_documents"] == n // 10
    assert told["n_positions"] == 150
    assert told["bill"]["held_out_positions"] == 15
    fast = bf16_is_fast(torch.device("cpu"))
    assert told["bill"]["precision"] == ("bfloat16" if fast else "float32")
    assert told["tokens"] > 150
    assert (told["seed"], told["positions"], told["rank"]) == (3, "all", None)
    assert (told["command"], told["adapter"]) == ("spade-eval fit ...", None)
    assert told["bill"]["peak_memory_mb"] > 50
    assert told["bill"]["cpu"].endswith(f", {os.cpu_count()} cores")
    card = (output / "README.md").read_text()
    assert "spade-eval fit ..." in card


def test_the_held_out_numbers_are_of_documents_not_trained_on(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[Any]] = []
    plan = states.jobs

    def look(requests: Any, *args: Any) -> Any:
        seen.append([r.context + r.continuation for r in requests])
        return plan(requests, *args)

    monkeypatch.setattr(states, "jobs", look)
    fit(lm(), settings(tmp_path / "lens", text=text, epochs=0))
    training, held_out = seen
    assert not {*training} & {*held_out}
    both = {byte_tokenizer().decode(ids, skip_special_tokens=True) for ids in training + held_out}
    assert both == set(text.read_text().split("\n\n"))


def test_the_table_and_the_metrics_are_those_of_the_map(text: Path, tmp_path: Path) -> None:
    """Read anew, by the lens's own forward, on the held-out positions."""
    held: list[Any] = []
    start = Descent.start

    def look(self: Descent) -> Progress:
        held.append((self.layer, self.held_out))
        return start(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Descent, "start", look)
        lens = fit(lm(), settings(tmp_path / "lens", text=text, layers="1,3", rank=4))
    assert [layer for layer, _ in held] == [1, 3]
    backbone = lm().backbone
    for layer, pairs in held:
        p = backbone.logits(pairs.t).softmax(-1)
        with torch.no_grad():
            q = backbone.logits(lens(pairs.h, layer)).log_softmax(-1)
            plain = backbone.logits(pairs.h).log_softmax(-1)
        told = lens.config.metrics[layer]
        assert told["ce"] == pytest.approx(float(-(p * q).sum(-1).mean()), abs=1e-4)
        assert told["logit_lens_ce"] == pytest.approx(float(-(p * plain).sum(-1).mean()), abs=1e-4)


def test_the_command_on_tasks(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "lens"
    names = "spade_mini_science,spade_mini_yesno"
    argv = arguments(output, saved, "--tasks", names, "--layers", "1:4:2", "--rank", "3")
    assert main([*argv, "--split", "validation", "--seed", "5"]) == 0
    printed = capsys.readouterr().out
    told = config(output)
    assert (told["tasks"], told["split"]) == (names.split(","), "validation")
    assert (told["layers"], told["rank"], told["seed"]) == ([1, 3], 3, 5)
    assert told["base_model"] == str(saved)
    assert told["command"].startswith(
        "spade-eval fit --max_positions 150 --epochs 2 --batch_size 4"
    )
    assert told["command"].endswith("--split validation --seed 5")
    plausible(output, [1, 3])
    assert load_file(output / "model.safetensors")["layers.3.up"].shape == (32, 3)
    for layer in ("1", "3"):
        (row,) = (line for line in printed.splitlines() if line.split()[:1] == [layer])
        assert f"{told['metrics'][layer]['ce']:.3f}" in row
        assert f"{told['metrics'][layer]['logit_lens_ce']:.3f}" in row
    assert f"{told['documents']} documents, 150 positions, {told['tokens']} model tokens" in printed
    assert printed.rstrip().endswith(f"Lens: {output}")


def test_positions_answer_reads_the_answers_only(saved: Path, tmp_path: Path) -> None:
    task = ("--tasks", "spade_mini_science", "--epochs", "0", "--max_positions", "700")
    task += ("--split", "validation")
    for positions in ("answer", "all"):
        argv = arguments(tmp_path / positions, saved, *task, "--positions", positions)
        assert main(argv) == 0
    answer, whole = config(tmp_path / "answer"), config(tmp_path / "all")
    assert (answer["positions"], whole["positions"]) == ("answer", "all")
    # " A" is two bytes: the blank is read at the colon, the letter at the blank.
    assert answer["n_positions"] == 2 * answer["documents"] == 52
    assert whole["documents"] == answer["documents"]
    assert whole["n_positions"] == 700


def test_the_answers_positions_are_those_that_score_it(tmp_path: Path) -> None:
    requests: list[Any] = []
    plan = states.jobs

    def look(given: Any, *args: Any) -> Any:
        requests.extend(given)
        return plan(given, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(states, "jobs", look)
        given = settings(
            tmp_path / "lens", tasks=("spade_mini_yesno",), positions="answer", epochs=0
        )
        fit(lm(), given, include_path=TASKS)
    decode = byte_tokenizer().decode
    assert {decode(r.continuation) for r in requests} == {" yes", " no"}
    assert config(tmp_path / "lens")["bill"]["seconds_training"] > 0  # the closed form costs too


def test_long_documents_lose_their_left_end(tmp_path: Path) -> None:
    """The prompts are several times as long as the 60 tokens the model takes."""
    given = settings(tmp_path / "lens", tasks=("spade_mini_science",), epochs=0, max_positions=600)
    small = build(SpadeLM, max_length=60)
    assert fit(small, given, include_path=TASKS).config.n_positions > 500


# ---------------------------------------------------------------- the same again


def test_the_seed_decides(text: Path, tmp_path: Path) -> None:
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        fit(lm(), settings(tmp_path / name, text=text, seed=seed))
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert weights(tmp_path / "a") != weights(tmp_path / "c")


class KilledError(BaseException):
    """Stands in for a kill where a real one would cost a process."""


@pytest.mark.parametrize("decoder", ["l_spade", "tuned_lens"])
def test_stopped_anywhere_and_resumed_the_lens_is_the_same(
    decoder: str, text: Path, tmp_path: Path
) -> None:
    given = settings(tmp_path / "whole", decoder, text=text, layers="1,2")
    fit(lm(), given)
    given = settings(tmp_path / "parts", decoder, text=text, layers="1,2")
    computed: list[int] = []
    left = [0]

    def tick(*_: Any) -> None:
        computed.append(1)
        left[0] -= 1
        if left[0] < 0:
            raise KilledError

    def wrap(target: Any, name: str, patch: pytest.MonkeyPatch) -> None:
        inner = getattr(target, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            tick()
            found = inner(*args, **kwargs)
            tick()
            return found

        patch.setattr(target, name, call)

    stops = 0
    with pytest.MonkeyPatch.context() as patch:
        wrap(states, "_compute", patch)
        wrap(Progress, "save", patch)
        wrap(LinearLens, "save_pretrained", patch)
        while not (tmp_path / "parts").exists():
            left[0] = 5  # each run gets a little further: the work folder remembers
            before = len(computed)
            try:
                fit(lm(), given, resume=given.work.exists())
            except KilledError:
                stops += 1
                assert stops < 40
            assert len(computed) > before
    assert stops > 3
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert config(tmp_path / "parts")["metrics"] == config(tmp_path / "whole")["metrics"]


def _command(argv: list[str], log: str) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(main(argv))


def kill_and_resume(kills: int, text: Path, saved: Path, folder: Path, seed: int) -> None:
    """Real processes, forked from one that has imported everything, and SIGKILL."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["spade_eval.fit.run", "spade_eval.lm.base", "spade_eval.cli"])
    log = folder / "log.txt"

    def start(output: Path, *more: str) -> Any:
        argv = arguments(output, saved, "--text", str(text), "--layers", "1,2,3", *more)
        process = context.Process(target=_command, args=(argv, str(log)))
        process.start()
        return process

    def appears(path: Path, process: Any) -> float:
        while not path.exists() and process.is_alive():
            time.sleep(0.005)
        return time.perf_counter()

    whole = folder / "whole"
    process = start(whole)
    begin = appears(folder / ".whole.fit", process)
    process.join()
    span = time.perf_counter() - begin  # of what may be resumed
    assert whole.exists(), log.read_text()

    rng = random.Random(seed)
    killed = 0
    for attempt in itertools.count():
        output = folder / f"parts-{attempt}"
        work = output.with_name(f".{output.name}.fit")
        while not output.exists():
            resumes = work.exists()
            process = start(output, *(["--resume"] if resumes else []))
            if killed < kills:
                # Loading takes most of the time: a run that resumes is killed there, too.
                appears(work, process)
                process.join(rng.uniform(0, 2 * span if resumes else span))
                if process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
                    killed += 1
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL), log.read_text()
        assert weights(output) == weights(whole)
        if killed >= kills:
            return


def test_killed_and_resumed_the_lens_is_the_same(text: Path, saved: Path, tmp_path: Path) -> None:
    kill_and_resume(2, text, saved, tmp_path, seed=0)


@pytest.mark.slow
def test_killed_twenty_times_and_resumed(text: Path, saved: Path, tmp_path: Path) -> None:
    kill_and_resume(20, text, saved, tmp_path, seed=time.time_ns())


# ---------------------------------------------------------------- what is there already


def half_done(given: FitSettings, after: int = 1) -> None:
    """Leave a work folder: stopped after so many saved epochs."""
    saves = [0]
    save = Progress.save

    def stop(self: Progress, path: Path) -> None:
        save(self, path)
        saves[0] += 1
        if saves[0] == after:
            raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "save", stop)
        with pytest.raises(KilledError):
            fit(lm(), given)


def test_an_existing_lens_stays_unless_told_otherwise(text: Path, tmp_path: Path) -> None:
    output = tmp_path / "lens"
    output.mkdir()  # an empty folder is free
    given = settings(output, text=text, epochs=0)
    fit(lm(), given)
    before = {p.name: p.read_bytes() for p in output.iterdir()}
    other = settings(output, text=text, epochs=0, seed=1)
    for resume in (False, True):
        with pytest.raises(UserError, match=r"lens exists. Give another --output, or --overwrite"):
            fit(lm(), other, resume=resume)
    assert {p.name: p.read_bytes() for p in output.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["lens"]
    fit(lm(), other, overwrite=True)
    assert weights(output) != before["model.safetensors"]
    assert config(output)["seed"] == 1


def test_a_run_that_has_not_ended_is_resumed_or_begun_anew(text: Path, tmp_path: Path) -> None:
    given = settings(tmp_path / "lens", text=text)
    half_done(given)
    with pytest.raises(UserError, match=r"\.lens\.fit holds a run that has not ended: --resume"):
        fit(lm(), given)
    other = settings(tmp_path / "lens", text=text, seed=1)
    fit(lm(), other, overwrite=True)
    assert config(tmp_path / "lens")["seed"] == 1
    assert not given.work.exists()
    with pytest.raises(UserError, match=r"nothing to resume: .*\.fit does not exist"):
        fit(lm(), settings(tmp_path / "new", text=text), resume=True)


def test_an_overwriting_run_that_was_killed_can_be_resumed(text: Path, tmp_path: Path) -> None:
    """The old lens is still there, and what has been computed for the new one is not thrown away."""
    output = tmp_path / "lens"
    fit(lm(), settings(output, text=text, epochs=0))
    before = weights(output)
    given = settings(output, text=text, seed=1)
    half_done_over = given.work
    saves = [0]
    save = Progress.save

    def stop(self: Progress, path: Path) -> None:
        save(self, path)
        saves[0] += 1
        raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "save", stop)
        with pytest.raises(KilledError):
            fit(lm(), given, overwrite=True)
    assert weights(output) == before
    assert half_done_over.exists()

    def never(*_: Any) -> None:
        raise AssertionError("states were computed again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(states, "_compute", never)
        fit(lm(), given, resume=True, overwrite=True)
    assert config(output)["seed"] == 1
    assert weights(output) != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"seed was 0, is 1"),
        ({"epochs": 3}, r"epochs was 2, is 3"),
        ({"rank": 3}, r"rank was None, is 3"),
        ({"layers": "1"}, r"layers was \[2\], is \[1\]"),
        ({"decoder": "tuned_lens"}, r"decoder was 'l_spade', is 'tuned_lens'"),
        ({"max_positions": 151}, r"max_positions was 150, is 151"),
        ({"positions": "answer"}, r"positions was 'all', is 'answer'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_resuming_with_other_settings_names_the_difference(
    change: dict, message: str, text: Path, tmp_path: Path, half: Path
) -> None:
    shutil.copytree(half, tmp_path / ".lens.fit")
    given = settings(tmp_path / "lens", **({"text": text} | change))
    with pytest.raises(UserError, match=rf"other settings \(.*{message}.*--overwrite"):
        fit(lm(), given, resume=True)
    fit(lm(), settings(tmp_path / "lens", text=text), resume=True)  # it was left as it was


@pytest.fixture(scope="module")
def half(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a run that was stopped."""
    given = settings(tmp_path_factory.mktemp("half") / "lens", text=text)
    half_done(given)
    return given.work


def test_resuming_with_other_text_or_another_model_is_refused(
    text: Path, tmp_path: Path, half: Path
) -> None:
    shutil.copytree(half, tmp_path / ".lens.fit")
    given = settings(tmp_path / "lens", text=text)
    with pytest.raises(UserError, match=r"other settings \(.*model was '"):
        fit(build(SpadeLM, "gpt2"), given, resume=True)
    content = text.read_text()
    try:
        text.write_text(content + "\n\nand one more")
        with pytest.raises(UserError, match=r"other settings \(documents was \["):
            fit(lm(), given, resume=True)
    finally:
        text.write_text(content)


def test_a_damaged_layer_of_a_stopped_run_says_what_to_do(
    text: Path, tmp_path: Path, half: Path
) -> None:
    shutil.copytree(half, tmp_path / ".lens.fit")
    given = settings(tmp_path / "lens", text=text)
    path = given.work / "layer-2.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"layer-2\.safetensors is damaged"):
        fit(lm(), given, resume=True)
    path.unlink()
    fit(lm(), given, resume=True)
    fit(lm(), settings(tmp_path / "whole", text=text))
    assert weights(tmp_path / "lens") == weights(tmp_path / "whole")


def test_training_that_stops_early_is_told_and_leaves_the_best_map(
    text: Path, tmp_path: Path, caplog: Any
) -> None:
    epoch = Descent._epoch

    def spoil(self: Descent, n: int) -> str | None:
        if n == 2:
            self.training = type(self.training)(self.training.h * float("nan"), self.training.t)
        return epoch(self, n)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Descent, "_epoch", spoil)
        lens = fit(lm(), settings(tmp_path / "lens", text=text, epochs=4))
    assert "layer 2, epoch 2, step 0: loss nan" in caplog.text
    once = fit(lm(), settings(tmp_path / "once", text=text, epochs=4))
    assert all(tensor.isfinite().all() for tensor in lens.state_dict().values())
    plausible(tmp_path / "lens", [2])
    assert lens.config.metrics[2]["ce"] >= once.config.metrics[2]["ce"]


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("form", "layers"),
    [
        (None, [2, 4, 6]),
        ("all", list(range(8))),
        ("1:8:3", [1, 4, 7]),
        ("2:5", [2, 3, 4]),
        ("5", [5]),
        ("6,0,3,3", [0, 3, 6]),
        ("7:1:-3", [4, 7]),
    ],
)
def test_layers(form: str | None, layers: list[int]) -> None:
    assert layer_list(form, 8) == layers


@pytest.mark.parametrize("form", ["", "a", "1,", "1:", "1:8:0", "1:2:3:4", "1.5", "even", "1;2"])
def test_layers_of_another_form(form: str) -> None:
    with pytest.raises(UserError, match=r"write FROM:TO:STEP \(TO excluded\), a list"):
        layer_list(form, 8)


@pytest.mark.parametrize("form", ["8", "-1", "3,9", "2:10:2", "5:5", "5:2"])
def test_layers_out_of_range(form: str) -> None:
    with pytest.raises(UserError, match=r"this model takes maps at 0\.\.7 \(layer 8 is the model"):
        layer_list(form, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": "4"}, r"names layers \[4\]; this model takes maps at 0\.\.3"),
        ({"rank": 33}, r"rank=33 is out of range.*1\.\.32"),
        ({"text": None, "tasks": ("spade_mini_scince",)}, r"unknown task 'spade_mini_scince'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_settings_leave_nothing_behind(
    change: dict, message: str, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        fit(lm(), settings(tmp_path / "lens", **({"text": text} | change)), include_path=TASKS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [("just one text", "one document only"), ("a\n\nb", "too short"), (" \n\n ", "no text in it")],
)
def test_too_little_text(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        fit(lm(), settings(tmp_path / "lens", text=path))
    assert [p.name for p in tmp_path.iterdir()] == ["t.txt"]


def test_few_positions_are_no_worse_than_no_map(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("abcdef\n\naaaaaa\n\nqxyzw")
    lens = fit(lm(), settings(tmp_path / "lens", text=path, layers="all"))
    plausible(tmp_path / "lens", [0, 1, 2, 3])
    assert all(tensor.isfinite().all() for tensor in lens.state_dict().values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--max_positions", "5"], "--max_positions 5: give a whole number from 10 up"),
        (["--epochs", "-1"], "--epochs -1: give a whole number from 0 up"),
        (["--rank", "0"], "--rank 0: give a whole number from 1 up"),
        (["--decoder", "tunedlens"], "Did you mean 'tuned_lens'?"),
        (["--layres", "3"], "Did you mean '--layers'?"),
        (["--tasks", "arc_easy"], "not allowed with argument"),
        (["--positions", "answers"], "invalid choice: 'answers'"),
        (["--resume"], "There is nothing to resume"),
        (["--output", "."], ". exists. Give another --output"),
        (["--output", "/"], "/ exists. Give another --output"),
    ],
)
def test_bad_arguments_are_told_before_anything_is_loaded(
    change: list[str], message: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(tmp_path / "lens", tmp_path / "no_model", "--text", str(text), *change)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_missing_arguments_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lens = str(tmp_path / "lens")
    for argv, message in [
        (["fit", "--decoder", "l_spade", "--output", lens], "--tasks --text is required"),
        (["fit", "--text", "x", "--output", lens], "required: --decoder"),
        (["fit", "--decoder", "l_spade", "--output", lens, "--text", "nowhere"], "no such file"),
    ]:
        assert main(argv) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help"])
    assert stop.value.code == 0
    assert "accelerate launch -m spade_eval fit" in capsys.readouterr().out


def test_the_folder_cannot_be_written(text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written: "):
        fit(lm(), settings(tmp_path / "file" / "lens", text=text))
