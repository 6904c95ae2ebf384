"""`spade-eval compare` and `spade-eval check` on results files, as lm-eval writes them."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spade_eval.arguments import tasks_path
from spade_eval.cli import main
from spade_eval.errors import UserError
from spade_eval.report.baseline import read_run, write_baseline
from spade_eval.report.check import Comparison, compare, refuse
from spade_eval.report.runs import Run, Score, TaskScores
from spade_eval.report.summary import check_text, comparison_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

DATE = "2026-03-01T10-00-00.000000"
GROUP = """\
group: pair
task: [spade_mini_science, spade_mini_yesno]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


# ---------------------------------------------------------------- runs to compare


def written(
    folder: Path,
    right: dict[str, Sequence[float]],
    date: str = DATE,
    *,
    samples: bool = True,
    first_doc: int = 0,
    order: Sequence[int] | None = None,
    **changes: Any,
) -> Path:
    """Write a results file, and samples, with an outcome `acc` per document of each task."""
    folder.mkdir(parents=True, exist_ok=True)
    raw: dict[str, Any] = {
        "results": {},
        "group_subtasks": {},
        "versions": dict.fromkeys(right, 1.0),
        "n-shot": dict.fromkeys(right, 0),
        "higher_is_better": {task: {"acc": True} for task in right},
        "n-samples": {task: {"original": 999, "effective": len(right[task])} for task in right},
        "config": {"model": "spade_layer", "model_args": {"layer": 24}, "limit": None},
    }
    for task, values in right.items():
        n = len(values)
        stderr = float(np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else "N/A"
        raw["results"][task] = {
            "alias": task,
            "sample_len": n,
            "acc,none": float(np.mean(values)),
            "acc_stderr,none": stderr,
        }
        if samples:
            lines = [
                json.dumps(
                    {
                        "doc_id": doc,
                        "doc_hash": f"{task}{doc + first_doc:08d}"[-8:] * 8,
                        "filter": "none",
                        "metrics": ["acc"],
                        "acc": values[doc],
                    }
                )
                for doc in (order if order is not None else range(n))
            ]
            (folder / f"samples_{task}_{date}.jsonl").write_text("\n".join(lines) + "\n")
    for key, value in changes.items():
        raw[key] = raw.get(key, {}) | value if isinstance(value, dict) else value
    path = folder / f"results_{date}.json"
    path.write_text(json.dumps(raw))
    return path


def answers(n: int, share: float, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [float(rng.random() < share) for _ in range(n)]


def worse(values: Sequence[float], n: int) -> list[float]:
    """The same answers, the first n right ones wrong."""
    left = n
    out = []
    for value in values:
        spoil = value == 1.0 and left > 0
        left -= spoil
        out.append(0.0 if spoil else value)
    return out


def scored(acc: Sequence[float], higher: bool | None = True) -> TaskScores:
    outcomes = np.array(acc, dtype=float)
    documents = tuple(f"d{i}" for i in range(len(acc)))
    score = Score.with_outcomes(float(outcomes.mean()), None, higher, outcomes)
    return TaskScores({"acc": score}, 1.0, 0, len(acc), documents)


def run_of(**tasks: TaskScores) -> Run:
    return Run("here.json", {"model": "spade_layer"}, tasks)


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    return captured.err


BASE = answers(200, 0.6)


# ---------------------------------------------------------------- check


def test_the_same_run_passes_and_a_worse_one_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = written(tmp_path / "before", {"arc": BASE})
    after = written(
        tmp_path / "after", {"arc": worse(BASE, 20)}, config={"model_args": {"layer": 12}}
    )
    assert main(["check", str(before), "--baseline", str(before)]) == 0
    assert "PASSED (tolerance 0.01, alpha 0.05, 1 test)" in capsys.readouterr().out
    assert main(["check", str(after), "--baseline", str(before)]) == 1
    out = capsys.readouterr().out
    assert "differs: layer 24 -> 12" in out
    row = next(line for line in out.splitlines() if line.startswith("| arc"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:3] == ["arc", "acc", "200"]
    assert cells[5] == "-0.1000"
    assert cells[-3:] == ["McNemar", "< 0.0001", "REGRESSION"]
    assert "FAILED: 1 regression (" in out
    assert "0.1 worse" in out


def test_accounts_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    account = {"mean_exit_layer": 21.375, "token_layer_ratio": 0.8126, "seconds": 12.34}
    runs = [
        written(tmp_path / name, {"arc": BASE}, config={"spade": {"account": told}})
        for name, told in (("a", account), ("b", {}), ("c", {"seconds": "12", "tokens": 1}))
    ]
    line = "mean exit layer 21.38, 81.3% of full depth computed, 12.3 s of scoring"
    for other in runs[1:]:
        assert main(["compare", str(runs[0]), str(other)]) == 0
        shown = capsys.readouterr().out.splitlines()
        assert shown[1].strip() == line
        assert shown[2].startswith("b: ")
        assert "scoring" not in "".join(shown[2:])


def test_a_folder_means_its_newest_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "model"
    written(out, {"arc": BASE}, "2026-03-01T10-00-00.000000")
    newest = written(out, {"arc": worse(BASE, 30)}, "2026-03-02T09-00-00.000000")
    baseline = written(tmp_path / "base", {"arc": BASE})
    assert main(["check", str(tmp_path / "out"), "--baseline", str(baseline)]) == 1
    captured = capsys.readouterr()
    assert f"holds 2 results files; took the newest, {newest}" in captured.err


def test_shuffled_samples_pass(tmp_path: Path) -> None:
    before = written(tmp_path / "before", {"arc": BASE})
    order = random.Random(3).sample(range(200), 200)
    after = written(tmp_path / "after", {"arc": BASE}, order=order)
    found = compare(read_run(before)[0], read_run(after)[0])
    assert found.rows[0].difference.p == 1.0
    assert found.rows[0].difference.n == 200
    assert main(["check", str(after), "--baseline", str(before)]) == 0


def test_documents_with_the_same_text_stay_apart(tmp_path: Path) -> None:
    file = written(tmp_path, {"arc": [1.0, 0.0, 1.0]})
    samples = tmp_path / f"samples_arc_{DATE}.jsonl"
    lines = [json.loads(line) | {"doc_hash": "0" * 64} for line in samples.read_text().splitlines()]
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = read_run(file)[0].tasks["arc"]
    assert task.documents == ("000000000000", "000000000000#1", "000000000000#2")
    assert task.scores["acc"].outcomes.tolist() == [1.0, 0.0, 1.0]


def test_a_check_that_cannot_fail_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Five documents that all get worse have p = 0.0625."""
    for n, told in ((5, True), (6, False)):
        base = written(tmp_path / f"base{n}", {"arc": [1.0] * n})
        run = written(tmp_path / f"run{n}", {"arc": [0.0] * n})
        assert main(["check", str(run), "--baseline", str(base)]) == (0 if told else 1)
        note = "too few documents for 1 test to fail at alpha 0.05, whatever they lose: arc (5)"
        assert (note in capsys.readouterr().out) == told


def test_a_drop_must_be_larger_than_the_tolerance_and_than_chance(tmp_path: Path) -> None:
    base = written(tmp_path / "base", {"arc": BASE})

    def status(lost: int, *more: str) -> int:
        run = written(tmp_path / f"lost{lost}", {"arc": worse(BASE, lost)})
        return main(["check", str(run), "--baseline", str(base), *more])

    assert status(2) == 0  # one point: within the tolerance
    assert status(4) == 0  # p = 0.125
    assert status(8) == 1  # p = 0.008
    assert status(8, "--alpha", "0.001") == 0
    assert status(8, "--tolerance", "0.04") == 0
    assert status(8, "--tolerance", "0.039") == 1
    assert status(0, "--tolerance", "0") == 0


def test_a_gain_is_no_regression() -> None:
    found = compare(run_of(arc=scored(worse(BASE, 30))), run_of(arc=scored(BASE)))
    assert found.rows[0].verdict(0.01, 0.05) == "better"
    assert not found.regressions(0.01, 0.05)


def pages(gain: float, n: int = 30) -> TaskScores:
    """Log-likelihoods of pages with their words; each page `gain` nats per word likelier."""
    rng = np.random.default_rng(0)
    words = rng.integers(50, 400, n).astype(float)
    lls = -words * (rng.normal(3, 0.3, n) - gain + rng.normal(0, 0.002, n) * (gain != 0))
    outcomes = np.stack([lls, words], axis=1)
    value = math.exp(-lls.sum() / words.sum())
    score = Score.with_outcomes(value, None, False, outcomes)
    assert score.outcomes is not None
    return TaskScores({"word_perplexity": score}, 2.0, 0, n, tuple(f"d{i}" for i in range(n)))


@pytest.mark.parametrize(
    ("gain", "verdict"), [(-0.05, "worse"), (0.05, "better"), (-0.003, "same"), (0.0, "same")]
)
def test_perplexities_regress_upwards_by_a_share(gain: float, verdict: str) -> None:
    found = compare(run_of(wiki=pages(0.0)), run_of(wiki=pages(gain)))
    (row,) = found.rows
    assert row.verdict(0.01, 0.05) == verdict
    assert row.loss == pytest.approx(math.exp(-gain) - 1, abs=2e-3)


def test_many_metrics_share_the_alpha() -> None:
    names = [f"task{i}" for i in range(12)]
    before = run_of(**{name: scored(BASE) for name in names})
    after = run_of(**{name: scored(worse(BASE, 8 if name == "task3" else 0)) for name in names})
    (row,) = (row for row in compare(before, after).rows if row.task == "task3")
    assert row.difference.p == pytest.approx(2 * 0.5**8)
    assert row.p == pytest.approx(12 * 2 * 0.5**8)
    assert row.verdict(0.01, 0.05) == "within chance"


def test_a_value_that_is_no_number_is_a_regression(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = written(tmp_path / "base", {"arc": BASE})
    run = written(tmp_path / "run", {"arc": BASE}, samples=False)
    run.write_text(run.read_text().replace(f'"acc,none": {np.mean(BASE)}', '"acc,none": NaN'))
    assert main(["check", str(run), "--baseline", str(base)]) == 1
    assert "now nan" in capsys.readouterr().out


def of_value(value: float, stderr: float | None = None, higher: bool | None = True) -> TaskScores:
    return TaskScores({"m": Score.with_outcomes(value, stderr, higher, None)}, 1.0, 0, 50, ())


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (of_value(0.9), of_value(0.1), "m was 0.9 and is 0.1"),
        (of_value(20.8, higher=False), of_value(432.2, higher=False), "m was 20.8 and is 432.2"),
        (of_value(0.9, 0.1, None), of_value(0.1, 0.1, None), "m was 0.9 and is 0.1"),
        (of_value(0.9, 0.0), of_value(0.1, 0.0), "m was 0.9 and is 0.1"),
        (of_value(math.nan), of_value(math.nan), "m was nan and is nan"),
        (of_value(math.inf), of_value(math.inf), "m was inf and is inf"),
        (of_value(0.9), of_value(0.895), None),
        (of_value(0.1), of_value(0.9), None),
        (of_value(0.9, 0.1, None), of_value(0.9, 0.1, None), None),
        (of_value(math.inf, higher=False), of_value(20.0, higher=False), None),
    ],
)
def test_a_change_that_nothing_can_test_is_no_pass(
    before: TaskScores, after: TaskScores, message: str | None
) -> None:
    tested = scored(BASE)
    found = compare(run_of(arc=tested, other=before), run_of(arc=tested, other=after))
    refuse(found, ["untested"], 0.01, 0.05)
    assert not found.regressions(0.01, 0.05)
    if message is None:
        refuse(found, [], 0.01, 0.05)
        return
    with pytest.raises(UserError, match=f"cannot be tested: other {message}.*--allow untested"):
        refuse(found, [], 0.01, 0.05)


def test_a_value_that_is_no_number_makes_no_baseline(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="arc m is nan: later runs cannot be checked"):
        write_baseline(run_of(arc=of_value(math.nan)), tmp_path / "base.json")
    assert not (tmp_path / "base.json").exists()


def of_loglikelihoods(values: Sequence[float]) -> TaskScores:
    outcomes = np.array([(v, 10.0) for v in values])
    with np.errstate(over="ignore"):
        value = float(np.exp(-outcomes[:, 0].sum() / outcomes[:, 1].sum()))
    documents = tuple(f"d{i}" for i in range(len(values)))
    score = Score.with_outcomes(value, None, False, outcomes)
    return TaskScores({"word_perplexity": score}, 1.0, 0, len(values), documents)


def test_one_document_is_no_test() -> None:
    found = compare(run_of(a=of_loglikelihoods([-9.0])), run_of(a=of_loglikelihoods([-90.0])))
    assert found.rows[0].p == 1.0
    assert "too few documents for 1 test" in check_text(found, 0.01, 0.05)


def test_what_has_no_chance_in_both_runs_is_not_better() -> None:
    a, b = [-9.0, -math.inf, -8.0] * 9, [-9.5, -math.inf, -8.5] * 9
    found = compare(run_of(a=of_loglikelihoods(a)), run_of(a=of_loglikelihoods(b)))
    assert found.rows[0].verdict(0.01, 0.05) == "not tested"
    found = compare(run_of(a=of_loglikelihoods([-9.0] * 9)), run_of(a=of_loglikelihoods(b)))
    assert found.rows[0].verdict(0.01, 0.05) == "worse"


def test_permutations_are_too_few_for_many_tests() -> None:
    """The smallest p of 9,999 is 0.0002."""
    good, bad = (of_loglikelihoods([-v] * 30) for v in (9.0, 90.0))
    few = compare(run_of(a=good), run_of(a=bad))
    assert few.regressions(0.01, 0.05)
    assert "too few" not in check_text(few, 0.01, 0.05)
    many = {f"t{i}": scored([1.0, 0.0]) for i in range(300)}
    found = compare(run_of(a=good, **many), run_of(a=bad, **many))
    assert not found.regressions(0.01, 0.05)
    assert "too few documents for 301 tests to fail" in check_text(found, 0.01, 0.05)


def test_where_lower_is_better_zero_stays_zero() -> None:
    def of(value: float) -> Comparison:
        return compare(
            run_of(a=of_value(0.0, 0.01, higher=False)),
            run_of(a=of_value(value, 0.01, higher=False)),
        )

    assert of(0.0).rows[0].verdict(0.01, 0.05) == "same"
    assert of(0.5).regressions(0.01, 0.05)
    assert "0.0000 -> 0.5000, 0.5 worse" in check_text(of(0.5), 0.01, 0.05)


def test_settings_of_one_run_alone_share_a_line() -> None:
    def of(**settings: Any) -> Run:
        return Run("here.json", settings, {"arc": scored(BASE)})

    found = compare(of(model="hf", seed=1), of(model="spade_exit", seed=1, layer=3, lens="x"))
    text = comparison_text(found)
    assert "differs: model hf -> spade_exit" in text
    assert "only b: layer=3, lens=x" in text
    assert "only a" not in text
    assert "seed" not in text


def test_a_limit_is_seen_where_documents_were_not_counted() -> None:
    def of(limit: int) -> Run:
        task = replace(of_value(0.5, 0.01), n=None)
        return Run("here.json", {"limit": limit}, {"arc": task})

    with pytest.raises(UserError, match="arc: --limit 100, then 50"):
        refuse(compare(of(100), of(50)), [], 0.01, 0.05)
    refuse(compare(of(100), of(50)), ["limit"], 0.01, 0.05)


def test_an_unknown_direction_is_not_judged() -> None:
    found = compare(run_of(arc=scored(BASE, None)), run_of(arc=scored(worse(BASE, 50), None)))
    assert found.rows[0].verdict(0.01, 0.05) == "not tested"


def test_without_samples_standard_errors_decide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = written(tmp_path / "base", {"arc": BASE}, samples=False)
    near = written(tmp_path / "near", {"arc": worse(BASE, 8)})
    far = written(tmp_path / "far", {"arc": worse(BASE, 40)})
    assert main(["check", str(near), "--baseline", str(base)]) == 0
    assert main(["check", str(far), "--baseline", str(base)]) == 1
    out = capsys.readouterr().out
    assert "| z " in out
    assert "with --log_samples in both runs documents are paired" in out


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("versions", {"versions": {"arc": 2.0}}, "arc: the task has version 1.0, then 2.0."),
        ("fewshot", {"n-shot": {"arc": 5}}, "arc: 0 shots, then 5."),
        ("limit", {"n-samples": {"arc": {"effective": 100}}}, "arc: 200 documents, then 100."),
    ],
)
def test_runs_made_otherwise_are_refused(
    kind: str,
    change: dict[str, Any],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = written(tmp_path / "base", {"arc": BASE})
    run = written(tmp_path / "run", {"arc": BASE}, **change)
    argv = ["check", str(run), "--baseline", str(base)]
    told = refused(argv, capsys)
    assert message in told
    assert f"--allow {kind} compares them" in told
    assert main([*argv, "--allow", kind]) == 0
    assert f"differs: {message}" in capsys.readouterr().out
    assert main(["compare", str(base), str(run)]) == 0  # which only tells


def test_a_task_that_only_one_run_has_is_told() -> None:
    both, one = run_of(arc=scored(BASE), boolq=scored(BASE)), run_of(arc=scored(BASE))
    found = compare(both, one)
    assert [row.task for row in found.rows] == ["arc"]
    with pytest.raises(UserError, match=r"Only in here\.json: boolq\..*--allow missing"):
        refuse(found, [], 0.01, 0.05)
    refuse(found, ["missing"], 0.01, 0.05)
    more = compare(one, both)
    assert more.notes == ("Only in here.json: boolq.",)
    refuse(more, [], 0.01, 0.05)


def test_a_metric_that_has_gone_is_refused() -> None:
    whole = scored(BASE)
    scores = {**whole.scores, "acc_norm": next(iter(whole.scores.values()))}
    more = replace(whole, scores=scores)
    with pytest.raises(UserError, match=r"Only in here\.json: arc acc_norm\."):
        refuse(compare(run_of(arc=more), run_of(arc=whole)), [], 0.01, 0.05)


def test_few_shot_examples_of_another_seed_are_refused() -> None:
    def run(seed: int, shots: int) -> Run:
        return Run("r", {"fewshot_seed": seed}, {"arc": replace(scored(BASE), n_shot=shots)})

    with pytest.raises(UserError, match="fewshot_seed is 1, then 2"):
        refuse(compare(run(1, 5), run(2, 5)), [], 0.01, 0.05)
    refuse(compare(run(1, 0), run(2, 0)), [], 0.01, 0.05)


def test_documents_are_paired_where_two_runs_overlap(tmp_path: Path) -> None:
    base = written(tmp_path / "base", {"arc": BASE})
    run = written(tmp_path / "run", {"arc": BASE[50:]}, first_doc=50)
    found = compare(read_run(base)[0], read_run(run)[0])
    assert found.rows[0].difference.n == 150
    assert found.rows[0].difference.a == pytest.approx(np.mean(BASE[50:]))
    assert found.rows[0].difference.p == 1.0
    with pytest.raises(UserError, match="200 documents, then 150"):
        refuse(found, [], 0.01, 0.05)
    shifted = written(tmp_path / "shifted", {"arc": BASE}, first_doc=50)
    with pytest.raises(UserError, match="of 200 documents, 150 are the same"):
        refuse(compare(read_run(base)[0], read_run(shifted)[0]), [], 0.01, 0.05)


# ---------------------------------------------------------------- baselines


def test_a_baseline_pairs_documents_without_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = written(tmp_path / "run", {"arc": BASE, "boolq": answers(100, 0.5, 1)})
    baseline = tmp_path / "baselines" / "small.json"
    assert main(["check", str(run), "--write-baseline", str(baseline)]) == 0
    assert "2 metrics of arc, boolq" in capsys.readouterr().out
    assert baseline.stat().st_size < 300 * 15 + 2000
    shutil.rmtree(tmp_path / "run")
    after = written(tmp_path / "after", {"arc": worse(BASE, 12), "boolq": answers(100, 0.5, 1)})
    assert main(["check", str(after), "--baseline", str(baseline)]) == 1
    out = capsys.readouterr().out
    assert "FAILED: 1 regression (" in out
    assert out.count("McNemar") == 2
    assert main(["check", str(after), "--write-baseline", str(baseline)]) == 0  # the new normal
    assert main(["check", str(after), "--baseline", str(baseline)]) == 0


def test_a_baseline_keeps_every_outcome(tmp_path: Path) -> None:
    run = run_of(arc=scored(BASE), part=scored([0.25, 1 / 3, 1.0]), wiki=pages(0.0))
    write_baseline(run, tmp_path / "b.json")
    back, remark = read_run(tmp_path / "b.json")
    assert remark is None
    for name, task in run.tasks.items():
        assert back.tasks[name].documents == task.documents
        for metric, score in task.scores.items():
            found = back.tasks[name].scores[metric]
            assert (found.value, found.higher_is_better) == (score.value, score.higher_is_better)
            assert np.array_equal(found.outcomes, score.outcomes)


def test_a_baseline_without_samples_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = written(tmp_path / "run", {"arc": BASE}, samples=False)
    assert main(["check", str(run), "--write-baseline", str(tmp_path / "b.json")]) == 0
    assert "evaluate with --log_samples" in capsys.readouterr().out
    assert main(["check", str(run), "--baseline", str(tmp_path / "b.json")]) == 0


def test_a_baseline_does_not_replace_another_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = written(tmp_path / "run", {"arc": BASE})
    before = run.read_bytes()
    assert "is no baseline" in refused(["check", str(run), "--write-baseline", str(run)], capsys)
    assert run.read_bytes() == before


# ---------------------------------------------------------------- bad input


def test_a_damaged_baseline_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = written(tmp_path / "run", {"arc": BASE})
    baseline = tmp_path / "b.json"
    main(["check", str(run), "--write-baseline", str(baseline)])
    capsys.readouterr()
    whole = baseline.read_text()
    argv = ["check", str(run), "--baseline", str(baseline)]
    raw = json.loads(whole)
    raw["tasks"]["arc"]["scores"]["acc"]["outcomes"] = "0101"
    for text, message in (
        (whole[:300], "is not readable JSON"),
        (json.dumps(raw), "4 outcomes of acc, 200 documents"),
        (whole.replace('"tasks"', '"tusks"'), "damaged baseline (KeyError: 'tasks')"),
        (whole.replace('_baseline": 1', '_baseline": 7'), "baseline of format 7"),
    ):
        baseline.write_text(text)
        assert message in refused(argv, capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not readable JSON"),
        ("[1, 2]", "holds a JSON list"),
        ('{"a": 1}', "no table of tasks under 'results' (found: 'a')"),
        ('{"results": 3}', "no table of tasks"),
        ('{"results": {"arc": {"alias": "arc"}}}', "holds no scores of a task"),
        ('{"results": {"arc": 0.5}}', "no table of tasks"),
    ],
)
def test_files_that_are_no_results(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = written(tmp_path / "good", {"arc": BASE})
    bad = tmp_path / "bad.json"
    bad.write_text(text)
    for argv in (["compare", str(good), str(bad)], ["check", str(bad), "--baseline", str(good)]):
        told = refused(argv, capsys)
        assert str(bad) in told
        assert message in told


def test_missing_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(written(tmp_path / "run", {"arc": BASE}))
    (tmp_path / "empty").mkdir()
    missing = refused(["check", run, "--baseline", str(tmp_path / "no.json")], capsys)
    assert "There is no baseline" in missing
    assert f"--write-baseline {tmp_path / 'no.json'}" in missing
    assert "--output_path" in refused(["compare", run, str(tmp_path / "empty")], capsys)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:1000],
        lambda text: text.replace(b'"metrics": ["acc"]', b'"metrics": null', 1),
        lambda text: text.replace(b'"doc_id": 7,', b'"doc_id": "x",'),
        lambda text: text.replace(b'"filter"', b'"\xff"', 1),
    ],
)
def test_damaged_samples(damage: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = written(tmp_path / "run", {"arc": BASE})
    samples = tmp_path / "run" / f"samples_arc_{DATE}.jsonl"
    samples.write_bytes(damage(samples.read_bytes()))
    assert "is no sample of lm-eval" in refused(["compare", str(run), str(run)], capsys)


@pytest.mark.parametrize("kept", [0, 120])
def test_samples_that_end_early_are_told(
    kept: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = written(tmp_path / "run", {"arc": BASE})
    samples = tmp_path / "run" / f"samples_arc_{DATE}.jsonl"
    samples.write_text("".join(samples.read_text().splitlines(keepends=True)[:kept]))
    assert main(["compare", str(run), str(run)]) == 0
    assert f"samples of only some documents, and averages are compared: arc ({kept} of 200)" in (
        capsys.readouterr().out
    )


def test_a_sweep_is_for_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep.json").write_text("{}")
    told = refused(["compare", str(tmp_path), str(tmp_path)], capsys)
    assert f"`spade-eval report {tmp_path} --output DIR`" in told


def test_nothing_in_common(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arc = str(written(tmp_path / "arc", {"arc": BASE}))
    boolq = str(written(tmp_path / "boolq", {"boolq": BASE}))
    other = str(written(tmp_path / "other", {"arc": BASE}, first_doc=5000))
    assert "no task in common" in refused(["compare", arc, boolq], capsys)
    told = refused(["compare", arc, other], capsys)
    assert "no document in common (200 and 200 documents)" in told


def test_nothing_to_test_is_no_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = str(written(tmp_path / "one", {"arc": [1.0]}, samples=False))
    assert "Nothing can be tested" in refused(["check", one, "--baseline", one], capsys)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "RUN"),
        (["r.json"], "--baseline"),
        (["r.json", "--baseline", "b.json", "--tolerance", "-1"], "--tolerance -1.0: give"),
        (["r.json", "--baseline", "b.json", "--alpha", "0"], "--alpha 0.0: give"),
        (["r.json", "--baseline", "b.json", "--allow", "version"], "Did you mean 'versions'?"),
        (["r.json", "--baselin", "b.json"], "`spade-eval check --help`"),
    ],
)
def test_wrong_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(["check", *argv], capsys)


# ---------------------------------------------------------------- samples and groups of lm-eval


def evaluated(folder: Path, seed: int) -> None:
    """Let lm-eval evaluate random answers and write its files."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    (folder / "pair.yaml").write_text(GROUP)
    random.seed(seed)
    folders = [str(tasks_path()), str(folder)]
    found = simple_evaluate(
        model="dummy",
        tasks=["pair", "spade_mini_articles"],
        task_manager=TaskManager(include_path=folders, include_defaults=False),
        limit=12,
        random_seed=None,
        bootstrap_iters=10,
    )
    tracker = EvaluationTracker(output_path=str(folder))
    samples = found.pop("samples")
    tracker.save_results_aggregated(found, samples)
    for task in found["configs"]:
        tracker.save_results_samples(task, samples[task])


def test_files_of_lm_eval_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Accuracies, perplexities and a group."""
    for seed, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        evaluated(tmp_path / name, seed)
    one, two = (read_run(tmp_path / name)[0] for name in ("one", "two"))
    assert set(one.tasks) == {"spade_mini_science", "spade_mini_yesno", "spade_mini_articles"}
    assert set(one.groups) == {"pair"}
    outcomes = {
        metric: score.outcomes.shape
        for task in one.tasks.values()
        for metric, score in task.scores.items()
    }
    n = one.tasks["spade_mini_articles"].n
    assert outcomes == {
        "acc": (12,),
        "word_perplexity": (n, 2),
        "byte_perplexity": (n, 2),
        "bits_per_byte": (n, 2),
    }
    found = compare(one, two)
    tested = [row for row in found.rows if not row.group]
    assert len(tested) == 5
    assert all(row.difference.n for row in tested)
    (group,) = (row for row in found.rows if row.group)
    assert math.isnan(group.p)
    capsys.readouterr()
    assert main(["check", str(tmp_path / "two"), "--baseline", str(tmp_path / "two")]) == 0
    assert ", 5 tests)" in capsys.readouterr().out


def test_scores_without_parts_fall_back_on_standard_errors(tmp_path: Path) -> None:
    """F1 over a corpus is not the mean of what the samples hold."""
    base = written(tmp_path / "base", {"arc": BASE})
    raw = json.loads(base.read_text())
    raw["results"]["arc"] |= {"acc,none": 0.123, "acc_stderr,none": 0.01}
    base.write_text(json.dumps(raw))
    found = compare(read_run(base)[0], read_run(base)[0])
    assert found.rows[0].difference.test == "z"


def test_samples_of_another_run_are_left_alone(tmp_path: Path) -> None:
    base = written(tmp_path, {"arc": BASE}, task_hashes={"arc": "0" * 64})
    moved = base.with_name("mine.json")
    base.rename(moved)
    assert read_run(moved)[0].tasks["arc"].documents  # renamed, and the only ones there
    written(tmp_path, {"arc": worse(BASE, 9)}, "2026-03-03T10-00-00.000000")
    run = read_run(moved)[0]
    assert not run.tasks["arc"].documents
    assert f"The samples of arc are not beside {moved}." in run.notes


# ---------------------------------------------------------------- properties


@pytest.mark.usefixtures("little_garbage")
@given(
    lost=st.integers(0, 40),
    tolerances=st.tuples(st.floats(0, 0.3), st.floats(0, 0.3)),
    alphas=st.tuples(st.floats(0.001, 0.5), st.floats(0.001, 0.5)),
)
@settings(max_examples=25)
def test_more_tolerance_and_less_alpha_never_add_a_regression(
    lost: int, tolerances: tuple[float, float], alphas: tuple[float, float]
) -> None:
    after = run_of(arc=scored(worse(BASE, lost)), boolq=scored(answers(80, 0.5)))
    found = compare(run_of(arc=scored(BASE), boolq=scored(answers(80, 0.6))), after)
    strict = found.regressions(min(tolerances), max(alphas))
    assert set(found.regressions(max(tolerances), max(alphas))) <= set(strict)
    assert set(found.regressions(min(tolerances), min(alphas))) <= set(strict)


def simulated(rng: np.random.Generator, loss: float = 0.0) -> Comparison:
    """Two runs of three tasks, equally good but for the loss; documents are easy or hard for both."""
    runs = []
    chances = [rng.beta(1.5, 1.0, n) for n in (100, 200, 300)]
    for less in (0.0, loss):
        tasks = {}
        for i, chance in enumerate(chances):
            tasks[f"task{i}"] = scored((rng.random(len(chance)) < chance - less).astype(float))
        runs.append(run_of(**tasks))
    return compare(*runs)


def false_alarms(times: int) -> float:
    """Share of checks of equally good runs that fail, without any tolerance."""
    rng = np.random.default_rng(7)
    return float(np.mean([bool(simulated(rng).regressions(0.0, 0.05)) for _ in range(times)]))


@pytest.mark.usefixtures("little_garbage")
def test_false_alarms_are_rare_and_real_losses_are_seen() -> None:
    assert false_alarms(60) <= 0.05
    rng = np.random.default_rng(8)
    assert np.mean([bool(simulated(rng, 0.2).regressions(0.01, 0.05)) for _ in range(20)]) > 0.9


@pytest.mark.slow
@pytest.mark.usefixtures("little_garbage")
def test_false_alarms_of_a_thousand_checks() -> None:
    assert false_alarms(1000) <= 0.05
