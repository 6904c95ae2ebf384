"""Checks of the small data sets in `tasks/data`: schemas, counts, balance and duplicates."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).resolve().parent.parent / "tasks" / "data"
SPLITS = ("train", "validation", "test")
COUNTS = {
    "science": (80, 28, 64),
    "yesno": (34, 14, 26),
    "health": (44, 20, 48),
    "articles": (9, 5, 9),
}
CATEGORIES = {"biology", "chemistry", "medicine", "nursing", "nutrition", "psychology"}
LETTERS = ["A", "B", "C", "D"]
EACH_SPLIT = pytest.mark.parametrize("split", SPLITS)


def rows(name: str, split: str) -> list[dict[str, Any]]:
    """Read one file, line by line."""
    lines = (DATA / f"{name}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def all_rows(name: str) -> list[dict[str, Any]]:
    """Read the files of all splits."""
    return [row for split in SPLITS for row in rows(name, split)]


def normalized(text: str) -> str:
    """Lower-case a text and reduce it to its words."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def duplicates(texts: list[str]) -> list[str]:
    """List the texts that occur more than once after normalization."""
    return [text for text, count in Counter(map(normalized, texts)).items() if count > 1]


def four_choice(name: str, split: str) -> list[tuple[str, list[str], int]]:
    """Give the question, the choices and the position of the right one for each row."""
    if name == "science":
        return [
            (row["question"], row["choices"]["text"], LETTERS.index(row["answerKey"]))
            for row in rows(name, split)
        ]
    return [
        (row["qtext"], [answer["atext"] for answer in row["answers"]], row["ra"] - 1)
        for row in rows(name, split)
    ]


def clean(*texts: Any) -> bool:
    """Tell whether all values are non-empty strings without stray white space."""
    return all(isinstance(text, str) and text and text == " ".join(text.split()) for text in texts)


@pytest.mark.parametrize("name", COUNTS)
@EACH_SPLIT
def test_files(name: str, split: str) -> None:
    """Every file is UTF-8 with LF line ends, has no empty line and the promised row count."""
    raw = (DATA / f"{name}.{split}.jsonl").read_bytes()
    assert b"\r" not in raw
    assert raw.endswith(b"}\n")
    assert all(raw.decode("utf-8").split("\n")[:-1])
    assert len(rows(name, split)) == COUNTS[name][SPLITS.index(split)]


def test_no_other_files() -> None:
    """The folder holds the README and the listed files only."""
    expected = {f"{name}.{split}.jsonl" for name in COUNTS for split in SPLITS} | {"README.md"}
    assert {path.name for path in DATA.iterdir()} == expected


