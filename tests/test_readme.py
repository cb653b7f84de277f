"""The README is true: its commands and options exist, its code runs, its tree is the tree."""

import re
from pathlib import Path

import pytest
from runs import tiny_store

from pipeline.cli import main as prep
from train.cli import main as train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TREE = (ROOT / "docs/tree.md").read_text()
PACKAGES = ["pipeline", "curriculum", "train", "scripts"]


def test_every_command_line_in_the_readme_and_the_demo_exists():
    lines = re.findall(r"(slw-prep|slw-train) (\w+)([^\n|`]*)", README + (ROOT / "scripts/demo").read_text())
    assert len(lines) > 15
    for script, command, rest in lines:
        known = {"slw-prep": prep, "slw-train": train}[script].commands[command]
        options = {option for parameter in known.params for option in parameter.opts}
        assert set(re.findall(r"--[\w-]+", rest)) <= options, (script, command, rest)


def test_every_command_is_in_the_readme():
    for script, group in (("slw-prep", prep), ("slw-train", train)):
        assert all(f"`{script} {command} " in README for command in group.commands)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_tree_names_every_file_and_no_other_and_the_readme_those_to_begin_with(package):
    files = {path.name for path in (ROOT / package).glob("*.py")} - {"__init__.py"}
    assert named(TREE, package) == files
    assert named(README, package) <= files


def named(text, package):
    tree = re.search(rf"^    {package}/ (.*?)(?=^    \w+/|^\n|\Z)", text, re.M | re.S).group(1)
    return set(re.findall(r"\b\w+\.py\b", tree))


def test_the_python_example_serves_every_token(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    (tmp_path / "shards").mkdir()
    tiny_store(tmp_path / "shards" / "books")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code.replace("512", "4").replace("60_000", "6").replace("1024", "64"), names)
    assert names["state"]["step"] == names["loader"].schedule.total_steps
