"""`spade-eval report`: tables, figures and the page, from sweeps that this file makes up."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file
from test_check import BASE, written

from spade_eval.cli import main
from spade_eval.errors import UserError
from spade_eval.report import build
from spade_eval.report.compute import Curve, curves
from spade_eval.report.cost_tables import equal_compute, speed
from spade_eval.report.figures import (
    exit_figures,
    generalisation_figure,
    layer_figure,
    sweep_figures,
)
from spade_eval.report.formats import Table, latex, markdown, number
from spade_eval.report.spaces import States, components, probe, read_states
from spade_eval.report.sweeps import Sweep, by_model, read_sweep, short_adapters, slug
from spade_eval.report.tables import (
    exit_tables,
    first_layers,
    generalisation,
    layer_tables,
    leaderboard,
)

if TYPE_CHECKING:
    from pathlib import Path

COLUMNS = [
    "model", "adapter", "decoder", "lens_data", "task", "layer", "threshold", "confidence",
    "exit_scope", "readout", "metric", "value", "stderr", "n", "mean_exit_layer",
    "token_layer_ratio", "seconds",
]  # fmt: skip
L = 12


def cell(decoder: str, task: str, value: float, **more: Any) -> dict[str, Any]:
    """A row of a sweep table; what is not given is empty."""
    empty: dict[str, Any] = dict.fromkeys(COLUMNS)
    return empty | {
        "model": "tiny", "decoder": decoder, "task": task, "metric": "acc", "value": value,
        "stderr": 0.02, "n": 500,
    } | more  # fmt: skip


def plausible(
    model: str = "tiny", tasks: tuple[str, ...] = ("arc", "boolq"), n_layers: int = L
) -> pd.DataFrame:
    """Curves that rise to the full model, SPADE's earlier; exits between them; perplexities."""
    rng = np.random.default_rng(0)
    rows = []

    def fixed(decoder: str, task: str, layer: int, start: float, data: str | None = None) -> None:
        depth = max(0.0, (layer / n_layers - start) / (1 - start))
        share = n_layers / (
            layer + (decoder in ("spade", "spade_nos")) * 0.05 * (n_layers - layer) + 1e-9
        )
        common = {
            "model": model, "layer": layer, "lens_data": data, "mean_exit_layer": layer,
            "token_layer_ratio": 1 / share if layer else None, "seconds": 1.0,
        }  # fmt: skip
        value = 0.25 + 0.45 * min(1.0, depth * 1.1) + rng.normal(0, 0.004) * (decoder != "full")
        rows.append(cell(decoder, task, value, **common))
        if task == tasks[0]:
            perplexity = 20 * math.exp(8 * (1 - depth))
            rows.append(
                cell(decoder, "wiki", perplexity, **common)
                | {"metric": "word_perplexity", "stderr": perplexity / 20, "n": 60}
            )

    for task in tasks:
        fixed("full", task, n_layers, 0.0)
        for layer in range(n_layers):
            for decoder, start in (("logit_lens", 0.7), ("spade", 0.35), ("spade_nos", 0.5)):
                fixed(decoder, task, layer, start)
            if layer and layer % 2 == 0:
                for data in tasks:
                    fixed("l_spade", task, layer, 0.4 + 0.1 * (data != task), data)
                fixed("tuned_lens", task, layer, 0.6, tasks[0])
        for decoder, readout, loss in (("spade_exit", "spade", 0.06), ("lens_exit", "lens", 0.12)):
            for data in tasks:
                for i, threshold in enumerate((-1.0, 0.5, 1.0, 1.5, 2.0, 1e9)):
                    rows.append(
                        cell(
                            decoder,
                            task,
                            0.7 - loss * (i / 5) ** 2 - 0.02 * (data != task) * (i > 0),
                            model=model,
                            lens_data=data,
                            threshold=threshold,
                            confidence="entropy",
                            exit_scope="context",
                            readout=readout,
                            seconds=2.0,
                            mean_exit_layer=n_layers * (1 - i / 10),
                            token_layer_ratio=1 / 1 / (0.95 + 0.11 * i),
                        )
                    )
    return pd.DataFrame(rows, columns=COLUMNS)


def sweep_folder(
    folder: Path, cells: pd.DataFrame | None = None, *, states: bool = False, **about: Any
) -> Path:
    """Write a folder as `spade-eval sweep` does."""
    folder.mkdir(parents=True, exist_ok=True)
    cells = plausible() if cells is None else cells
    cells.to_csv(folder / "sweep.csv", index=False)
    told = {
        "spade_eval": "0.1.0",
        "command": "spade-eval sweep ...",
        "model": "tiny",
        "n_layers": L,
    }
    (folder / "sweep.json").write_text(json.dumps(told | about))
    if states:
        found = clusters()
        save_file(
            {"states": found.states.astype(np.float16), "labels": found.labels},
            folder / "states_arc.safetensors",
        )
    return folder


def clusters(n: int = 80, layers: int = 5) -> States:
    """States in which four answers part from layer to layer."""
    rng = np.random.default_rng(1)
    labels = np.arange(n) % 4
    centres = rng.normal(size=(4, 16))
    states = [
        rng.normal(size=(n, 16)) + 2.5 * layer / layers * centres[labels]
        for layer in range(layers + 1)
    ]
    return States(np.stack(states).astype(np.float32), labels)


