"""A folder made beside its place: whole or not at all, whatever interrupts it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import StoreError
from pipeline.staging import new_folder

KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.staging import new_folder
with new_folder(Path(sys.argv[1]), marker="done") as folder:
    (folder / "half").mkdir()
    (folder / "half" / "data").write_text("old")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def fill(out, text, **more):
    with new_folder(out, marker="done", **more) as folder:
        assert list(folder.iterdir()) == []
        (folder / "done").write_text(text)
        assert not (out / "done").exists() or (out / "done").read_text() != text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_command_left_is_cleared_by_the_next(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert names(tmp_path) == [".out.partial"]
    fill(tmp_path / "out", "new")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["done"]


def test_two_commands_do_not_write_the_same_folder(tmp_path):
    with new_folder(tmp_path / "out", marker="done") as folder:
        (folder / "done").write_text("first")
        with pytest.raises(StoreError, match="another command"):
            fill(tmp_path / "out", "second")
        assert (folder / "done").exists()
    assert (tmp_path / "out" / "done").read_text() == "first"


def test_an_error_leaves_what_was_there(tmp_path):
    fill(tmp_path / "out", "first")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out", marker="done", force=True) as folder:
        (folder / "done").write_text("second")
        raise RuntimeError
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "done").read_text() == "first"


def test_replacing_is_asked_for_and_spares_what_is_something_else(tmp_path):
    fill(tmp_path / "out", "first")
    with pytest.raises(StoreError, match="--force"):
        fill(tmp_path / "out", "second")
    (tmp_path / ".out.old").mkdir()  # of a command killed while it replaced
    fill(tmp_path / "out", "third", force=True)
    assert (tmp_path / "out" / "done").read_text() == "third"
    assert names(tmp_path) == ["out"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="something else"):
        fill(tmp_path / "file", "fourth", force=True)
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "empty", "fifth")


def test_what_a_link_leads_to_is_replaced_and_the_link_stays(tmp_path):
    fill(tmp_path / "disk" / "out", "first")
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    for text in ("second", "third"):
        fill(tmp_path / "out", text, force=True)
        assert (tmp_path / "disk" / "out" / "done").read_text() == text
    assert (tmp_path / "out").is_symlink()
    assert names(tmp_path) == ["disk", "out"] and names(tmp_path / "disk") == ["out"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_place_is_an_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="cannot write here"):
        fill(tmp_path / "out", "x")


def test_a_place_that_cannot_be_is_an_error():
    with pytest.raises(StoreError, match="cannot write here"):
        fill(Path("/proc/nowhere/out"), "x")
