"""Training documents: what the task asks and the right answer, token for token as lm-eval scores
them, in an order that is shuffled, balanced over the tasks and the same everywhere."""

from __future__ import annotations

import functools
import json
import logging
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.tasks import TaskManager
from test_lm import build
from zoo import byte_tokenizer

from spade_eval import scoring
from spade_eval.errors import UserError
from spade_eval.fit import documents, rows
from spade_eval.fit.documents import Document, enough, from_tasks, from_text
from spade_eval.lm.layer import LogitLensLM

TASKS = Path(__file__).parents[1] / "tasks"
BOS = 1

LOADER = """
import json
from pathlib import Path
from datasets import Dataset, DatasetDict

def load(**_):
    rows = json.loads((Path(__file__).parent / "{name}.json").read_text("utf-8"))
    return DatasetDict({{split: Dataset.from_list(r) for split, r in rows.items()}})

def load_in_any_order(**_):
    import random
    found = load()
    order = random.sample(range(len(found["train"])), len(found["train"]))
    return DatasetDict({{**found, "train": found["train"].select(order)}})

def training_rows_as_a_stream(rows):
    return rows if rows[0]["q"] == "t" else iter(list(rows))

def strict_target(row):
    return {{"a": 0, "b": 1}}[row["gold"]]
"""


@pytest.fixture(scope="module")
def lm() -> Any:
    return build(LogitLensLM, layer=1, max_length=1000)


@functools.cache
def model_with(bos: bool) -> Any:
    return build(LogitLensLM, layer=1, max_length=100, add_bos_token=bos)


pytestmark = pytest.mark.usefixtures("few_tasks")


def texts(docs: list[Document]) -> dict[int, tuple[str, str]]:
    """{row: (context, continuation)} as text; a BOS token in front is left out."""
    decode = byte_tokenizer().decode
    return {
        doc.doc_id: (decode(doc.context, skip_special_tokens=True), decode(doc.continuation))
        for doc in docs
    }


def mini_rows(name: str, split: str = "train") -> list[dict[str, Any]]:
    path = TASKS / "data" / f"{name}.{split}.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write_task(folder: Path, name: str, rows: dict[str, list[dict]], **config: Any) -> None:
    """A task with its data; `functions` names functions of LOADER for keys."""
    (folder / f"{name}_data.py").write_text(LOADER.format(name=name), "utf-8")
    (folder / f"{name}.json").write_text(json.dumps(rows), "utf-8")
    functions = {"custom_dataset": "load", **config.pop("functions", {})}
    splits = {"train": "training_split", "validation": "validation_split", "test": "test_split"}
    config = {"task": name, **{splits[split]: split for split in rows}, **config}
    if config.get("output_type") == "multiple_choice":
        metric = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
        config.setdefault("metric_list", [metric])
    lines = [f"{key}: !function {name}_data.{function}" for key, function in functions.items()]
    (folder / f"{name}.yaml").write_text("\n".join([yaml.safe_dump(config), *lines]), "utf-8")


LETTERS = {
    "doc_to_text": "{{q}}?",
    "doc_to_target": "gold",
    "doc_to_choice": ["one", "two", "three"],
}


def choice_task(folder: Path, golds: list[Any], name: str = "choice", **config: Any) -> None:
    """A three-choice task with a training row per gold, and one valid test row."""
    rows = {"train": [{"q": f"q{n}", "gold": gold} for n, gold in enumerate(golds)]}
    rows["test"] = [{"q": "t", "gold": next((gold for gold in golds if gold is not None), 0)}]
    write_task(folder, name, rows, **{"output_type": "multiple_choice", **LETTERS, **config})


# ---------------------------------------------------------------- the tasks of the repository


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_letters(lm: Any, split: str) -> None:
    rows = mini_rows("science", split)
    docs = from_tasks(lm, ["spade_mini_science"], split, TASKS)
    expected = {}
    for n, row in enumerate(rows):
        choices = "".join(
            f"{x}. {text}\n" for x, text in zip("ABCD", row["choices"]["text"], strict=True)
        )
        answer = "ABCD"[row["choices"]["label"].index(row["answerKey"])]
        expected[n] = f"Question: {row['question']}\n{choices}Answer:", f" {answer}"
    assert texts(docs) == expected
    assert len(docs) == len(rows)
    assert {doc.task for doc in docs} == {"spade_mini_science"}
    assert len({answer for _, answer in texts(docs).values()}) == 4