def sweep_of(*rows: dict[str, Any], n_layers: int = L, folder: Path) -> Sweep:
    """The sweep of a few rows, as read from a file."""
    (found,) = read_sweep(
        sweep_folder(folder, pd.DataFrame(rows, columns=COLUMNS), n_layers=n_layers)
    )
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a sweep with everything in it, and of a run of lm-eval."""
    folder = tmp_path_factory.mktemp("report")
    sweep_folder(folder / "sweep", states=True)
    written(folder / "run", {"arc": BASE})
    argv = ["report", str(folder / "sweep"), str(folder / "run"), "--output", str(folder / "out")]
    assert main(argv) == 0
    return folder / "out"


# ---------------------------------------------------------------- the report as a whole


def test_every_table_and_figure_in_every_format(made: Path) -> None:
    tables = {path.name for path in (made / "tables").iterdir()}
    stems = {
        "leaderboard", "layers-tiny-arc-acc", "layers-tiny-boolq-acc",
        "layers-tiny-wiki-word_perplexity", "exits-tiny-arc-acc", "exits-tiny-boolq-acc",
        "generalisation-tiny-tuned_lens-upper", "generalisation-tiny-tuned_lens-layer",
        "generalisation-tiny-l_spade-upper", "generalisation-tiny-l_spade-layer",
        "generalisation-tiny-spade_exit-value", "generalisation-tiny-spade_exit-gain",
        "generalisation-tiny-lens_exit-value", "generalisation-tiny-lens_exit-gain",
        "first-layer-tiny", "equal-compute-tiny", "speed-tiny",
    }  # fmt: skip
    assert tables == {f"{stem}.{ending}" for stem in stems for ending in ("csv", "md", "tex")}
    figures = {path.name for path in (made / "figures").iterdir()}
    stems = {
        "layers-tiny-accuracy", "layers-tiny-perplexity", "exits-tiny-entropy",
        "generalisation-tiny", "components-tiny-arc", "probe-tiny-arc",
    }  # fmt: skip
    assert figures == {f"{stem}.{ending}" for stem in stems for ending in ("png", "pdf", "csv")}


class Page(HTMLParser):
    """What a page loads, and where its links lead."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.inner_links: set[str] = set()
        self.scripts = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.scripts += tag == "script"
        self.ids.add(found.get("id") or "")
        if tag in ("img", "script", "link", "iframe"):
            self.loads += [value for key in ("src", "href") if (value := found.get(key))]
        if (link := found.get("href") or "").startswith("#"):
            self.inner_links.add(link[1:])


def test_the_page_needs_no_network(made: Path) -> None:
    text = (made / "report.html").read_text()
    page = Page(text)
    assert page.loads
    assert all(load.startswith("data:") for load in page.loads)
    assert len([load for load in page.loads if load.startswith("data:image/png")]) == 6
    assert page.inner_links <= page.ids
    assert not re.search(r"(?:import|fetch)\s*\(?\s*['\"]https?:", text)