def test_readme_counts() -> None:
    """The table in the README gives the counts of the files."""
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(\w+)` .*\| +(\d+) \| +(\d+) \| +(\d+) \|$", readme, re.MULTILINE)
    assert {name: tuple(map(int, counts)) for name, *counts in table} == COUNTS


@EACH_SPLIT
def test_science_schema(split: str) -> None:
    """Science rows have the columns of ARC."""
    for row in rows("science", split):
        assert list(row) == ["id", "question", "choices", "answerKey"]
        assert list(row["choices"]) == ["text", "label"]
        assert row["choices"]["label"] == LETTERS
        assert row["answerKey"] in LETTERS
        assert clean(row["id"], row["question"], *row["choices"]["text"])


@EACH_SPLIT
def test_yesno_schema(split: str) -> None:
    """Yes/no rows have the columns of BoolQ, and their passages have 3 to 6 sentences."""
    data = rows("yesno", split)
    assert [row["idx"] for row in data] == list(range(len(data)))
    for row in data:
        assert list(row) == ["question", "passage", "idx", "label"]
        assert clean(row["question"], row["passage"])
        assert row["question"] == row["question"].lower()
        assert "?" not in row["question"]
        assert type(row["label"]) is int and row["label"] in (0, 1)
        assert 3 <= len(re.findall(r"[.!?](?:\s|$)", row["passage"])) <= 6


@EACH_SPLIT
def test_health_schema(split: str) -> None:
    """Health rows have the columns of HeadQA."""
    for row in rows("health", split):
        assert list(row) == ["name", "year", "category", "qid", "qtext", "ra", "answers"]
        assert row["category"] in CATEGORIES
        assert type(row["qid"]) is int
        assert type(row["ra"]) is int and row["ra"] in (1, 2, 3, 4)
        assert [list(answer) for answer in row["answers"]] == [["aid", "atext"]] * 4
        assert [answer["aid"] for answer in row["answers"]] == [1, 2, 3, 4]
        assert clean(row["name"], row["year"], row["qtext"])
        assert clean(*(answer["atext"] for answer in row["answers"]))


@EACH_SPLIT
def test_articles_schema(split: str) -> None:
    """Articles have a title line, several paragraphs and 250 to 450 words."""
    for row in rows("articles", split):
        assert list(row) == ["page"]
        title, *lines = row["page"].split("\n")
        assert re.fullmatch(r" = [^=]+ = ", title)
        texts = [line for line in lines if line.strip() and not line.startswith(" = ")]
        assert len(texts) >= 4
        assert 250 <= len(normalized(" ".join(texts)).split()) <= 450


def test_unique_ids() -> None:
    """Identifiers are unique over all splits."""
    assert not duplicates([row["id"] for row in all_rows("science")])
    assert not duplicates([str(row["qid"]) for row in all_rows("health")])


@pytest.mark.parametrize(
    ("name", "column"), [("science", "question"), ("yesno", "question"), ("health", "qtext")]
)
def test_no_duplicate_questions(name: str, column: str) -> None:
    """No question occurs twice within or across splits, whatever its case and punctuation."""
    assert not duplicates([row[column] for row in all_rows(name)])


def test_no_duplicate_articles() -> None:
    """No title and no paragraph of an article occurs twice."""
    pages = [row["page"] for row in all_rows("articles")]
    assert not duplicates([page.split("\n")[0] for page in pages])
    paragraphs = [line for page in pages for line in page.split("\n") if line.endswith(" . ")]
    assert paragraphs and not duplicates(paragraphs)


@pytest.mark.parametrize("name", ["science", "health"])
@EACH_SPLIT
def test_choices_distinct(name: str, split: str) -> None:
    """The four choices of a question differ in more than case and white space."""
    for question, choices, _ in four_choice(name, split):
        assert len({choice.lower() for choice in choices}) == 4, question


@pytest.mark.parametrize("name", ["science", "health"])
@EACH_SPLIT
def test_positions_balanced(name: str, split: str) -> None:
    """Each position holds the right answer equally often, give or take one."""
    data = four_choice(name, split)
    counts = Counter(right for *_, right in data)
    assert all(abs(counts[position] - len(data) / 4) <= 1 for position in range(4))


@EACH_SPLIT
def test_yesno_balanced(split: str) -> None:
    """Yes and no are equally frequent, give or take one."""
    data = rows("yesno", split)
    assert abs(sum(row["label"] for row in data) - len(data) / 2) <= 1


@pytest.mark.parametrize("name", ["science", "health"])
@EACH_SPLIT
def test_length_does_not_reveal_the_answer(name: str, split: str) -> None:
    """The right answer is seldom strictly the longest or strictly the shortest choice."""
    data = four_choice(name, split)
    longest = shortest = 0
    for _, choices, right in data:
        lengths = [len(choice) for choice in choices]
        mine = lengths.pop(right)
        longest += mine > max(lengths)
        shortest += mine < min(lengths)
    assert longest / len(data) < 0.4
    assert shortest / len(data) < 0.4


def test_passages_stay_in_one_split() -> None:
    """A passage serves at most two questions, and all of them are in the same split."""
    per_split = [[normalized(row["passage"]) for row in rows("yesno", split)] for split in SPLITS]
    used = Counter(passage for passages in per_split for passage in passages)
    assert max(used.values()) <= 2
    assert sum(len(set(passages)) for passages in per_split) == len(used)