def test_whole_answers(lm: Any) -> None:
    found = texts(from_tasks(lm, ["spade_mini_science_text"], include_path=TASKS))
    for n, row in enumerate(mini_rows("science")):
        answer = row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]
        assert found[n] == (f"Question: {row['question']}\nAnswer:", f" {answer}")


def test_pages_become_windows(lm: Any) -> None:
    docs = from_tasks(lm, ["spade_mini_articles"], include_path=TASKS)
    pages = Counter(doc.doc_id for doc in docs)
    assert len(pages) == len(mini_rows("articles"))
    assert min(pages.values()) > 1
    assert max(len(doc.context + doc.continuation) - 1 for doc in docs) == lm.max_length
    requests = task_requests("spade_mini_articles", TASKS, "train")
    assert sorted((d.context, d.continuation) for d in docs) == sorted(scored(lm, requests))


# ---------------------------------------------------------------- as lm-eval scores them


def task_requests(name: str, folder: Path, split: str = "test") -> list[Any]:
    """The requests that lm-eval makes of a split."""
    task = TaskManager(include_path=str(folder), include_defaults=False).load(name)["tasks"][name]
    task.config.num_fewshot = 0
    task.config.test_split = split
    task.build_all_requests()
    return task.instances


def scored(lm: Any, requests: list[Any]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The token ids that reach the model."""
    seen: list[Any] = []

    def note(pairs: list[Any], *_: Any, **__: Any) -> list[tuple[float, bool]]:
        seen.extend((tuple(context), tuple(continuation)) for _, context, continuation in pairs)
        return [(0.0, True)] * len(pairs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm, "_loglikelihood_tokens", note)
        getattr(lm, requests[0].request_type)(requests, disable_tqdm=True)
    return seen


ROWS = [{"q": f"q{n}", "gold": n % 3, "word": f"w{n}"} for n in range(6)]
CHOICE = {"output_type": "multiple_choice", **LETTERS}
MUTUAL = {"metric": "acc_mutual_info", "aggregation": "mean", "higher_is_better": True}
# name: (configuration, request of row n, its text)
AS_SCORED: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "choice": (CHOICE, lambda n: 3 * n + n % 3, lambda n: f"q{n}? " + ["one", "two", "three"][n % 3]),
    "described": (CHOICE | {"description": "Answer {{q}}.\n\n", "num_fewshot": 2}, lambda n: 3 * n + n % 3, lambda n: f"Answer q{n}.\n\nq{n}? " + ["one", "two", "three"][n % 3]),
    "no_delimiter": (CHOICE | {"target_delimiter": ""}, lambda n: 3 * n + n % 3, lambda n: f"q{n}?" + ["one", "two", "three"][n % 3]),
    "prefixed": (CHOICE | {"gen_prefix": "So"}, lambda n: 3 * n + n % 3, lambda n: f"q{n}? So " + ["one", "two", "three"][n % 3]),
    "mutual": (CHOICE | {"metric_list": [MUTUAL]}, lambda n: 6 * n + n % 3, lambda n: f"q{n}? " + ["one", "two", "three"][n % 3]),
    "golds": (CHOICE | {"doc_to_target": "{{[gold, 0]}}"}, lambda n: 3 * n + n % 3, lambda n: f"q{n}? " + ["one", "two", "three"][n % 3]),
    "named": (CHOICE | {"doc_to_target": "{{['one', 'two', 'three'][gold]}}"}, lambda n: 3 * n + n % 3, lambda n: f"q{n}? " + ["one", "two", "three"][n % 3]),
    "inputs": (CHOICE | {"doc_to_text": "gold", "doc_to_target": "{{word}} too", "doc_to_choice": "{{[q + ' a', q + ' b', q + ' c']}}"}, lambda n: 3 * n + n % 3, lambda n: f"q{n} {'abc'[n % 3]} w{n} too"),
    "word": ({"output_type": "loglikelihood", "doc_to_text": "{{q}} and", "doc_to_target": "{{' ' + word}}"}, lambda n: n, lambda n: f"q{n} and w{n}"),
    "no_context": ({"output_type": "loglikelihood", "doc_to_text": "", "doc_to_target": "{{word}}"}, lambda n: n, lambda n: f"w{n}"),
    "blanks": ({"output_type": "loglikelihood", "doc_to_text": "{{q}}  ", "doc_to_target": "{{word}}"}, lambda n: n, lambda n: f"q{n}  w{n}"),
    "bos_text": ({"output_type": "loglikelihood", "doc_to_text": "", "doc_to_target": "<bos>{{word}}"}, lambda n: n, lambda n: f"w{n}"),
    "rolling": ({"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{word}}"}, lambda n: n, lambda n: f"w{n}"),
}  # fmt: skip


@pytest.mark.parametrize("name", AS_SCORED)
@pytest.mark.parametrize("bos", [False, True])
def test_right_answers_are_scored_requests(name: str, bos: bool, tmp_path: Path) -> None:
    """Token for token the request that lm-eval makes for the right answer."""
    lm = model_with(bos)
    config, request, text = AS_SCORED[name]
    write_task(tmp_path, name, {"train": ROWS, "test": ROWS}, **config)
    docs = {doc.doc_id: doc for doc in from_tasks(lm, [name], include_path=tmp_path)}
    pairs = scored(lm, task_requests(name, tmp_path))
    assert docs.keys() == set(range(len(ROWS)))
    for n, doc in docs.items():
        assert (doc.context, doc.continuation) == pairs[request(n)]
        assert byte_tokenizer().decode(
            doc.context + doc.continuation, skip_special_tokens=True
        ) == text(n)
        assert bos <= (doc.context[0] == BOS)


GENERATE = {
    "output_type": "generate_until",
    "doc_to_text": "{{q}}=",
    "generation_kwargs": {"until": ["\n"]},
}


@pytest.mark.parametrize(
    ("config", "row", "expected"),
    [
        ({"doc_to_target": "gold"}, {"gold": "yes"}, ("Q=", " yes")),
        ({"doc_to_target": "gold"}, {"gold": 42}, ("Q=", " 42")),
        ({"doc_to_target": "gold"}, {"gold": ["first", "second"]}, ("Q=", " first")),
        ({"doc_to_target": "gold", "target_delimiter": "\n"}, {"gold": "yes"}, ("Q=", "\nyes")),
        ({"doc_to_target": "gold", "target_delimiter": ""}, {"gold": "yes"}, ("Q=", "yes")),
        ({"doc_to_target": "gold", "doc_to_choice": ["no", "yes"]}, {"gold": 1}, ("Q=", " yes")),
        ({"doc_to_target": "gold", "gen_prefix": "So,"}, {"gold": "yes"}, ("Q= So,", " yes")),
        ({"doc_to_target": "gold", "gen_prefix": "def f():\n"}, {"gold": "x"}, ("Q= def f():", "\nx")),
        ({"doc_to_target": "gold", "description": "Do. ", "num_fewshot": 5}, {"gold": "y"}, ("Do. Q=", " y")),
    ],
)  # fmt: skip
def test_generation(lm: Any, tmp_path: Path, config: dict, row: dict, expected: tuple) -> None:
    rows = [{"q": "Q", **row}]
    write_task(tmp_path, "generate", {"train": rows, "test": rows}, **GENERATE, **config)
    assert texts(from_tasks(lm, ["generate"], include_path=tmp_path)) == {0: expected}


def test_generation_answers_as_in_few_shot_examples(lm: Any, tmp_path: Path) -> None:
    config = {**GENERATE, "doc_to_target": "word", "gen_prefix": "So", "fewshot_delimiter": "##"}
    write_task(tmp_path, "generate", {"train": ROWS[:1], "test": ROWS[1:]}, **config)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    task = manager.load("generate")["tasks"]["generate"]
    task.set_fewshot_seed(0)
    shot, _ = task.fewshot_context(ROWS[1], num_fewshot=1, gen_prefix="So").split("##")
    assert shot == "".join(texts(from_tasks(lm, ["generate"], include_path=tmp_path))[0])


def test_documents_are_requests(lm: Any) -> None:
    docs = from_tasks(lm, ["spade_mini_yesno"], include_path=TASKS)
    plan = scoring.plan(docs, scoring.Layout(max_length=lm.max_length))
    assert {request for row in plan.rows for _, _, request in row.reads} == set(range(len(docs)))


def test_long_contexts_are_kept_whole(tmp_path: Path) -> None:
    lm = build(LogitLensLM, layer=1, max_length=20)
    rows = [{"q": "x" * 50, "gold": 0}]
    write_task(tmp_path, "choice", {"train": rows, "test": rows}, **CHOICE)
    [doc] = from_tasks(lm, ["choice"], include_path=tmp_path)
    assert len(doc.context) == 51
    assert scoring.plan([doc], scoring.Layout(max_length=20)).truncated == 1


# ---------------------------------------------------------------- order

THREE = ["spade_mini_science", "spade_mini_yesno", "spade_mini_health"]


def test_every_prefix_is_balanced(lm: Any) -> None:
    docs = from_tasks(lm, THREE, include_path=TASKS)
    sizes = dict(zip(THREE, [80, 34, 44], strict=True))
    assert Counter(doc.task for doc in docs) == sizes
    for n in range(len(docs)):
        counts = Counter(doc.task for doc in docs[:n])
        going_on = [name for name in THREE if counts[name] < sizes[name]]
        most = max(counts[name] for name in THREE)
        assert all(most - counts[name] <= 1 for name in going_on)
    assert {doc.task for doc in docs[-30:]} == {"spade_mini_science"}


def test_rows_are_shuffled_the_same_way_everywhere(lm: Any) -> None:
    """Fixed numbers: they depend on nothing but the seed and the task's name."""
    take = functools.partial(from_tasks, lm, ["spade_mini_science"], include_path=TASKS)
    assert [doc.doc_id for doc in take(most=5)] == [72, 73, 24, 23, 43]
    assert [doc.doc_id for doc in take(most=5, seed=1)] == [47, 8, 38, 59, 74]


def test_a_tasks_order_is_its_own(lm: Any) -> None:
    alone = from_tasks(lm, THREE[1:2], include_path=TASKS, seed=3)
    together = from_tasks(lm, THREE[::-1], include_path=TASKS, seed=3)
    assert [doc for doc in together if doc.task == THREE[1]] == alone
    order = {n: [d.doc_id for d in together if d.task == n and d.doc_id < 34] for n in THREE}
    assert order[THREE[0]] != order[THREE[1]] != order[THREE[2]]


@pytest.mark.parametrize("most", [1, 2, 7, 100, 10_000])
def test_fewer_documents_are_the_first_of_all(lm: Any, most: int) -> None:
    everything = from_tasks(lm, THREE, include_path=TASKS)
    assert from_tasks(lm, THREE, include_path=TASKS, most=most) == everything[:most]


def test_only_what_is_taken_is_formatted(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, calls = lm.tok_encode, []
    monkeypatch.setattr(
        lm, "tok_encode", lambda *args, **kw: calls.append(args) or encode(*args, **kw)
    )
    template, formatted = documents.right_answer, []
    monkeypatch.setattr(
        documents, "right_answer", lambda *args: formatted.append(args) or template(*args)
    )
    assert len(from_tasks(lm, THREE, include_path=TASKS, most=6)) == 6
    assert len(formatted) == 6
    assert len(calls) <= 2 * 6


def test_duplicates_of_a_task_are_one_document(lm: Any, tmp_path: Path) -> None:
    rows = [{"q": "same", "gold": 1}] * 3 + [{"q": "same", "gold": 2}]
    for name in ("here", "there"):
        write_task(tmp_path, name, {"train": rows, "test": rows}, **CHOICE)
    docs = from_tasks(lm, ["here", "there"], include_path=tmp_path)
    assert Counter(doc.task for doc in docs) == {"here": 2, "there": 2}


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["spade_mini_yesno", "spade_mini_health"], ["yesno", "health"]),
        (["spade_mini_h*"], ["health"]),
        (["spade_mini"], ["articles", "health", "science", "science_text", "yesno"]),
        (["spade_mini_s*", "spade_mini_science"], ["science", "science_text"]),
        (["spade_mini_yesno", "spade_mini"], ["yesno", "articles", "health", "science", "science_text"]),
        ([str(TASKS / "spade_mini_yesno.yaml")], ["yesno"]),
    ],
)  # fmt: skip
def test_names_as_on_the_command_line(lm: Any, names: list[str], found: list[str]) -> None:
    docs = from_tasks(lm, names, include_path=TASKS, most=len(found))
    assert [doc.task for doc in docs] == [f"spade_mini_{name}" for name in found]


