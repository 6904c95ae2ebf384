"""Thresholds with a guarantee: the test itself, the file, and who may use it."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from math import comb
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_lm import build, instances, model
from test_sweep import lens

from spade_eval import adapter_files
from spade_eval.arguments import tasks_path
from spade_eval.atomic import write_json
from spade_eval.calibration import Calibration
from spade_eval.cli import main
from spade_eval.errors import UserError
from spade_eval.fit.documents import load_tasks
from spade_eval.lm.exit import LensExitLM, SpadeExitLM
from spade_eval.splits import Split
from spade_eval.sweep.calibrate import CalibrateSettings, calibrate, grid_of_thresholds
from spade_eval.sweep.certify import certify, least_drop, p_values
from spade_eval.sweep.grid import Ask
from spade_eval.sweep.lm import SweepLM
from spade_eval.sweep.unseen import require_once, require_unseen

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("one_thread")

TASK = "spade_mini_science"
RULE = {
    "interval": 1, "min_layer": 1, "confidence": "entropy", "exit_scope": "context",
    "positions": "reset", "readout": "spade",
}  # fmt: skip


# ---------------------------------------------------------------- the test


def test_p_values_are_exact() -> None:
    n, bound = 30, Fraction(1, 10)
    for k in (0, 1, 5, 30):
        exact = sum(comb(n, i) * bound**i * (1 - bound) ** (n - i) for i in range(k + 1))
        assert p_values([k], n, 0.1) == [pytest.approx(float(exact), rel=1e-9)]


def test_testing_stops_at_the_first_failure() -> None:
    # 0 of 100 certifies 0.05 with 95 %, 1 does not (p = 0.037 and 0.037 + ...): known values.
    assert p_values([1, 2], 100, 0.05) == [
        pytest.approx(0.0371, abs=1e-4),
        pytest.approx(0.1183, abs=1e-4),
    ]
    assert certify([0, 1, 2, 0, 0], 100, 0.05, 0.95) == 1
    assert certify([2, 0, 0], 100, 0.05, 0.95) is None
    assert certify([0, 0, 0], 100, 0.05, 0.95) == 2
    assert certify([], 100, 0.05, 0.95) is None


@given(st.integers(1, 5000), st.floats(0.5, 0.999))
def test_the_smallest_drop_is_where_no_harm_is_just_enough(n: int, confidence: float) -> None:
    drop = least_drop(n, confidence)
    assert 0 < drop < 1
    assert certify([0], n, min(drop * 1.001, 0.9999), confidence) == 0
    assert certify([0], n, drop * 0.999, confidence) is None


def violations(
    trials: int, seed: int, n: int = 150, bound: float = 0.05, confidence: float = 0.9
) -> float:
    """How often the true risk of the certified threshold is above the bound.

    A document is harmed from a threshold of its own on, and at some it recovers: the risk is known.
    """
    rng = np.random.default_rng(seed)
    points = 40
    true = np.linspace(0, 0.12, points)  # risk of threshold j
    broken = 0
    for _ in range(trials):
        harmed_from = rng.uniform(0, 1, n)
        found = certify((harmed_from[:, None] < true).sum(0).tolist(), n, bound, confidence)
        broken += found is not None and true[found] > bound
    return broken / trials


def test_the_guarantee_holds_at_its_nominal_rate() -> None:
    rate = violations(2000, seed=0)
    # A level of 10 %, and three standard errors of 2,000 trials.
    assert rate <= 0.1 + 3 * (0.1 * 0.9 / 2000) ** 0.5
    # It is not just cautious: a test at half the level would stay below this.
    assert rate > 0.01


# ---------------------------------------------------------------- from a model to a file


def ask(**kwargs: Any) -> Ask:
    rule = {**RULE, **kwargs}
    kind = "l_spade"
    return Ask(
        decoders=(kind, "spade"), layers=(), thresholds=(0.5, 3.0, 3.5, 4.0, 9.0),
        confidences=(rule["confidence"],), scopes=(rule["exit_scope"],), readouts=(rule["readout"],),
        interval=rule["interval"], min_layer=rule["min_layer"],
    )  # fmt: skip


def settings(**kwargs: Any) -> CalibrateSettings:
    asked = CalibrateSettings((TASK,), "validation", 0.6, 0.9, RULE)
    return replace(asked, **kwargs)


def sweep_lm(**kwargs: Any) -> Any:
    return build(
        SweepLM,
        ask=ask(),
        maps=[("lens", kwargs.pop("lens", lens("l_spade", 1)))],
        max_length=255,
        **kwargs,
    )


def tasks() -> dict[str, Any]:
    return load_tasks([TASK], tasks_path())


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Calibration, Path]:
    path = tmp_path_factory.mktemp("calibration") / "calibration.json"
    found, curve = calibrate(sweep_lm(), tasks(), settings(), "spade-eval calibrate ...")
    assert found is not None
    assert curve.attrs["documents"] == found.documents
    write_json(path, found.to_json())
    return found, path


def test_the_curve_counts_what_separate_runs_do(calibrated: tuple[Calibration, Path]) -> None:
    found, _ = calibrated
    task = tasks()[TASK]
    rows = list(task.validation_docs())
    assert found.documents == len(rows)

    def hits(lm: Any) -> list[bool]:
        right = []
        for _i, row in enumerate(rows):
            context = task.fewshot_context(row, num_fewshot=0)
            pairs = [(context, " " + choice) for choice in task.doc_to_choice(row)]
            requests = instances(pairs)
            for request in requests:
                request.task_name = TASK
            values = [value for value, _ in lm.loglikelihood(requests)]
            right.append(int(np.argmax(values)) == task.doc_to_target(row))
        return right

    rule = {k: v for k, v in RULE.items() if k != "positions"}
    full = hits(build(SpadeExitLM, threshold=-1, lens=lens("l_spade", 1), max_length=255, **rule))
    for point in found.curve:
        if point["threshold"] not in (3.5, 9.0):
            continue
        lm = build(
            SpadeExitLM,
            threshold=point["threshold"],
            lens=lens("l_spade", 1),
            max_length=255,
            **rule,
        )
        ours = hits(lm)
        assert point["harmed"] == sum(a and not b for a, b in zip(full, ours, strict=True))
        assert point["acc"] == pytest.approx(np.mean(ours), abs=1e-6)
        assert point["net_drop"] == pytest.approx(np.mean(full) - np.mean(ours), abs=1e-6)


def test_a_calibrated_model_runs_with_its_threshold(calibrated: tuple[Calibration, Path]) -> None:
    found, path = calibrated
    requests = instances([("Q: the cat", " runs"), ("Q: the cat", " sleeps")])
    for request in requests:
        request.task_name = TASK
    own = {"lens": lens("l_spade", 1), "max_length": 255}
    lm = build(SpadeExitLM, threshold="calibrated", calibration=path, **own)
    rule = {k: v for k, v in RULE.items() if k != "positions"}
    plain = build(SpadeExitLM, threshold=found.threshold, **rule, **own)
    assert lm.loglikelihood(requests) == plain.loglikelihood(requests)
    assert lm.rule == plain.rule
    # What was calibrated may be said again, and nothing else.
    build(SpadeExitLM, threshold="calibrated", calibration=path, interval=1, **own)
    with pytest.raises(UserError, match="interval=2, calibrated with 1"):
        build(SpadeExitLM, threshold="calibrated", calibration=path, interval=2, **own)


def test_a_calibration_is_of_one_model_one_lens_and_its_tasks(
    calibrated: tuple[Calibration, Path],
) -> None:
    _, path = calibrated
    own = {"threshold": "calibrated", "calibration": path, "max_length": 255}
    with pytest.raises(UserError, match="another lens"):
        build(SpadeExitLM, lens=lens("l_spade", 2), **own)
    with pytest.raises(UserError, match="another model"):
        build(SpadeExitLM, "mistral_sliding", lens=lens("l_spade", 1, "mistral_sliding"), **own)
    lm = build(SpadeExitLM, lens=lens("l_spade", 1), **own)
    with pytest.raises(UserError, match=f"holds for {TASK}, not for task"):
        lm.loglikelihood(instances([("Q: the cat", " runs")]))


def test_a_bound_on_several_tasks_is_no_bound_on_one(
    calibrated: tuple[Calibration, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found, _ = calibrated
    path = tmp_path / "two.json"
    both = replace(found, tasks=(TASK, "other"), documents_by_task={TASK: 28, "other": 3})
    write_json(path, both.to_json())
    own = {"threshold": "calibrated", "calibration": path, "max_length": 255}
    lm = build(SpadeExitLM, lens=lens("l_spade", 1), **own)
    assert f"in the proportions of calibration ({TASK}: 28, other: 3)" in caplog.text
    requests = instances([("Q: the cat", " runs"), ("Q: the dog", " runs")])
    for request in requests:
        request.task_name = TASK
    with pytest.raises(UserError, match="together; without other it says nothing of the others"):
        lm.loglikelihood(requests)
    requests[1].task_name = "other"
    assert len(lm.loglikelihood(requests)) == 2


def test_documents_that_an_adapter_has_seen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lm = sweep_lm()
    lm.peft = str(tmp_path)
    made = {"tasks": [TASK], "validation_documents": 7}
    (tmp_path / adapter_files.RECORD).write_text(json.dumps(made))
    with pytest.raises(UserError, match=f"train documents of {TASK} trained the adapter"):
        calibrate(lm, tasks(), settings(split="train"), "")
    require_unseen(lm, tasks(), Split("test"), tasks_path())
    assert "chose the step" not in caplog.text
    require_unseen(lm, tasks(), Split("validation"), tasks_path())
    assert f"7 validation documents, of {TASK} among others, chose the step" in caplog.text
    made["settings"] = {"validation_split": "validation[:2]"}
    (tmp_path / adapter_files.RECORD).write_text(json.dumps(made))
    caplog.clear()
    require_unseen(lm, tasks(), Split("validation", 2), tasks_path())
    assert "chose the step" not in caplog.text
    require_unseen(lm, tasks(), Split("validation", 1), tasks_path())
    assert "chose the step" in caplog.text
    same = tasks()
    same[TASK].config.validation_split = same[TASK].config.training_split
    with pytest.raises(UserError, match=f"train documents of {TASK} trained the adapter"):
        require_unseen(lm, same, Split("validation"), tasks_path())
    caplog.clear()
    (tmp_path / adapter_files.RECORD).write_text("[]")  # not ours
    lm.maps["text"] = ("text", lens("l_spade", 1))  # no tasks are named
    require_unseen(lm, tasks(), Split("validation"), tasks_path())
    assert f"the lens text and the adapter {tmp_path} is not known here" in caplog.text
    require_unseen(lm, tasks(), Split("train"), tasks_path())


def test_every_lens_is_looked_at_and_the_rows_are_named() -> None:
    def trained(kind: str, split: str) -> Any:
        found = lens(kind, 1)
        found.config = replace(found.config, tasks=(TASK,), split=split)
        return found

    first, second = trained("l_spade", "validation[:9]"), trained("tuned_lens", "train")
    lm = build(SweepLM, ask=ask(), maps=[("x", first), ("x", second)], max_length=255)
    with pytest.raises(UserError, match=r"the validation\[:9\] documents of .* trained the lens x"):
        require_unseen(lm, tasks(), Split("validation", 5), tasks_path())
    require_unseen(lm, tasks(), Split("validation", 9), tasks_path())


def test_what_cannot_be_certified_costs_no_pass() -> None:
    lm = sweep_lm()
    with pytest.raises(UserError, match="20 documents are too few"):
        calibrate(lm, tasks(), settings(max_drop=0.05, limit=20), "")
    texts = load_tasks(["spade_mini_articles"], tasks_path())
    with pytest.raises(UserError, match="spade_mini_articles has no metric acc"):
        calibrate(lm, texts | tasks(), settings(), "")
    assert lm.account.seconds == 0


def test_documents_count_once() -> None:
    names = ["spade_mini_yesno", "spade_mini_science", "spade_mini_science_text"]
    twice = load_tasks(names, tasks_path())
    message = "spade_mini_science and spade_mini_science_text ask about the same documents"
    with pytest.raises(UserError, match=message):
        calibrate(sweep_lm(), twice, settings(limit=20), "")
    require_once({name: twice[name] for name in names[:2]}, "validation")
    # Functions of their own may make two tasks of different rows of one set.
    halves = [twice[name] for name in names[1:]]
    with pytest.MonkeyPatch.context() as patch:
        for n, task in enumerate(halves):
            patch.setattr(task.config, "process_docs", lambda rows: rows)
            part = task.validation_docs().filter(lambda row, i, n=n: i % 2 == n, with_indices=True)
            patch.setattr(task, "validation_docs", lambda part=part: part)
        require_once(dict(zip(names[1:], halves, strict=True)), "validation")
        patch.setattr(halves[0], "validation_docs", halves[1].validation_docs)
        with pytest.raises(UserError, match="ask about the same documents"):
            require_once(dict(zip(names[1:], halves, strict=True)), "validation")


def test_a_share_of_an_answer_cannot_be_harmed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the probability of all true answers, which TruthfulQA's mc2 calls acc."""
    asked = tasks()
    monkeypatch.setattr(asked[TASK], "process_results", lambda doc, results: {"acc": 0.25})
    with pytest.raises(UserError, match=f"task {TASK}: its acc is a share"):
        calibrate(sweep_lm(), asked, settings(limit=20, max_drop=0.5), "")


