"""Imports run one way: down the list of rooms in the README."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import spade_eval

PACKAGE = Path(spade_eval.__file__).parent
README = PACKAGE.parent / "README.md"

pytestmark = pytest.mark.skipif(not README.exists(), reason="the README is not installed")


def rooms() -> list[str]:
    """The modules and folders in the order of the README."""
    [text] = re.findall(r"imports run downwards: (.+?)\.\n\n", README.read_text(), flags=re.DOTALL)
    return [name.rstrip("/") for name in re.findall(r"`(\w+/?)`", text)]


def imported(path: Path) -> set[str]:
    """The rooms that a module takes something from, not for its annotations alone."""
    tree = ast.parse(path.read_text())
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    own = [name.split(".")[1] for name in names if name.startswith("spade_eval.")]
    return {name for name in own if not name.startswith("_")}


def test_every_module_is_named_once_and_imports_run_downwards() -> None:
    order = rooms()
    every = {
        path.relative_to(PACKAGE).with_suffix("").parts[0]
        for path in PACKAGE.rglob("*.py")
        if not path.stem.startswith("__") or path.parent != PACKAGE
    }
    assert sorted(order) == sorted(every - {"tasks"})
    upwards = [
        f"{path.relative_to(PACKAGE)} imports {taken}"
        for path in PACKAGE.rglob("*.py")
        if (room := path.relative_to(PACKAGE).with_suffix("").parts[0]) in every
        for taken in imported(path) - {room}
        if order.index(taken) < order.index(room)
    ]
    assert not upwards