def test_a_report_is_the_same_each_time(made: Path, tmp_path: Path) -> None:
    inputs = [str(made.parent / "sweep"), str(made.parent / "run")]
    assert main(["report", *inputs, "--output", str(tmp_path)]) == 0
    before = {
        path.relative_to(made): path.read_bytes() for path in made.rglob("*") if path.is_file()
    }
    after = {
        path.relative_to(tmp_path): path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == []


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>&_%$x^2|"
    cells = [
        cell("full", bad, 0.7, model=bad, layer=12),
        cell(
            bad, bad, 0.6, model=bad, layer=6, lens_data=bad, adapter=bad, token_layer_ratio=1 / 1.5
        ),
        cell(
            "spade_exit",
            bad,
            0.6,
            model=bad,
            threshold=1.0,
            confidence=bad,
            token_layer_ratio=1 / 1.2,
        ),
    ]
    sweep_folder(tmp_path / "s", pd.DataFrame(cells, columns=COLUMNS), command=bad)
    assert main(["report", str(tmp_path / "s"), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.html").read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text
    names = [path.name for path in (tmp_path / "out" / "tables").iterdir()]
    assert names
    assert all(re.fullmatch(r"[\w.-]+", name) for name in names)


def test_several_models_and_nested_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        cells = [cell("spade", "arc", 0.5, model=name, layer=layer) for layer in (3, 6)]
        sweep_folder(tmp_path / "all" / name, pd.DataFrame(cells, columns=COLUMNS))
    made = build.make_report([tmp_path / "all"], tmp_path / "out")
    assert (made.figures, made.remarks) == (2, [])
    assert {path.name for path in (tmp_path / "out" / "figures").glob("*.png")} == {
        "layers-a-accuracy.png",
        "layers-b-accuracy.png",
    }

    again = build.make_report([tmp_path / "all" / "a"], tmp_path / "out")
    tables, figures = again.remarks  # b's files are still there, and told
    assert "figures also holds files not of this report" in figures
    assert "layers-b-accuracy.csv" in figures
    assert "layers-a-" not in figures
    assert "-b.csv" in tables


def test_sweeps_of_one_model_are_put_together(tmp_path: Path) -> None:
    one, other = (
        read_sweep(sweep_folder(tmp_path / task, plausible(tasks=(task,))))[0]
        for task in ("arc", "boolq")
    )
    (merged,), remarks = by_model([one, other])
    assert set(merged.cells["task"]) == {"arc", "boolq", "wiki"}
    assert not remarks
    (twice,), told = by_model([one, one])
    assert (len(twice.cells), told) == (len(one.cells), [])
    cells = one.cells.copy()
    cells.loc[:2, "value"] += 0.01
    (again,), told = by_model([one, replace(one, cells=cells)])
    assert again.cells["value"].tolist() == cells["value"].tolist()
    assert "3 cells were measured twice, with other values" in told[0]
    names = COLUMNS[: COLUMNS.index("value")]
    rows = [set(part.cells[names].astype(str).itertuples(index=False)) for part in (one, other)]
    assert len(merged.cells) == len(rows[0] | rows[1]) < len(rows[0]) + len(rows[1])
    (deeper,) = read_sweep(sweep_folder(tmp_path / "deep", plausible(), n_layers=24))
    with pytest.raises(UserError, match="with 12, 24 layers"):
        by_model([one, deeper])


def test_sweeps_of_other_documents_are_not_mixed(tmp_path: Path) -> None:
    def swept(name: str, limit: int, **arc: Any) -> Sweep:
        settings = {"limit": limit, "apply_chat_template": False}
        folder = sweep_folder(tmp_path / name, tasks={"arc": arc}, settings=settings)
        return read_sweep(folder)[0]

    test = swept("test", 50, split="test", num_fewshot=0)
    by_model([test, swept("same", 50, split="test", num_fewshot=0)])
    # Other documents may choose settings; other prompts may not.
    for other, apart in (
        (
            swept("validation", 50, split="validation", num_fewshot=0),
            "split test and validation.*--chosen-on",
        ),
        (
            swept("shots", 50, split="test", num_fewshot=5),
            r"num_fewshot 0 and 5\. Report them apart\.$",
        ),
        (swept("more", 90, split="test", num_fewshot=0), "limit 50 and 90.*--chosen-on"),
    ):
        with pytest.raises(UserError, match=rf"test and .*tiny on \w+ with {apart}"):
            by_model([test, other])


def test_the_page_tells_of_every_folder(tmp_path: Path) -> None:
    folders = [
        sweep_folder(tmp_path / task, plausible(tasks=(task,)), command=f"sweep {task}")
        for task in ("arc", "boolq")
    ]
    build.make_report([folders[0] / "sweep.csv", folders[1]], tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(text in page for text in ("sweep arc", "sweep boolq", str(folders[0])))


def test_metrics_that_are_better_the_lower(tmp_path: Path) -> None:
    """As sweep.json tells, whatever their name."""
    bias = {"metric": "bias", "token_layer_ratio": 0.5}
    rows = [cell("full", "pairs", 0.5, layer=12, metric="bias")]
    rows += [cell("spade", "pairs", v, layer=n, **bias) for n, v in ((4, 0.9), (8, 0.4))]
    told = {"pairs": {"higher_is_better": {"bias": False}}}
    folder = sweep_folder(tmp_path, pd.DataFrame(rows, columns=COLUMNS), tasks=told)
    (sweep,) = read_sweep(folder)
    frame = first_layers(sweep).frame.set_index("decoder")
    assert frame.loc["SPADE", "first layer"] == 8
    assert speed(sweep).frame.empty  # points of accuracy are no measure of it
    build.make_report([folder], tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.png"))


def test_parquet_is_read_like_csv(tmp_path: Path) -> None:
    (from_csv,) = read_sweep(sweep_folder(tmp_path / "csv"))
    folder = sweep_folder(tmp_path / "parquet")
    plausible().to_parquet(folder / "sweep.parquet")
    (folder / "sweep.csv").unlink()
    (from_parquet,) = read_sweep(folder)
    pd.testing.assert_frame_equal(from_csv.cells, from_parquet.cells)


# ---------------------------------------------------------------- tables


def test_layers_by_decoder(tmp_path: Path) -> None:
    sweep = sweep_of(
        cell("full", "arc", 0.7, layer=12),
        cell("spade", "arc", 0.6, layer=8),
        cell("spade", "arc", 0.65, layer=10, stderr=0.03),
        cell("l_spade", "arc", 0.5, layer=8, lens_data="sciq"),
        cell("mystery", "arc", 0.1, layer=8),
        folder=tmp_path,
    )
    (table,) = layer_tables(sweep)
    assert list(table.frame) == [
        "layer", "full model", "± full model", "SPADE", "± SPADE", "L-SPADE (sciq)",
        "± L-SPADE (sciq)", "mystery", "± mystery",
    ]  # fmt: skip
    rows = table.frame.set_index("layer")
    assert rows.loc[10, "SPADE"] == 0.65
    assert rows.loc[10, "± SPADE"] == 0.03
    assert rows.loc[12, "full model"] == 0.7
    assert math.isnan(rows.loc[8, "full model"])
    assert "| 10 | " in re.sub(r" +", " ", markdown(table))
    assert "0.650 ± 0.030" in markdown(table)


def test_exits_at_every_threshold(tmp_path: Path) -> None:
    rule = {"confidence": "entropy", "exit_scope": "context", "readout": "spade"}
    sweep = sweep_of(
        cell("full", "arc", 0.7, layer=12),
        cell(
            "spade_exit",
            "arc",
            0.66,
            threshold=2.0,
            token_layer_ratio=1 / 1.3,
            mean_exit_layer=9,
            **rule,
        ),
        cell(
            "spade_exit",
            "arc",
            0.71,
            threshold=1.0,
            token_layer_ratio=1 / 1.1,
            mean_exit_layer=10,
            **rule,
        ),
        folder=tmp_path,
    )
    (table,) = exit_tables(sweep)
    assert table.frame["threshold"].tolist() == [1.0, 2.0]
    assert table.frame["- full"].tolist() == pytest.approx([0.01, -0.04])
    assert set(table.frame["rule"]) == {"entropy, context, spade"}


def test_first_layer_that_reaches_the_full_model(tmp_path: Path) -> None:
    values = {2: 0.69, 4: 0.50, 6: 0.67, 8: 0.68, 10: 0.75}  # 2 by luck; the stderr is 0.02
    rows = [cell("spade", "arc", value, layer=layer) for layer, value in values.items()]
    rows += [cell("logit_lens", "arc", 0.3, layer=layer) for layer in values]
    wiki = {"metric": "word_perplexity", "stderr": 1.0}
    rows += [
        cell("spade", "wiki", v, layer=i, **wiki) for i, v in ((4, 90.0), (6, 20.9), (8, 15.0))
    ]
    rows += [cell("full", "arc", 0.70, layer=12), cell("full", "wiki", 20.0, layer=12, **wiki)]
    frame = first_layers(sweep_of(*rows, folder=tmp_path)).frame.set_index(["task", "decoder"])
    assert frame.loc[("arc", "SPADE"), "first layer"] == 2
    assert frame.loc[("arc", "SPADE"), "from then on"] == 8
    assert math.isnan(frame.loc[("arc", "logit lens"), "first layer"])
    assert math.isnan(frame.loc[("arc", "logit lens"), "from then on"])
    assert frame.loc[("wiki", "SPADE"), "first layer"] == 6
    assert frame.loc[("wiki", "SPADE"), "from then on"] == 6


def curve(points: list[tuple[float, float]], full: float = 0.7, lower: bool = False) -> Curve:
    frame = pd.DataFrame(points, columns=["gain", "value"])
    return Curve("SPADE", "", "acc", lower, full, 0.02, frame.assign(layer=range(len(frame))))


def test_equal_compute_interpolates_in_cost() -> None:
    # Costs 1, 0.8 and 0.5: at a cost of 0.65 half of the documents at each of the last two.
    ratios = (1.0, 1 / 0.9, 1 / 0.65, 2.0)
    found = curve([(2.0, 0.4), (1.25, 0.6)])
    assert found.at_ratios(ratios) == pytest.approx([0.7, 0.65, 0.5, 0.4])
    assert math.isnan(found.at_ratios([2.5])[0])
    # Of two settings at one cost the better one counts, upwards or downwards.
    assert curve([(2.0, 0.4), (2.0, 0.5)]).at_ratios([2.0]) == [0.5]
    downwards = curve([(2.0, 40.0), (2.0, 30.0)], 20.0, lower=True)
    assert downwards.at_ratios([2.0]) == [30.0]
    assert math.isnan(curve([(math.nan, 0.4)], math.nan).at_ratios([1.0])[0])


def test_a_choice_by_lot_averages_log_likelihoods() -> None:
    """Half of the documents at a perplexity of 20 and half at 80 have one of 40."""
    points = curve([(2.0, 80.0)], 20.0, lower=True)
    for metric, expected in (
        ("word_perplexity", 40.0), ("byte_perplexity", 40.0), ("bits_per_byte", 50.0), ("brier", 50.0),
    ):  # fmt: skip
        found = replace(points, metric=metric).at_ratios([1 / 0.75])
        assert found == pytest.approx([expected]), metric


def test_speed_at_no_loss_and_at_one_point(tmp_path: Path) -> None:
    rule = {"confidence": "entropy", "exit_scope": "context", "readout": "spade"}
    points = ((0.5, 1.05, 0.71), (1.0, 1.2, 0.70), (1.5, 1.4, 0.69), (2.0, 1.9, 0.60))
    sweep = sweep_of(
        cell("full", "arc", 0.70, layer=12),
        *(
            cell("spade_exit", "arc", v, threshold=t, token_layer_ratio=1 / r, **rule)
            for t, r, v in points
        ),
        cell("logit_lens", "arc", 0.2, layer=6, token_layer_ratio=1 / 2.0),
        cell("spade", "arc", 0.70, layer=6),  # its cost is unknown
        folder=tmp_path,
    )
    frame = speed(sweep).frame.set_index("decoder")
    assert frame.loc["SPADE-EXIT", ["no loss", "1 point"]].tolist() == [1.2, 1.4]
    assert frame.loc["SPADE-EXIT", "1 point, at"] == "threshold 1.5"
    assert math.isnan(frame.loc["logit lens", "1 point"])
    assert frame.loc["logit lens", "no loss, at"] == ""
    assert "SPADE" not in frame.index
    budgets = equal_compute(sweep).frame.set_index("decoder")
    assert budgets.loc["SPADE-EXIT", "1.20x"] == pytest.approx(0.70)
    assert math.isnan(budgets.loc["SPADE-EXIT", "2.00x"])
    without = replace(sweep, cells=sweep.cells[sweep.cells["decoder"] != "full"])
    for blind in (speed(without), speed(sweep, without)):
        assert set(blind.frame["no loss, at"]) == {"unknown"}


def test_settings_chosen_on_other_documents(tmp_path: Path) -> None:
    rule = {"confidence": "entropy", "exit_scope": "context", "readout": "spade"}

    def swept(name: str, split: str, values: dict[float, float], **about: Any) -> Path:
        cells = [cell("full", "arc", 0.70, layer=12)]
        for t, value in values.items():
            more: dict[str, Any] = {"threshold": t, "token_layer_ratio": 1 / (1 + t), **rule}
            cells.append(cell("spade_exit", "arc", value, **more))
        cells.append(cell("spade", "arc", values[0.5], layer=6, token_layer_ratio=0.5))
        tasks = {"arc": {"split": split}}
        return sweep_folder(tmp_path / name, pd.DataFrame(cells, columns=COLUMNS), tasks=tasks)

    test = swept("test", "test", {0.5: 0.62, 1.0: 0.71, 1.5: 0.72, 2.0: 0.50})
    other = swept("validation", "validation", {0.5: 0.71, 1.0: 0.69, 1.5: 0.60, 2.5: 0.40})
    frame = speed(*(read_sweep(folder)[0] for folder in (test, other))).frame.set_index("decoder")
    exits = frame.loc["SPADE-EXIT"]
    # The validation documents say 0.5 and 1.0; the test's own best would be 1.5.
    assert exits["no loss, at"] == "threshold 0.5"
    assert exits["no loss"] == pytest.approx(1.5)
    assert exits["no loss, - full"] == pytest.approx(-0.08)
    assert exits["1 point, at"] == "threshold 1"
    assert exits["1 point, - full"] == pytest.approx(0.01)
    assert frame.loc["SPADE", "no loss, at"] == "layer 6"
    build.make_report([test], tmp_path / "out", [other])
    note = (tmp_path / "out/tables/speed-tiny.md").read_text()
    assert f"chosen on other documents, {other}" in note

    fewer = swept("fewer", "train", {0.5: 0.6, 1.0: 0.71})
    cells = pd.read_csv(fewer / "sweep.csv")
    cells[cells["threshold"] != 0.5].to_csv(fewer / "sweep.csv", index=False)
    table = speed(*(read_sweep(folder)[0] for folder in (fewer, other))).frame
    unknown = table.set_index("decoder").loc["SPADE-EXIT"]
    assert unknown["no loss, at"] == "unknown"  # 0.5, which was not swept here
    assert unknown["1 point, at"] == "threshold 1"

    with pytest.raises(UserError, match=r"same documents as .*test \(arc: test\)"):
        build.make_report([test], tmp_path / "out", [other, test])
    parts = [
        swept(f"part-{n}", split, {0.5: 0.7}) for n, split in enumerate(("test[:9]", "test[9:]"))
    ]
    with pytest.raises(UserError, match=r"same documents as .*test \(arc: test\[:9\]\)"):
        build.make_report([test], tmp_path / "out", parts[:1])
    build.make_report(parts[:1], tmp_path / "apart", parts[1:])
    first, same, one = (
        sweep_folder(
            tmp_path / name,
            pd.DataFrame([cell("full", "arc", 0.7, layer=12)], columns=COLUMNS),
            tasks={"arc": {"split": split, "rows": "validation"}},
            settings={"limit": limit},
        )
        for name, split, limit in (
            ("first", "test", 9),  # this data set's test split is its validation split
            ("same", "validation", 40),
            ("one", "validation[9:]", 40),
        )
    )
    with pytest.raises(UserError, match=r"same documents as .*first \(arc: validation\)"):
        build.make_report([first], tmp_path / "out", [same])
    build.make_report([first], tmp_path / "first-9", [one])
    cells = pd.DataFrame([cell("full", "arc", 0.7, layer=12, model="big")], columns=COLUMNS)
    bigger = sweep_folder(tmp_path / "big", cells)
    with pytest.raises(UserError, match=r"no sweep of tiny in .*big, only of big"):
        build.make_report([test], tmp_path / "out", [bigger])


def test_rules_of_other_candidates_are_not_one_curve(tmp_path: Path) -> None:
    def swept(name: str, exits: bool = True, **about: Any) -> Path:
        rows = [cell("full", "arc", 0.7, layer=12), cell("spade", "arc", 0.6, layer=6)]
        if exits:
            rule = {"confidence": "entropy", "exit_scope": "context", "readout": "spade"}
            rows.append(cell("spade_exit", "arc", 0.6, threshold=len(name), **rule))
        split = about.pop("split", "test")
        cells = pd.DataFrame(rows, columns=COLUMNS)
        tasks = {"arc": {"split": split, "num_fewshot": about.pop("shots", 0)}}
        of = about.pop("adapter_fingerprint", "a")
        settings = {"interval": 2, "min_layer": None, "model_args": "pretrained=m", **about}
        return sweep_folder(
            tmp_path / name, cells, tasks=tasks, settings=settings, adapter_fingerprint=of
        )

    own = swept("own")
    for more in ({"interval": 4}, {"min_layer": 10}):
        with pytest.raises(
            UserError, match=rf"{next(iter(more))} .* and \d+. Report them apart\.$"
        ):
            build.make_report([own, swept("other", **more)], tmp_path / "out")
    build.make_report([own, swept("half", min_layer=6)], tmp_path / "out")  # of 12
    build.make_report([own, swept("plain", exits=False, interval=4)], tmp_path / "out")
    few = swept("few", split="validation", shots=5)
    with pytest.raises(UserError, match=r"--chosen-on: .*few.* num_fewshot 5 and 0"):
        build.make_report([own], tmp_path / "out", [few])
    rare = swept("rare", split="validation", interval=4)
    with pytest.raises(UserError, match=r"--chosen-on: .*rare.* interval 4 and 2"):
        build.make_report([own], tmp_path / "out", [rare])
    build.make_report([own], tmp_path / "out", [swept("good", split="validation", limit=9)])
    for more, told in (
        ({"adapter_fingerprint": "b"}, "adapter_fingerprint a and b"),
        ({"model_args": "pretrained=m,dtype=bfloat16"}, "dtype auto and bfloat16"),
        ({"model_args": "pretrained=m,revision=old"}, "revision main and old"),
    ):
        with pytest.raises(UserError, match=f"sweeps of tiny on arc with .*{told}"):
            build.make_report([own, swept(f"as-{told[:3]}", **more)], tmp_path / "out")


def test_each_adapter_is_compared_with_its_own_choosers(tmp_path: Path) -> None:
    def swept(adapter: str, split: str, shots: int, weights: str = "a") -> Path:
        cells = pd.DataFrame([cell("full", "arc", 0.7, layer=12, adapter=adapter)], columns=COLUMNS)
        return sweep_folder(
            tmp_path / f"{adapter}-{split}-{weights}",
            cells,
            tasks={"arc": {"split": split, "num_fewshot": shots}},
            sweep={"lenses": {"x": {"lens_weights": weights}}},
        )

    tests = [swept("", "test", 5), swept("lora", "test", 0)]
    build.make_report(
        tests, tmp_path / "out", [swept("", "validation", 5), swept("lora", "validation", 0)]
    )
    other = swept("lora", "validation", 0, weights="b")
    with pytest.raises(UserError, match=r"--chosen-on: .* lens x b and a"):
        build.make_report(tests, tmp_path / "out", [other])


def test_settings_are_chosen_on_a_task_that_is_reported(tmp_path: Path) -> None:
    folders = []
    for name, adapter in (("test", ""), ("validation", "lora")):
        cells = [cell("full", "arc", 0.7, layer=12, adapter=adapter)]
        told = {"arc": {"split": name}}
        frame = pd.DataFrame(cells, columns=COLUMNS)
        folders.append(sweep_folder(tmp_path / name, frame, tasks=told))
    with pytest.raises(UserError, match=r"no task under the same adapter in common: arc \[lora\]"):
        build.make_report(folders[:1], tmp_path / "out", folders[1:])


def test_results_without_scores_are_left_out_of_a_folder(tmp_path: Path) -> None:
    sweep_folder(tmp_path / "all" / "sweep")
    bare = tmp_path / "all" / "results_2026-01-01T00-00-00.000000.json"
    bare.write_text(json.dumps({"results": {"arc": {"alias": "arc"}}}))
    made = build.make_report([tmp_path / "all"], tmp_path / "out")
    assert len(made.remarks) == 1
    assert re.search(r"^left out: .*results_2026.* holds no scores", made.remarks[0])
    with pytest.raises(UserError, match="holds no scores"):
        build.make_report([bare], tmp_path / "out")


def test_generalisation(tmp_path: Path) -> None:
    rows = [
        cell("l_spade", test, value + layer / 100, layer=layer, lens_data=train)
        for train, test, value in (
            ("arc", "arc", 0.5),
            ("arc", "boolq", 0.3),
            ("boolq", "arc", 0.4),
        )
        for layer in (2, 6, 8, 10)
    ]
    rows += [
        cell(
            "spade_exit",
            test,
            value,
            threshold=t,
            lens_data="arc",
            confidence="entropy",
            token_layer_ratio=1 / r,
        )
        for t, value, r in ((1.0, 0.6, 1.1), (2.0, 0.4, 1.3))
        for test in ("arc", "boolq")
    ]
    rows += [
        cell("lens_exit", "arc", value, threshold=1.0, lens_data=watched, token_layer_ratio=0.8)
        for watched, value in (
            ("arc", 0.61), ("boolq", 0.62), ("logit_lens", 0.63),
            ("tuned_lens:arc", 0.64), ("tuned_lens:boolq", 0.65),
        )
    ]  # fmt: skip
    rows += [cell("tuned_lens", "arc", 0.4, layer=8, lens_data="arc")]  # a single number
    rows += [cell("full", "arc", 0.7, layer=12), cell("spade", "arc", 0.7, layer=8)]
    found = {matrix.name: matrix for matrix in generalisation(sweep_of(*rows, folder=tmp_path))}
    assert set(found) == {
        "l_spade-upper",
        "l_spade-layer",
        "spade_exit-value",
        "spade_exit-gain",
        "lens_exit-value",
        "lens_exit-gain",
        "lens_exit-tuned_lens-value",
        "lens_exit-tuned_lens-gain",
    }
    # A logit lens has no training set; maps of two kinds stand in two tables.
    for name, arc in (("lens_exit-value", 0.61), ("lens_exit-tuned_lens-value", 0.64)):
        frame = found[name].frame["arc"]
        assert frame.to_dict() == pytest.approx({"arc": arc, "boolq": arc + 0.01})
    upper = found["l_spade-upper"]
    assert upper.title == "L-SPADE, mean over 3 layers, 6 to 10"
    assert upper.frame.loc["arc", "arc"] == pytest.approx(0.5 + 0.08)
    assert upper.frame.loc["boolq", "arc"] == pytest.approx(0.4 + 0.08)
    assert math.isnan(upper.frame.loc["boolq", "boolq"])
    assert "layer 8" in found["l_spade-layer"].title  # of those there are, the nearest to 9
    assert found["l_spade-layer"].frame.loc["arc", "boolq"] == pytest.approx(0.38)
    assert found["spade_exit-value"].frame.loc["arc", "arc"] == pytest.approx(0.5)
    assert found["spade_exit-gain"].frame.loc["arc", "arc"] == pytest.approx(1.2)


def test_training_sets_compare_over_the_thresholds_they_share(tmp_path: Path) -> None:
    rows = [
        cell(
            "spade_exit", "arc", value, threshold=t, lens_data=train, confidence="entropy",
            token_layer_ratio=1 / 1.1,
        )
        for train, t, value in (("arc", 1.0, 0.6), ("boolq", 1.0, 0.5), ("boolq", 9.0, 0.1))
    ]  # fmt: skip
    found = {
        matrix.name: matrix.frame for matrix in generalisation(sweep_of(*rows, folder=tmp_path))
    }
    assert found["spade_exit-value"]["arc"].to_dict() == pytest.approx({"arc": 0.6, "boolq": 0.5})


def test_adapters_are_told_apart(tmp_path: Path) -> None:
    sweep = sweep_of(
        cell("full", "arc", 0.3, layer=12),
        cell("full", "arc", 0.8, layer=12, adapter="lora-arc"),
        cell("spade", "arc", 0.75, layer=6, adapter="lora-arc", token_layer_ratio=1 / 1.5),
        folder=tmp_path,
    )
    assert len(list(layer_tables(sweep))) == 2
    (found,) = [c for adapter, _, _, c in curves(sweep.cells) if adapter]
    assert found.full == 0.8
    assert set(equal_compute(sweep).frame["task"]) == {"arc [lora-arc]"}


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["", "build/results/adapter-arc"], ["", "adapter-arc"]),
        (["runs/1/arc", "runs/2/arc", "boolq"], ["1/arc", "2/arc", "boolq"]),
        (["user/arc", "arc"], ["user/arc", "arc"]),
        (["/data/arc/", "C:\\data\\boolq"], ["arc", "boolq"]),
        (["data/arc", "data/arc/"], ["data/arc", "data/arc/"]),
    ],
)
def test_adapters_have_short_names(paths: list[str], names: list[str], tmp_path: Path) -> None:
    # The second sweep has fewer adapters; its names must be those of the first.
    sweeps = [
        sweep_of(
            *(cell("full", "arc", 0.5, layer=12, adapter=p) for p in some), folder=tmp_path / n
        )
        for n, some in (("all", paths), ("last", paths[-1:]))
    ]
    short, last = short_adapters(sweeps)
    assert short.cells["adapter"].tolist() == names
    assert last.cells["adapter"].tolist() == names[-1:]


def test_leaderboard(tmp_path: Path) -> None:
    account = {"spade": {"layer": 12, "account": {"mean_exit_layer": 9.5, "implied_speedup": 1.2}}}
    run = build.read_run(written(tmp_path / "run", {"arc": BASE}, config=account))[0]
    sweep = sweep_of(cell("full", "arc", 0.7, layer=12), folder=tmp_path / "sweep")
    frame = leaderboard([run], [sweep]).frame
    assert frame["arc acc"].tolist() == pytest.approx([np.mean(BASE), 0.7])
    assert frame["gain"].iloc[0] == 1.2
    assert frame["run"].iloc[1] == "full model (tiny)"
    assert list(frame)[-2:] == ["exit layer", "gain"]
    assert frame["documents"].tolist() == [str(len(BASE)), "500"]
    assert frame["source"].tolist() == [run.source, sweep.source]
    several = replace(sweep, source="a, b, c")
    assert leaderboard([], [several]).frame["source"].tolist() == ["a and 2 more"]
    two = replace(run, tasks={**run.tasks, "few": replace(run.tasks["arc"], n=9)}, account={"mean_exit_layer": "deep"})  # fmt: skip
    frame = leaderboard([two], []).frame
    assert frame["documents"].tolist() == [f"9 to {len(BASE)}"]
    assert "exit layer" not in frame


def test_latex_and_markdown_escape() -> None:
    frame = pd.DataFrame(
        {"task": ["a_b & 50%", "x|y"], "v": [0.5, math.nan], "± v": [0.25, math.nan]}
    )
    table = Table("t", "50% of $a_b", "", frame)
    text = latex(table)
    assert r"a\_b \& 50\%" in text
    assert r"\caption{50\% of \$a\_b}" in text
    assert r"0.500 $\pm$ 0.250" in text
    assert r"x\|y" in markdown(table)
    assert "nan" not in markdown(table)


def test_numbers_for_reading() -> None:
    shown = [number(v) for v in (0.12345, 12.0, 123456.7, 0.00012, math.nan, 1e9, math.inf)]
    assert shown == ["0.123", "12", "1.235e+05", "0.00012", "", "1.000e+09", "inf"]


def test_file_names() -> None:
    assert slug("layers", "org/model v1", "", "a_b.c") == "layers-org-model-v1-a_b.c"
    assert slug("..", "x") == "-x"


# ---------------------------------------------------------------- figures


def test_layer_figure_shows_what_there_is(tmp_path: Path) -> None:
    (sweep,) = read_sweep(sweep_folder(tmp_path, states=False))
    (plot,) = layer_figure(sweep, perplexity=False)
    axes = plot.figure.axes
    assert [ax.get_title() for ax in axes] == ["arc", "boolq"]
    labels = {line.get_label() for line in axes[0].get_lines()} - {"_child6"}
    assert {
        "SPADE",
        "SPADE-NoS",
        "logit lens",
        "tuned lens (arc)",
        "L-SPADE (arc)",
        "L-SPADE (boolq)",
    } <= labels
    lines = [line for line in axes[0].get_lines() if line.get_marker() != "None"]
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == len(lines)
    (low,) = layer_figure(sweep, perplexity=True)
    assert low.figure.axes[0].get_yscale() == "log"
    spade = next(line for line in axes[0].get_lines() if line.get_label() == "SPADE")
    table = plot.frame[(plot.frame["decoder"] == "spade") & (plot.frame["task"] == "arc")]
    assert spade.get_ydata().tolist() == table.sort_values("layer")["value"].tolist()


@pytest.mark.parametrize(("curves", "bands"), [(5, 6), (6, 1)])
def test_many_bands_are_not_laid_on_each_other(curves: int, bands: int, tmp_path: Path) -> None:
    rows = [
        cell("l_spade", "arc", 0.5, layer=layer, lens_data=f"set{n}")
        for n in range(curves)
        for layer in (4, 8)
    ]
    sweep = sweep_of(cell("full", "arc", 0.7, layer=12), *rows, folder=tmp_path)
    (plot,) = layer_figure(sweep, perplexity=False)
    ax = plot.figure.axes[0]
    assert len(ax.collections) + len(ax.patches) == bands
    assert ("the full model's alone" in plot.caption) == (bands == 1)


def test_exits_stand_beside_the_error_of_the_full_model(tmp_path: Path) -> None:
    """A difference of a few documents must not fill the panel."""
    rule = {"confidence": "entropy", "exit_scope": "context", "token_layer_ratio": 0.9}
    rows = [cell("spade_exit", "arc", v, threshold=t, **rule) for t, v in ((1, 0.7), (2, 0.702))]
    sweep = sweep_of(cell("full", "arc", 0.7, layer=12), *rows, folder=tmp_path)
    (plot,) = exit_figures(sweep)
    low, high = plot.figure.axes[0].get_ylim()
    assert low <= 0.68
    assert high >= 0.72


def test_each_test_set_has_its_own_colours(tmp_path: Path) -> None:
    rows = [cell("full", task, 0.9, layer=12) for task in ("easy", "hard")]
    for task, least in (("easy", 0.7), ("hard", 0.2)):
        for n, data in enumerate(("a", "b")):
            more = {"layer": 9, "lens_data": data}
            rows.append(cell("l_spade", task, least + 0.15 * n, **more))
    (plot,) = generalisation_figure(sweep_of(*rows, folder=tmp_path))
    shown = plot.figure.axes[0].get_images()[0].get_array()
    np.testing.assert_allclose(shown, [[0.0, 0.0], [1.0, 1.0]])
    one = [row for row in rows if row["lens_data"] != "b"]
    assert list(generalisation(sweep_of(*one, folder=tmp_path / "one")))
    assert not list(generalisation_figure(sweep_of(*one, folder=tmp_path / "two")))


def test_a_lens_that_says_nothing_does_not_flatten_the_others(tmp_path: Path) -> None:
    def shown(full: float) -> Any:
        rows = [cell("full", "wiki", full, layer=12, metric="word_perplexity")]
        for name, values in (("logit_lens", (1e50, 1e9)), ("spade", (900.0, 40.0))):
            for layer, value in zip((0, 6), values, strict=True):
                rows.append(cell(name, "wiki", value, layer=layer, metric="word_perplexity"))
        (plot,) = layer_figure(sweep_of(*rows, folder=tmp_path / str(full)), perplexity=True)
        return plot.figure.axes[0].get_ylim()

    assert shown(37.0) == pytest.approx((18.5, 370_000))
    assert shown(math.nan)[1] > 1e50
    assert shown(1e60)[1] < 1e63


def test_more_thresholds_than_a_colour_map_has_colours(tmp_path: Path) -> None:
    rule = {"confidence": "entropy", "exit_scope": "context", "readout": "spade"}
    more = {"token_layer_ratio": 0.9, **rule}
    rows = [cell("spade_exit", "arc", 0.6, threshold=t / 100, **more) for t in range(300)]
    (plot,) = exit_figures(sweep_of(cell("full", "arc", 0.7, layer=12), *rows, folder=tmp_path))
    colours = plot.figure.axes[0].collections[0].to_rgba(np.arange(300))
    assert len(np.unique(colours, axis=0)) > 200


def test_scopes_have_figures_of_their_own(tmp_path: Path) -> None:
    def named(*scopes: str) -> dict[str, set[str]]:
        rows = [cell("full", "arc", 0.7, layer=12)]
        for scope in scopes:
            more = {"confidence": "entropy", "exit_scope": scope, "token_layer_ratio": 0.9}
            rows += [cell("spade_exit", "arc", 0.6, threshold=t, **more) for t in (1.0, 2.0)]
        sweep = sweep_of(*rows, folder=tmp_path / "-".join(scopes))
        return {plot.name: set(plot.frame["exit_scope"]) for plot in exit_figures(sweep)}

    assert named("context") == {"exits-tiny-entropy": {"context", ""}}
    assert named("context", "token") == {
        f"exits-tiny-entropy-{scope}": {scope, ""} for scope in ("context", "token")
    }


@pytest.mark.parametrize(
    "row",
    [
        cell("spade", "arc", 0.5, layer=6, stderr=None),
        cell("full", "arc", 0.5, layer=12),
        cell("mystery", "arc", 0.5, layer=6, lens_data="x", token_layer_ratio=1 / 1.5),
        cell("spade", "wiki", 30.0, layer=6, metric="word_perplexity"),
        cell("spade_exit", "arc", 0.5, threshold=1.0, lens_data="arc", token_layer_ratio=1 / 1.2),
        cell(
            "mystery_exit",
            "arc",
            0.5,
            threshold=math.inf,
            confidence="new",
            token_layer_ratio=1 / 1.2,
        ),
        cell("spade_exit", "arc", 0.5, threshold=1.0),
        cell("spade", "arc", None, layer=6),
    ],
    ids=lambda row: f"{row['decoder']}-{row['metric']}-{row['threshold']}-{row['value']}",
)
def test_one_cell_is_enough(row: dict[str, Any], tmp_path: Path) -> None:
    sweep_folder(tmp_path / "s", pd.DataFrame([row], columns=COLUMNS))
    assert main(["report", str(tmp_path / "s"), "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.html").is_file()


def test_an_unknown_decoder_is_plotted_under_its_name(tmp_path: Path) -> None:
    sweep = sweep_of(cell("mystery", "arc", 0.5, layer=6), folder=tmp_path)
    (plot,) = sweep_figures(sweep)
    assert [line.get_label() for line in plot.figure.axes[0].get_lines()] == ["mystery"]


# ---------------------------------------------------------------- hidden states


def test_a_probe_finds_what_is_there_and_nothing_else() -> None:
    found = probe(clusters(200))
    assert found["layer"].tolist() == [0, 1, 2, 3, 4, 5]
    assert found["accuracy"].iloc[-1] > 0.9
    assert abs(found["accuracy"].iloc[0] - 0.25) < 4 * found["stderr"].iloc[0]
    assert found["chance"].iloc[0] == 0.25
    noise = clusters(200)
    rng = np.random.default_rng(0)
    mixed = probe(States(noise.states, rng.permutation(noise.labels)))
    assert mixed["accuracy"].max() < 0.42  # predicted documents are not those it was trained on


def test_rare_answers_are_left_out_of_a_probe() -> None:
    found = clusters(40)
    labels = found.labels.copy()
    labels[0] = 7
    assert probe(States(found.states, labels))["n"].iloc[0] == 39
    assert probe(States(found.states, np.zeros(40, dtype=int))).empty


def test_states_under_two_adapters_are_two_figures(tmp_path: Path) -> None:
    sweeps = []
    for name, adapter in (("base", ""), ("own", "adapters/lora")):
        cells = pd.DataFrame([cell("full", "arc", 0.5, layer=12, adapter=adapter)], columns=COLUMNS)
        sweeps += read_sweep(sweep_folder(tmp_path / name, cells, states=True))
    (merged,), _ = by_model(short_adapters(sweeps))
    assert merged.states.keys() == {"arc", "arc [lora]"}
    assert merged.states["arc [lora]"].parent.name == "own"
    (alone,), _ = by_model(sweeps[1:])
    assert alone.states.keys() == {"arc"}


def test_components_part_the_answers() -> None:
    frame = components(clusters(200))
    assert set(frame["layer"]) == {0, 1, 2, 3, 4, 5}
    assert set(frame["answer"]) == set("ABCD")

    def spread(layer: int) -> float:
        part = frame[frame["layer"] == layer]
        centres = part.groupby("answer")[["pc1", "pc2"]].mean()
        return float(centres.var().sum() / part[["pc1", "pc2"]].var().sum())

    assert spread(5) > 0.5 > 0.15 > spread(0)


def test_states_that_are_all_the_same(tmp_path: Path) -> None:
    found = clusters()
    found.states[0] = 1.0
    frame = components(found)
    assert np.isfinite(frame[["pc1", "pc2", "share"]]).to_numpy().all()
    assert set(frame["layer"]) == {1, 2, 3, 4, 5}  # a single dot is no picture
    assert components(States(np.ones_like(found.states), found.labels)).empty
    path = tmp_path / "states_arc.safetensors"
    states = found.states.astype(np.float16)
    states[1, 0, 0] = np.inf
    save_file({"states": states, "labels": found.labels}, path)
    assert np.isfinite(read_states(path).states).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"states": np.zeros((3, 4, 2), np.float16)}, "no readable `states` and `labels`"),
        (
            {"states": np.zeros((3, 4, 2), np.float16), "labels": np.zeros(5, np.int64)},
            "do not fit",
        ),
        (
            {"states": np.zeros((3, 4, 1), np.float16), "labels": np.zeros(4, np.int64)},
            "do not fit",
        ),
        (
            {"states": np.zeros((3, 4, 2), np.float16), "labels": np.zeros(4, np.float32)},
            "of float32 do not fit",
        ),
        (None, "no readable `states` and `labels`"),
    ],
)
def test_damaged_states(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "states_arc.safetensors"
    if content is None:
        path.write_bytes(b"no tensors")
    else:
        save_file(content, path)
    with pytest.raises(UserError, match=message):
        read_states(path)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("package", "argv"),
    [("matplotlib", ["report", ".", "--output", "out"]), ("statsmodels", ["compare", "a", "b"])],
)
def test_a_missing_package_is_named(package: str, argv: list[str]) -> None:
    code = f"import sys; sys.modules['{package}'] = None; from spade_eval.cli import main; "
    command = [sys.executable, "-c", f"{code}sys.exit(main({argv}))"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: The package {package} is not installed")
    assert 'pip install "spade-eval[report]"' in done.stderr


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["report", *argv]) == 2
    return capsys.readouterr().err