def test_groups_and_several_folders(lm: Any, tmp_path: Path) -> None:
    choice_task(tmp_path, [0, 1])
    group = {"group": "both", "task": ["choice", "spade_mini_yesno"]}
    (tmp_path / "group.yaml").write_text(yaml.safe_dump(group), "utf-8")
    docs = from_tasks(lm, ["both", "choice"], include_path=[TASKS, tmp_path])
    assert Counter(doc.task for doc in docs) == {"choice": 2, "spade_mini_yesno": 34}


def test_stock_tasks_are_known(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "TaskManager", TaskManager)
    with pytest.raises(UserError, match=r"unknown task 'arc_esy'\. Did you mean 'arc_easy'\?"):
        from_tasks(lm, ["arc_esy"])


# ---------------------------------------------------------------- rows that cannot be used


@pytest.mark.parametrize(
    ("golds", "reason"),
    [
        ([0, -1, 1], "row 1: the right answer is -1, of 3 choices"),
        ([0, -100, 1], "row 1: the right answer is -100, of 3 choices"),
        ([0, 3, 1], "row 1: the right answer is 3, of 3 choices"),
        ([0, None, 1], "row 1: the right answer is None, of 3 choices"),
        (["one", "four", "two"], "row 1: the right answer is 'four', of 3 choices"),
        ([[0], [], [1]], "row 1: IndexError: list index out of range"),
    ],
)
def test_rows_without_an_answer_are_left_out(
    golds: list[Any], reason: str, lm: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    choice_task(tmp_path, golds)
    with caplog.at_level(logging.WARNING, rows.__name__):
        docs = from_tasks(lm, ["choice"], include_path=tmp_path)
    assert texts(docs) == {0: ("q0?", " one"), 2: ("q2?", " two")}
    ours = [record.message for record in caplog.records if record.name == rows.__name__]
    assert ours == [f"1 of 3 rows of choice are unusable; the first, {reason}."]


def test_empty_and_long_answers_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lm = build(LogitLensLM, layer=1, max_length=20)
    rows = [
        {"q": f"q{n}", "word": word}
        for n, word in enumerate(["w", "", " ", "x" * 19, "x" * 20, None])
    ]
    for name, column in [("word", "{{word}}"), ("field", "word")]:
        write_task(
            tmp_path, name, {"train": rows, "test": rows[:1]}, **GENERATE, doc_to_target=column
        )
        kept = {0: ("q0=", " w"), 3: ("q3=", " " + "x" * 19)}
        found = texts(from_tasks(lm, [name], include_path=tmp_path))
        assert found == kept | ({5: ("q5=", " None")} if column == "{{word}}" else {})
    assert "4 of 6 rows of field are unusable" in caplog.text


def test_a_task_that_fails_on_a_row(
    lm: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    choice_task(
        tmp_path, ["a", "?", "b"], functions={"doc_to_target": "strict_target"}, doc_to_target=None
    )
    assert set(texts(from_tasks(lm, ["choice"], include_path=tmp_path))) == {0, 2}
    assert "1 of 3 rows of choice are unusable; the first, row 1: KeyError: '?'." in caplog.text


def test_the_warning_counts_the_rows_that_were_looked_at(
    lm: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    choice_task(tmp_path, [-1] * 30 + [0] * 30)
    docs = from_tasks(lm, ["choice"], include_path=tmp_path, most=10)
    [message] = [record.message for record in caplog.records if record.name == rows.__name__]
    left_out, taken = message.split()[0:3:2]
    assert int(taken) - int(left_out) == len(docs) == 10
    assert 0 < int(left_out) < 30


def test_no_usable_row(lm: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    choice_task(tmp_path, [-1, -1], "hidden")
    with pytest.raises(
        UserError,
        match=r"hidden: none of 2 rows is usable; the first, row \d: the right answer is -1, of 3 choices\. Choose another",
    ):
        from_tasks(lm, ["hidden"], include_path=tmp_path)
    assert not [record for record in caplog.records if record.name == rows.__name__]


def test_filters_of_tasks(lm: Any, tmp_path: Path) -> None:
    """What a task's own filter leaves may be a stream."""
    choice_task(tmp_path, [0, 1, 2], functions={"process_docs": "training_rows_as_a_stream"})
    assert len(from_tasks(lm, ["choice"], include_path=tmp_path)) == 3


# ---------------------------------------------------------------- errors


def test_missing_split(lm: Any, tmp_path: Path) -> None:
    config = {"output_type": "multiple_choice", **LETTERS}
    write_task(tmp_path, "evaluation", {"validation": ROWS, "test": ROWS}, **config)
    with pytest.raises(
        UserError,
        match=r"task evaluation has no train split; it has: validation, test\. Choose one",
    ):
        from_tasks(lm, ["evaluation"], include_path=tmp_path)
    with pytest.raises(
        UserError, match=r"split='training' is not known; valid: train, validation, test"
    ):
        from_tasks(lm, ["evaluation"], "training", include_path=tmp_path)


def test_split_that_the_data_lack(lm: Any, tmp_path: Path) -> None:
    config = {
        "training_split": "trian",
        "fewshot_split": "test",
        "output_type": "multiple_choice",
        **LETTERS,
    }
    write_task(tmp_path, "typo", {"test": ROWS}, **config)
    with pytest.raises(
        UserError, match=r"task typo: its train rows cannot be read: KeyError: .*trian"
    ):
        from_tasks(lm, ["typo"], include_path=tmp_path)


def test_names_that_are_not_tasks(lm: Any) -> None:
    with pytest.raises(
        UserError,
        match=r"unknown task 'spade_mini_scienc'\. Did you mean 'spade_mini_science'\?.*lm_eval ls tasks",
    ):
        from_tasks(lm, ["spade_mini_yesno", "spade_mini_scienc"], include_path=TASKS)
    with pytest.raises(UserError, match=r"unknown task 'spade_x\*'"):
        from_tasks(lm, ["spade_x*"], include_path=TASKS)
    with pytest.raises(UserError, match="no task is named"):
        from_tasks(lm, [], include_path=TASKS)


@pytest.mark.parametrize("most", [0, -3])
def test_number_of_documents(lm: Any, most: int) -> None:
    with pytest.raises(UserError, match=f"{most} documents are asked for: give a number from 1 up"):
        from_tasks(lm, ["spade_mini_yesno"], include_path=TASKS, most=most)


def test_data_that_cannot_be_loaded(lm: Any, tmp_path: Path) -> None:
    """Without network: one line that names the task and the cause."""
    config = {
        "task": "far",
        "dataset_path": "spade-eval/no-such-data",
        "output_type": "multiple_choice",
        "test_split": "test",
        **LETTERS,
    }
    (tmp_path / "far.yaml").write_text(yaml.safe_dump(config), "utf-8")
    with pytest.raises(
        UserError, match=r"task far cannot be loaded: \w+: .*spade-eval/no-such-data"
    ) as caught:
        from_tasks(lm, ["far"], include_path=tmp_path)
    assert "\n" not in str(caught.value)


PYTHON_TASK = """
from lm_eval.api.task import ConfigurableTask

class Own(ConfigurableTask):
    def __init__(self, config):
        super().__init__(config={key: config[key] for key in config if key != "class"})

    def construct_requests(self, doc, ctx, **kwargs):
        return []
"""


def test_tasks_whose_answers_are_not_known(lm: Any, tmp_path: Path) -> None:
    choice_task(tmp_path, [0, 1], "pictures", doc_to_image="q")
    choice_task(tmp_path, [0, 1], "own", functions={"class": "Own"})
    with (tmp_path / "own_data.py").open("a", encoding="utf-8") as file:
        file.write(PYTHON_TASK)
    for name in ("pictures", "own"):
        with pytest.raises(UserError, match=f"task {name} .* Leave it out"):
            from_tasks(lm, [name], include_path=tmp_path)


def test_tasks_that_shuffle_are_built_as_lm_eval_builds_them(tmp_path: Path) -> None:
    """Whatever random numbers were drawn before, and whichever tasks stand beside."""
    shuffling = {"functions": {"custom_dataset": "load_in_any_order"}}
    for name in ("one", "two"):
        choice_task(tmp_path, [0, 1, 2] * 5, name, **shuffling)

    def questions(names: list[str], seed: int) -> list[str]:
        random.seed(seed)
        task = documents.load_tasks(names, tmp_path)["two"]
        return [row["q"] for row in task.training_docs()]

    random.seed(0)  # lm-eval's own
    order = random.sample(range(15), 15)
    assert questions(["two"], 5) == questions(["one", "two"], 6) == [f"q{n}" for n in order]


# ---------------------------------------------------------------- text files


def test_lines_of_json(lm: Any, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    written = ["One\u2028line.", "Two\n\nparts", "Drei Äpfel", "One\u2028line.", "  "]
    lines = [json.dumps({"id": 1, "text": text}, ensure_ascii=False) for text in written]
    path.write_text("\r\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:]) + "\n", "utf-8-sig")
    docs = list(from_text(lm, path))
    assert sorted(texts(docs).values()) == sorted(("", text) for text in written[:3])
    assert {doc.task for doc in docs} == {"texts.jsonl"}
    assert {doc.context for doc in docs} == {(lm.prefix_token_id,)}


def test_plain_text(lm: Any, tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes("\ufeffFirst\nstill first\r\n\r\nSecond \n \t\n\n\nThird\n".encode())
    found = {text for _, text in texts(list(from_text(lm, path))).values()}
    assert found == {"First\nstill first", "Second ", "Third\n"}


def test_text_is_cut_into_windows_and_shuffled(tmp_path: Path) -> None:
    lm = build(LogitLensLM, layer=1, max_length=10)
    rng = random.Random(0)
    written = [f"{n:02d} " + "".join(rng.choices("abcdef", k=9 * (n % 4))) for n in range(30)]
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(written), "utf-8")
    docs = list(from_text(lm, path))
    parts: dict[int, str] = {}
    for doc in docs:
        assert len(doc.context + doc.continuation) <= 11
        parts[doc.doc_id] = parts.get(doc.doc_id, "") + byte_tokenizer().decode(doc.continuation)
    assert parts == dict(enumerate(written))
    assert list(parts) != sorted(parts)
    assert list(from_text(lm, path, seed=1)) != docs


def test_texts_become_tokens_when_it_is_their_turn(tmp_path: Path) -> None:
    lm = build(LogitLensLM, layer=1, max_length=10)
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(f"text {n} " * 9 for n in range(50)), "utf-8")
    encoded = []
    encode = lm.tok_encode
    lm.tok_encode = lambda text, **kwargs: encoded.append(text) or encode(text, **kwargs)
    found = enough(from_text(lm, path), lambda d: len(d.continuation), 60, share=1)
    assert sum(len(document.continuation) for document in found) >= 60
    assert len(encoded) == len({document.doc_id for document in found}) == 2


@given(
    sizes=st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=9), min_size=1, max_size=12),
    budget=st.integers(1, 200),
)
def test_a_long_text_leaves_room_for_others(sizes: list[list[int]], budget: int) -> None:
    every = [
        Document((), (0,) * size, task="t", doc_id=n)
        for n, parts in enumerate(sizes)
        for size in parts
    ]
    found = enough(iter(every), lambda d: len(d.continuation), budget, share=0.1)
    got = [sum(len(d.continuation) for d in found if d.doc_id == n) for n in range(len(sizes))]
    assert len({id(document) for document in found}) == len(found)
    assert len(sizes) < 2 or sum(map(bool, got)) >= 2
    assert sum(got) >= min(budget, sum(map(sum, sizes)))  # as many as there are
    if sum(min(sum(parts), budget / 10) for parts in sizes) >= budget:
        assert max(got) <= budget / 10 + 20  # up to one window more
    least = min(sum(parts) for parts in sizes)
    assert max(got) <= max(budget / 10, budget / len(sizes), budget - least * (len(sizes) - 1)) + 20


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, r"none\.txt cannot be read as UTF-8 text: FileNotFoundError"),
        ("latin.txt", b"caf\xe9", r"latin\.txt cannot be read as UTF-8 text: UnicodeDecodeError"),
        ("empty.txt", b" \n\n\t\n", r"empty\.txt has no text in it"),
        ("empty.jsonl", b'{"text": ""}\n', r"empty\.jsonl has no text in it"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a\.jsonl, line 3 is not JSON: JSONDecodeError"),
        ("b.jsonl", b'{"body": "x", "id": 1}\n', r'b\.jsonl, line 1 has no string under "text"; found the keys body, id'),
        ("c.jsonl", b'{"text": "x"}\n{"text": 5}', r'line 2 has no string under "text"; found the keys text'),
        ("d.jsonl", b'["x"]', r'line 1 has no string under "text"; found a list'),
    ],
)  # fmt: skip
def test_bad_text_files(
    lm: Any, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(from_text(lm, tmp_path / name))
