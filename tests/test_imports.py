"""Imports run one way, train -> curriculum -> pipeline, and only the trainer knows torch."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {"pipeline": {"curriculum", "train", "torch"}, "curriculum": {"train", "torch"}, "train": set()}


def imported(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_import_runs_back(package):
    files = list((ROOT / package).rglob("*.py"))
    assert len(files) > 1
    for file in files:
        assert not set(imported(file.read_text())) & FORBIDDEN[package], file


def test_a_forbidden_import_would_be_seen():
    assert set(imported("import a.b\ndef f():\n    from train.loop import run")) == {"a", "train"}
