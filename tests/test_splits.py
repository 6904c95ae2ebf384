"""Parts of a split: what their names mean, and that they keep documents apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_documents import LETTERS, write_task

from spade_eval.errors import UserError
from spade_eval.fit.documents import load_tasks
from spade_eval.fit.rows import rows_of
from spade_eval.splits import NAMES, Split

if TYPE_CHECKING:
    from pathlib import Path

ENDS = st.none() | st.integers(0, 12)
PARTS = st.tuples(st.sampled_from(NAMES), ENDS, ENDS).filter(
    lambda part: part[2] is None or part[2] > (part[1] or 0)
)


def written(name: str, start: int | None, stop: int | None) -> str:
    return f"{name}[{'' if start is None else start}:{'' if stop is None else stop}]"


@given(PARTS, PARTS)
def test_parts_overlap_where_their_rows_do(one: tuple, other: tuple) -> None:
    rows = [{(name, i) for i in range(40)[start:stop]} for name, start, stop in (one, other)]
    splits = [Split.parse(written(*part)) for part in (one, other)]
    assert splits[0].overlaps(splits[1]) == splits[1].overlaps(splits[0]) == bool(rows[0] & rows[1])


def test_a_name_alone_is_all_of_it() -> None:
    assert Split.parse("test") == Split.parse("test[:]") == Split.parse("test[0:]")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dev", r"split='dev' is not known; valid: train, validation, test, or a part"),
        ("", "is not known"),
        ("test[5]", r"split='test\[5\]' is not known"),
        ("test[-5:]", "is not known"),
        ("test[:10%]", "is not known"),
        ("test[7:7]", r"has no rows: write \[FROM:TO\] with TO above FROM"),
        ("test[:0]", "has no rows"),
    ],
)
def test_other_forms_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Split.parse(text)


def test_rows_of_a_part(tmp_path: Path) -> None:
    rows = [{"q": f"q{n}", "gold": 0} for n in range(7)]
    write_task(tmp_path, "seven", {"validation": rows}, output_type="multiple_choice", **LETTERS)
    task = load_tasks(["seven"], tmp_path)["seven"]

    def questions(split: str) -> list[str]:
        return [row["q"] for row in rows_of("seven", task, split)]

    assert questions("validation[:3]") + questions("validation[3:]") == questions("validation")
    assert questions("validation[2:4]") == ["q2", "q3"]
    assert questions("validation[5:99]") == ["q5", "q6"]
    with pytest.raises(UserError, match=r"'validation\[7:\]' has no rows: task seven has 7"):
        questions("validation[7:]")
    with pytest.raises(UserError, match=r"task seven has no test split; it has: validation\."):
        questions("test[:2]")