def test_no_threshold_may_meet_the_bound(tmp_path: Path) -> None:
    found, curve = calibrate(sweep_lm(), tasks(), settings(max_drop=0.16), "")
    harmed = curve["harmed"].tolist()
    assert found is None or harmed[0] == 0
    assert harmed[-1] >= harmed[0]


def test_a_calibration_without_a_chat_template_refuses_one(
    calibrated: tuple[Calibration, Path],
) -> None:
    own = {"lens": lens("l_spade", 1), "max_length": 255}
    lm = build(SpadeExitLM, threshold="calibrated", calibration=calibrated[1], **own)
    with pytest.raises(UserError, match="holds for runs without --apply_chat_template"):
        lm.apply_chat_template([{"role": "user", "content": "x"}])


def test_bad_calibrations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"documents are too few.*at best"):
        calibrate(sweep_lm(), tasks(), settings(max_drop=0.0001), "")
    trained = lens("l_spade", 1)
    trained.config = replace(trained.config, tasks=(TASK,), split="validation")
    with pytest.raises(UserError, match=f"validation documents of {TASK} trained the lens"):
        calibrate(sweep_lm(lens=trained), tasks(), settings(), "")
    # Also under the name of a group that holds the task.
    trained.config = replace(trained.config, tasks=("spade_mini",))
    with pytest.raises(UserError, match=f"validation documents of {TASK} trained the lens"):
        calibrate(sweep_lm(lens=trained), tasks(), settings(), "", tasks_path())
    # Rows that it has not seen, and a task that is nowhere.
    for names, split in (((TASK,), "validation[:2]"), (("nowhere",), "validation")):
        trained.config = replace(trained.config, tasks=names, split=split)
        part = settings(split="validation[2:]", limit=20)
        calibrate(sweep_lm(lens=trained), tasks(), part, "", tasks_path())
    pages = load_tasks(["spade_mini_articles"], tasks_path())
    with pytest.raises(UserError, match="has no metric acc"):
        calibrate(sweep_lm(), pages, settings(limit=2), "")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    with pytest.raises(UserError, match="there is no"):
        Calibration.load(path)
    path.write_text('{"threshold": 1')
    with pytest.raises(UserError, match="not readable JSON"):
        Calibration.load(path)
    path.write_text('{"results": {}}')
    with pytest.raises(UserError, match="not what `spade-eval calibrate` writes"):
        Calibration.load(path)
    for rule in ({}, {name: None for name in RULE if name != "readout"}, RULE):
        path.write_text(json.dumps({"threshold": 1, "rule": rule, "tasks": [], "model": {}}))
        with pytest.raises(UserError, match="incomplete"):
            Calibration.load(path)
    with pytest.raises(UserError, match="goes with threshold=calibrated"):
        SpadeExitLM(pretrained=model(), threshold=1.0, calibration=path)
    with pytest.raises(UserError, match="is not a number"):
        LensExitLM(pretrained=model(), threshold="calibrate")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--max-drop 1.5", "between 0 and 1"),
        ("--max_drop=1.5", "between 0 and 1"),
        ("--max-drop 0.1 --apply-chat-template --num-fewshot x", "--num_fewshot: invalid int"),
        ("--max-drop 0.1 --confidence 95", "between 0 and 1"),
        ("--max-drop 0.1 --split dev", "split='dev' is not known"),
        ("--max-drop 0.1 --model_args threshold=2", "it is what will be found"),
        ("--max-drop 0.1 --model_args confidence=entropi", "Did you mean 'entropy'"),
        ("--max-drop 0.1 --model_args lens=identity", "goes with readout=lens"),
        ("--max-drop 0.1 --output /proc/nowhere/x.json", "cannot be written"),
        ("--max-drop 0.1 --output /tmp --overwrite", "Give another file as --output"),
        ("--max-drop 0.1 --splt test", "Did you mean '--split'"),
    ],
)
def test_bad_arguments_are_told_at_once(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["calibrate", "--tasks", TASK, "--output", str(tmp_path / "x.json"), *arguments.split()]
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_a_tuned_lens_is_calibrated_with_its_own_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lens("tuned_lens", 1).save_pretrained(tmp_path / "tuned")
    argv = ["calibrate", "--tasks", TASK, "--output", str(tmp_path / "x.json"), "--max-drop", "0.1"]
    assert main([*argv, "--model_args", f"lens={tmp_path / 'tuned'}"]) == 2
    assert "tuned goes with readout=lens" in capsys.readouterr().err


def test_documents_that_lm_eval_evaluates_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    for split, warned in (("test[:30]", True), ("validation", False)):
        caplog.clear()
        calibrate(sweep_lm(), tasks(), settings(split=split, limit=20), "")
        assert ("Calibrating on test documents of" in caplog.text) == warned


def test_what_was_calibrated_is_what_answers(
    calibrated: tuple[Calibration, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found, path = calibrated
    own = {"threshold": "calibrated", "max_length": 255, "lens": lens("l_spade", 1)}
    with pytest.raises(UserError, match="calibrated with readout=spade, and lens_exit answers"):
        build(LensExitLM, calibration=path, **own)
    with pytest.raises(
        UserError, match=r"readout=lens, calibrated with spade\. Leave the argument"
    ):
        build(SpadeExitLM, calibration=path, readout="lens", **own)
    write_json(tmp_path / "c.json", replace(found, num_fewshot=5).to_json())
    build(SpadeExitLM, calibration=tmp_path / "c.json", **own)
    assert "holds for runs with --num_fewshot 5, without --apply_chat_template" in caplog.text
    build(SpadeExitLM, calibration=path, **own)
    assert "holds for runs without --num_fewshot, without --apply_chat_template" in caplog.text


def test_thresholds_are_fixed_beforehand() -> None:
    entropies = grid_of_thresholds("entropy")
    assert entropies[:3] == (0.0, 0.05, 0.1)
    assert entropies[-1] == 12.6
    assert grid_of_thresholds("choice_entropy")[-1] == 3.48
    assert grid_of_thresholds("max_prob")[0] == 0.0
    assert grid_of_thresholds("max_prob")[-1] == 1.0
