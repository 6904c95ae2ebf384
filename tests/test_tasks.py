"""The tasks of this repository: listed, built, laid out and scored as their files promise.

* every task is found under the repository's `tasks` folder and builds; the built-in ones need
  neither network nor cache, the others are built here on stand-in rows with the hub's columns;
* a prompt is, character for character, what the README shows;
* every answer of the letter and yes/no tasks is one token behind its prompt;
* choices become letters by position, whatever the row calls them;
* on the real benchmark files every row gives a prompt and a valid target.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pytest
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from lm_eval.api.task import ConfigurableTask
    from transformers import PreTrainedTokenizerBase

TASKS = Path(__file__).parents[1] / "tasks"
REAL_DATA = Path(__file__).parents[2] / "shared" / "data"

PAPER = {
    "spade_arc_challenge": ("allenai/ai2_arc", "ARC-Challenge"),
    "spade_arc_easy": ("allenai/ai2_arc", "ARC-Easy"),
    "spade_boolq": ("aps/super_glue", "boolq"),
    "spade_headqa_en": ("EleutherAI/headqa", "en"),
    "spade_headqa_es": ("EleutherAI/headqa", "es"),
}
HUB = {**PAPER, "spade_wikitext103": ("EleutherAI/wikitext_document_level", "wikitext-103-raw-v1")}
MINI = {
    "spade_mini_articles",
    "spade_mini_health",
    "spade_mini_science",
    "spade_mini_science_text",
    "spade_mini_yesno",
}
ONE_TOKEN = [*PAPER, "spade_mini_health", "spade_mini_science", "spade_mini_yesno"]

Rows = dict[str, list[dict[str, Any]]]  # {split: rows}
Source = Callable[[str, str], Rows]  # (data set, configuration) -> its rows


def arc_row(labels: str, answer: str) -> dict[str, Any]:
    """An ARC row with one choice per label."""
    texts = [f"choice {index}" for index in range(len(labels))]
    choices = {"text": texts, "label": list(labels)}
    return {"id": f"row-{labels}", "question": "Which?", "choices": choices, "answerKey": answer}


def headqa_row(aids: list[int], answer: int) -> dict[str, Any]:
    """A HEAD-QA row with one answer per aid."""
    answers = [{"aid": aid, "atext": f"choice {index}"} for index, aid in enumerate(aids)]
    row = {"name": "exam", "year": "2013", "category": "biology", "qid": 1}
    return {**row, "qtext": "Which?", "ra": answer, "answers": answers}


def boolq_row(label: int) -> dict[str, Any]:
    """A BoolQ row."""
    return {"question": "is it so", "passage": "So it is.", "idx": label, "label": label}


def stand_in(path: str, name: str) -> Rows:
    """A few rows with the columns of a data set on the hub."""
    if path == "allenai/ai2_arc":
        rows = [arc_row("ABC", "C"), arc_row("ABCDE", "E"), arc_row("1234", "2")]
    elif path == "EleutherAI/headqa":
        rows = [headqa_row([1, 2, 3, 4], 3), headqa_row([1, 2, 3, 4, 5], 5)]
    elif path == "aps/super_glue":
        rows = [boolq_row(0), boolq_row(1)]
    else:
        rows = [{"page": " = Title = \n \n Some words , here . \n"}]
    splits = ("train", "validation") if name == "boolq" else ("train", "validation", "test")
    return dict.fromkeys(splits, rows)


def real(path: str, name: str) -> Rows:
    """The real rows of a data set; without the data folder the test is skipped."""
    if not REAL_DATA.is_dir():
        pytest.skip("the real benchmark files are not there (../shared/data beside the repository)")
    stem = f"headqa_{name}" if path == "EleutherAI/headqa" else name
    files = {file.name.split(".")[-2]: file for file in sorted(REAL_DATA.glob(f"{stem}.*.jsonl"))}
    assert {"train", "validation"} <= files.keys(), f"no files of {stem} in the data folder"
    return {
        split: [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        for split, file in files.items()
    }


def module(name: str) -> ModuleType:
    """The Python file of that name beside the YAML files."""
    spec = importlib.util.spec_from_file_location(f"tasks_{name}", TASKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    """A task manager that knows our tasks only."""
    return TaskManager(include_path=str(TASKS), include_defaults=False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Source], None]:
    """A function that puts a source of rows in the place of the hub; at first `stand_in`."""

    def use(source: Source) -> None:
        def load_dataset(path: str, name: str) -> datasets.DatasetDict:
            splits = source(path, name).items()
            return datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits})

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    use(stand_in)
    return use


@pytest.fixture
def build(manager: TaskManager, hub: Callable[[Source], None]) -> Callable[..., ConfigurableTask]:
    """A function that builds a task from stand-in rows, or from another source."""

    def build_task(name: str, source: Source = stand_in) -> ConfigurableTask:
        hub(source)
        return manager.load(name)["tasks"][name]

    return build_task


@pytest.fixture(scope="module")
def tokenizer(default_model_dir: str | Path) -> PreTrainedTokenizerBase:
    """The default model's tokenizer."""
    from transformers import AutoTokenizer

    if not (Path(default_model_dir) / "tokenizer.json").is_file():
        pytest.skip("the default model is not installed: its folder has no tokenizer.json")
    return AutoTokenizer.from_pretrained(default_model_dir)