def test_folders_that_hold_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--output", str(tmp_path / "out")]
    (tmp_path / "empty").mkdir()
    assert "holds no sweep" in refused([str(tmp_path / "empty"), *out], capsys)
    assert "no such file or folder" in refused([str(tmp_path / "none"), *out], capsys)
    (tmp_path / "file").write_text("x")
    assert "is a file; a report is a folder" in refused(
        [str(tmp_path), "--output", str(tmp_path / "file")], capsys
    )
    assert not (tmp_path / "out").exists()


def test_damaged_sweeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(tmp_path / "s"), "--output", str(tmp_path / "out")]
    whole = plausible()
    for cells, message in (
        (whole.drop(columns=["stderr", "readout"]), "lacks the columns readout, stderr"),
        (whole.head(0), "has no rows"),
        (whole.assign(value="high"), "the column value holds something else than numbers"),
    ):
        sweep_folder(tmp_path / "s", cells)
        assert message in refused(argv, capsys)
    table = (sweep_folder(tmp_path / "s") / "sweep.csv").read_bytes()
    (tmp_path / "s" / "sweep.csv").write_bytes(table[:-4])
    assert "ends in the middle of a line" in refused(argv, capsys)
    sweep_folder(tmp_path / "s", states=True)
    (tmp_path / "s" / "states_arc.safetensors").write_bytes(b"no tensors")
    assert "no readable `states`" in refused(argv, capsys)
    assert not (tmp_path / "out").exists()
    (tmp_path / "s" / "sweep.csv").write_bytes(b"\x00\xff\xfe")
    assert "sweep.csv" in refused(argv, capsys)
    (tmp_path / "s" / "sweep.parquet").write_bytes(b"PAR1 and no more")
    assert "cannot be read as a table" in refused(argv, capsys)
    sweep_folder(tmp_path / "t")
    (tmp_path / "t" / "sweep.json").write_text('{"n_layers":')
    assert "is not readable JSON" in refused([str(tmp_path / "t"), *argv[1:]], capsys)
    sweep_folder(tmp_path / "t", n_layers="many")
    assert "number of layers" in refused([str(tmp_path / "t"), *argv[1:]], capsys)
