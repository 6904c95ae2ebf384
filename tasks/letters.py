"""Lettered multiple choice: the prompt, the letters and the right answer of ARC and HEAD-QA rows.

A row becomes a question, one line per choice and a closing "Answer:", and the model is asked for
one letter, which is one token::

    Question: {question}
    A. {first choice}
    B. {second choice}
    ...
    Answer:

Letters are given by position. The labels of a row ("A".."E" or "1".."4" in ARC, `aid` in HEAD-QA)
only say which position is right and are never shown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LETTERS = "ABCDE"  # no row of ARC or HEAD-QA has more than five choices


def prompt(
    question: str,
    choices: Sequence[str],
    question_word: str = "Question:",
    answer_word: str = "Answer:",
) -> str:
    """Lay out one question.

    Args:
        question: The question.
        choices: The text of each choice, at most five.
        question_word: What the first line starts with.
        answer_word: The last line. Nothing follows it: the harness adds " " and the letter.

    Returns:
        The prompt, without a blank or a line break at its end.
    """
    lines = [
        f"{letter}. {choice.strip()}"
        for letter, choice in zip(letters(choices), choices, strict=True)
    ]
    return "\n".join([f"{question_word} {question.strip()}", *lines, answer_word])


def letters(choices: Sequence[object]) -> list[str]:
    """Give one letter to each choice.

    Args:
        choices: The choices; only their number counts.

    Returns:
        "A", "B", ... in the order of the choices.

    Raises:
        ValueError: There are more choices than letters.
    """
    if len(choices) > len(LETTERS):
        raise ValueError(
            f"a row has {len(choices)} choices, but only {LETTERS[0]} to {LETTERS[-1]} are in use; "
            "extend LETTERS after checking that each new letter is one token"
        )
    return list(LETTERS[: len(choices)])


def position(answer: object, labels: Sequence[object]) -> int:
    """Find the right choice.

    Args:
        answer: The label of the right choice.
        labels: The labels of all choices; they need be neither letters nor numbers from 1.

    Returns:
        The position of the right choice, counted from 0.

    Raises:
        ValueError: No choice, or more than one, carries the label.
    """
    found = [index for index, label in enumerate(labels) if str(label) == str(answer)]
    if len(found) != 1:
        raise ValueError(
            f"the answer {answer!r} must match exactly one of the labels {list(labels)}, "
            f"but it matches {len(found)}"
        )
    return found[0]


def arc_prompt(doc: Mapping[str, Any]) -> str:
    """Prompt of an ARC row."""
    return prompt(doc["question"], doc["choices"]["text"])


def arc_letters(doc: Mapping[str, Any]) -> list[str]:
    """Letters of an ARC row."""
    return letters(doc["choices"]["text"])


def arc_target(doc: Mapping[str, Any]) -> int:
    """Position of the right choice of an ARC row."""
    return position(doc["answerKey"], doc["choices"]["label"])


def headqa_prompt(doc: Mapping[str, Any]) -> str:
    """Prompt of an English HEAD-QA row."""
    return prompt(doc["qtext"], _headqa_texts(doc))


def headqa_prompt_es(doc: Mapping[str, Any]) -> str:
    """Prompt of a Spanish HEAD-QA row."""
    return prompt(doc["qtext"], _headqa_texts(doc), "Pregunta:", "Respuesta:")


def headqa_letters(doc: Mapping[str, Any]) -> list[str]:
    """Letters of a HEAD-QA row."""
    return letters(doc["answers"])


def headqa_target(doc: Mapping[str, Any]) -> int:
    """Position of the right choice of a HEAD-QA row: `ra` is the `aid` of an answer."""
    return position(doc["ra"], [answer["aid"] for answer in doc["answers"]])


def _headqa_texts(doc: Mapping[str, Any]) -> list[str]:
    return [answer["atext"] for answer in doc["answers"]]