def docs(task: ConfigurableTask) -> Iterator[dict[str, Any]]:
    """All rows of a task, split after split."""
    for split in task.dataset.values():
        yield from split


# Listed and built


def test_every_task_is_listed(manager: TaskManager) -> None:
    """The folder holds our tasks and two tags, and no file that the harness cannot read."""
    assert set(manager.all_subtasks) == {*HUB, *MINI}
    assert set(manager.all_tags) == {"spade_mini", "spade_paper"}
    assert manager.task_index["spade_paper"].tags == {*PAPER}
    assert manager.task_index["spade_mini"].tags == MINI
    assert {file.stem for file in TASKS.glob("*.yaml")} == {*HUB, *MINI}


def test_names_do_not_shadow_tasks_of_the_harness(manager: TaskManager) -> None:
    """Every name starts with ours, so none can override a stock task."""
    assert all(name.startswith("spade_") for name in manager.all_tasks)


@pytest.mark.parametrize("file", sorted(TASKS.glob("*.yaml")), ids=lambda file: file.stem)
def test_no_task_runs_foreign_code(file: Path) -> None:
    """No data set script and no loader argument that a model argument could clash with."""
    text = file.read_text("utf-8")
    assert "trust_remote_code" not in text
    assert "dataset_kwargs" not in text
    assert "unsafe_code" not in text


@pytest.mark.parametrize("name", sorted(HUB))
def test_hub_tasks_ask_for_the_official_data(
    name: str, build: Callable[..., ConfigurableTask]
) -> None:
    """Data set, configuration and splits are those of the stock tasks."""
    task = build(name)
    assert HUB[name] == (task.DATASET_PATH, task.DATASET_NAME)
    assert task.VERSION == 1.0
    assert (task.config.training_split, task.config.validation_split) == ("train", "validation")
    assert task.config.test_split == (None if name == "spade_boolq" else "test")
    assert len(task.training_docs()) > 0


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("tag", ["spade_paper", "spade_wikitext103", "spade_mini"])
def test_tasks_run_from_prompt_to_metric(tag: str, manager: TaskManager) -> None:
    """The harness scores them, few-shot included, and reports the metrics that they name."""
    shots = 0 if tag == "spade_wikitext103" else 2
    output = simple_evaluate(
        model="dummy",
        tasks=[tag],
        task_manager=manager,
        num_fewshot=shots,
        limit=2,
        bootstrap_iters=0,
    )
    assert output is not None
    perplexities = {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    for name, scores in output["results"].items():
        metrics = {key.split(",")[0] for key in scores if "," in key and "_stderr" not in key}
        if name in ("spade_wikitext103", "spade_mini_articles"):
            assert metrics == perplexities
            assert not any(output["higher_is_better"][name].values())
        else:
            text = name == "spade_mini_science_text"
            assert metrics == ({"acc", "acc_norm"} if text else {"acc"})
            assert all(output["higher_is_better"][name].values())


BUILD_OFFLINE = """
import sys
from lm_eval.tasks import TaskManager

arguments = ("pretrained", "layer", "name", "path", "data", "split", "task", "file")
metadata = dict.fromkeys(arguments, "a model argument")
manager = TaskManager(include_path=sys.argv[1], include_defaults=False, metadata=metadata)
for name, task in manager.load("spade_mini")["tasks"].items():
    print(name, len(task.training_docs()), len(task.validation_docs()), len(task.test_docs()))
"""


def test_built_in_tasks_need_no_network_and_no_cache(tmp_path: Path) -> None:
    """They build offline with an empty cache, elsewhere, under any model argument."""
    home = tmp_path / "hf"
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    offline = {**kept, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BUILD_OFFLINE, str(TASKS)],
        cwd=tmp_path,
        env=offline,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    sizes = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert sizes.keys() == MINI
    assert all(int(size) > 0 for split_sizes in sizes.values() for size in split_sizes)
    assert not list(home.rglob("*.arrow"))


def test_missing_built_in_file_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An incomplete installation is named as such."""
    builtin = module("builtin")
    monkeypatch.setattr(builtin, "_DATA", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"science\.train\.jsonl .* install spade_eval"):
        builtin.science()


# Prompts


def test_science_prompt(manager: TaskManager) -> None:
    """The prompt of a lettered question is what the README shows."""
    task = manager.load("spade_mini_science")["tasks"]["spade_mini_science"]
    row = next(row for row in docs(task) if row["id"] == "small_science_0109")
    context = task.fewshot_context(row, 0)
    assert context == (
        "Question: A balloon that has been rubbed on a wool sweater sticks to a wall. "
        "What holds it there?\n"
        "A. nuclear energy\n"
        "B. surface tension\n"
        "C. Earth's gravity\n"
        "D. electric charge\n"
        "Answer:"
    )
    requests = [request.args for request in task.construct_requests(row, context)]
    assert requests == [(context, f" {letter}") for letter in "ABCD"]
    assert task.doc_to_target(row) == 3


def test_yesno_prompt(manager: TaskManager) -> None:
    """The prompt of a yes/no question is the passage, the question and "Answer:"."""
    task = manager.load("spade_mini_yesno")["tasks"]["spade_mini_yesno"]
    row = next(row for row in task.test_docs() if row["idx"] == 2)
    context = task.fewshot_context(row, 0)
    assert context == (
        "An octopus has three hearts. Two of them pump blood through the gills, and the third "
        "sends it to the rest of the body. Octopus blood carries oxygen with a protein that "
        "contains copper instead of iron, and this gives the blood a blue color. The animal has "
        "no bones at all, so it can squeeze through very small openings.\n"
        "Question: does an octopus have only one heart?\n"
        "Answer:"
    )
    requests = [request.args for request in task.construct_requests(row, context)]
    assert requests == [(context, " no"), (context, " yes")]
    assert task.doc_to_target(row) == 0
    assert not any("??" in task.fewshot_context(row, 0) for row in docs(task))


def test_spanish_prompt(build: Callable[..., ConfigurableTask]) -> None:
    """The Spanish questions are framed in Spanish."""
    task = build("spade_headqa_es")
    assert task.fewshot_context(headqa_row([1, 2, 3], 3), 0) == (
        "Pregunta: Which?\nA. choice 0\nB. choice 1\nC. choice 2\nRespuesta:"
    )


def test_few_shot_prompt(build: Callable[..., ConfigurableTask]) -> None:
    """Examples come from the training split and end with their letter."""
    task = build("spade_headqa_en")
    task.set_fewshot_seed(0)
    shots = task.fewshot_context(headqa_row([1, 2], 1), 2).split("\n\n")
    choices = "".join(f"\n{letter}. choice {index}" for index, letter in enumerate("ABCDE"))
    assert sorted(shots[:2], key=len) == [
        f"Question: Which?{choices.removesuffix(chr(10) + 'E. choice 4')}\nAnswer: C",
        f"Question: Which?{choices}\nAnswer: E",
    ]
    assert shots[2] == "Question: Which?\nA. choice 0\nB. choice 1\nAnswer:"


def test_texts_are_scored_without_letters(manager: TaskManager) -> None:
    """The text variant has the prompt and the continuations of the stock arc_easy."""
    task = manager.load("spade_mini_science_text")["tasks"]["spade_mini_science_text"]
    for row in docs(task):
        assert task.fewshot_context(row, 0) == f"Question: {row['question']}\nAnswer:"
        continuations = [request.args[1] for request in task.construct_requests(row, "")]
        assert continuations == [f" {text}" for text in row["choices"]["text"]]


@pytest.mark.parametrize("name", ONE_TOKEN)
def test_every_answer_is_one_token(
    name: str, build: Callable[..., ConfigurableTask], tokenizer: PreTrainedTokenizerBase
) -> None:
    """An answer adds one token and leaves those of the prompt alone.

    Checked with and without examples before the question, and behind a chat template.
    """
    task = build(name)
    task.set_fewshot_seed(0)

    def chat(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    for row in docs(task):
        for chatting in (False, True):
            for shots in (0, 2):
                template = chat if chatting else None
                context = task.fewshot_context(
                    row, shots, apply_chat_template=chatting, chat_template=template
                )
                before = tokenizer.encode(context)
                for request in task.construct_requests(row, context, apply_chat_template=chatting):
                    after = tokenizer.encode("".join(request.args))
                    assert len(after) - len(before) == 1, request.args[1]
                    assert after[:-1] == before


# Choices by position


@pytest.mark.parametrize(
    ("labels", "answer", "letter"),
    [("ABC", "C", "C"), ("ABCDE", "E", "E"), ("1234", "2", "B"), ("123", "1", "A")],
)
def test_arc_labels_become_letters(labels: str, answer: str, letter: str) -> None:
    """Three to five choices, lettered or numbered."""
    letters = module("letters")
    row = arc_row(labels, answer)
    assert letters.arc_letters(row) == list("ABCDE"[: len(labels)])
    assert letters.arc_letters(row)[letters.arc_target(row)] == letter
    lines = letters.arc_prompt(row).splitlines()
    assert lines[1:-1] == [f"{x}. choice {index}" for index, x in enumerate("ABCDE"[: len(labels)])]


@pytest.mark.parametrize(
    ("aids", "answer", "letter"),
    [([1, 2, 3, 4], 4, "D"), ([0, 1, 2], 0, "A"), ([3, 4, 5, 6, 7], 7, "E"), ([7, 5], 5, "B")],
)
def test_headqa_aids_become_letters(aids: list[int], answer: int, letter: str) -> None:
    """`ra` names an aid, wherever the aids start and in whatever order they come."""
    letters = module("letters")
    row = headqa_row(aids, answer)
    assert letters.headqa_letters(row)[letters.headqa_target(row)] == letter


def test_blanks_around_texts_are_dropped() -> None:
    """No blank gets between a letter and its choice, or before a line break."""
    prompt = module("letters").prompt(" Which? ", [" one ", "two\n"])
    assert prompt == "Question: Which?\nA. one\nB. two\nAnswer:"


def test_bad_rows_are_refused() -> None:
    """A row without a valid answer, or with more choices than letters, is not scored quietly."""
    letters = module("letters")
    with pytest.raises(ValueError, match=r"answer 'F' must match exactly one .* matches 0"):
        letters.arc_target(arc_row("ABC", "F"))
    with pytest.raises(ValueError, match=r"answer 2 must match exactly one .* matches 2"):
        letters.headqa_target(headqa_row([1, 2, 2], 2))
    with pytest.raises(ValueError, match="6 choices, but only A to E"):
        letters.arc_prompt(arc_row("ABCDEF", "F"))


# Pages


def test_wikitext_page_becomes_text(build: Callable[..., ConfigurableTask]) -> None:
    """The text is detokenised, but words and bytes are counted on the page as it is."""
    page = ' = Title = \n \n A well @-@ known 1 @,@ 000 ( or so ) , it \'s " here " . \n'
    task = build("spade_wikitext103")
    (text,) = task.construct_requests({"page": page}, "").args
    assert text == ' = Title =\n\nA well-known 1,000 (or so), it\'s "here".\n'
    assert task.process_results({"page": page}, [-5.0]) == {
        "word_perplexity": (-5.0, len(page.split()) + 2),  # and the empty ends, as in the harness
        "byte_perplexity": (-5.0, len(page)),
        "bits_per_byte": (-5.0, len(page)),
    }


def test_articles_read_as_ordinary_text(manager: TaskManager) -> None:
    """Nothing of the notation of the WikiText files reaches the model."""
    task = manager.load("spade_mini_articles")["tasks"]["spade_mini_articles"]
    for row in docs(task):
        (text,) = task.construct_requests(row, "").args
        assert not any(mark in text for mark in (" @", "@ ", " ,", " .", "= ="))


# Real data


@pytest.mark.real_data
@pytest.mark.parametrize("name", sorted(PAPER))
def test_every_real_row_gives_a_prompt_and_a_target(
    name: str, build: Callable[..., ConfigurableTask]
) -> None:
    """All rows of all splits, the training documents included."""
    rows = real(*PAPER[name])
    task = build(name, real)
    assert len(task.training_docs()) == len(rows["train"])
    spanish = name == "spade_headqa_es"
    question, answer = ("Pregunta:", "Respuesta:") if spanish else ("Question:", "Answer:")
    for row in (row for split in rows.values() for row in split):
        prompt, letters = task.doc_to_text(row), task.doc_to_choice(row)
        gold = letters[task.doc_to_target(row)]
        assert prompt.endswith(f"\n{answer}")
        if name == "spade_boolq":
            assert prompt.startswith(row["passage"])
            assert gold == ("yes" if row["label"] else "no")
            continue
        texts = choice_texts(row)
        assert letters == list("ABCDE"[: len(texts)])
        assert prompt.startswith(f"{question} ")
        assert f"\n{gold}. {texts[row.get('answerKey', row.get('ra'))]}\n" in prompt


def choice_texts(row: dict[str, Any]) -> dict[Any, str]:
    """The choices of an ARC or HEAD-QA row by their own labels."""
    if "choices" in row:
        return dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True))
    return {choice["aid"]: choice["atext"] for choice in row["answers"]}


@pytest.mark.real_data
def test_wikitext_agrees_with_the_harness() -> None:
    """Same text and same counts as the stock wikitext, page for page."""
    from lm_eval.tasks.wikitext import preprocess_wikitext as stock

    ours = module("wikitext")
    pages = real("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1")
    for row in pages["validation"] + pages["test"]:
        assert ours.detokenize(row) == stock.wikitext_detokenizer(row)
        assert ours.perplexities(row, [-1.0]) == stock.process_results(row, [-1.0])
