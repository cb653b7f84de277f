"""One run at a time in a run folder, whatever became of the one before."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest
from runs import config_of, tiny_store

from pipeline.errors import RunError
from train import loop
from train.folder import CONFIG_NAME, LOCK_NAME, locked, write_config

HOLD = """
import sys
from pathlib import Path
from train.folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path/run."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_by_process_and_host_until_the_first_is_killed(holder, tmp_path):
    folder = tmp_path / "run"
    config = config_of(tiny_store(tmp_path / "store"), folder)
    write_config(folder, config)
    for force in (False, True):
        with pytest.raises(RunError, match=rf"at work[\s\S]*process {holder.pid} on {socket.gethostname()}"):
            loop.run(config, force=force, warn=print)
    assert {path.name for path in folder.iterdir()} == {LOCK_NAME, CONFIG_NAME}  # --force deleted nothing
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with locked(folder), pytest.raises(RunError, match=f"process {os.getpid()} "), locked(folder):
        pass
    with locked(folder):
        pass


def test_what_a_run_killed_at_once_leaves_is_no_foreign_folder(tmp_path):
    folder = tmp_path / "run"
    with locked(folder):
        (folder / f".{CONFIG_NAME}.00ff.partial").write_text("{")
    outcome = loop.run(config_of(tiny_store(tmp_path / "store"), folder), warn=lambda text: None)
    assert outcome.finished
    assert not list(folder.glob(".*.partial"))


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write here"), locked(tmp_path / "file"):
        pass


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def unsupported(handle, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(RunError, match=r"has no locks[\s\S]*-o flock"), locked(tmp_path / "run"):
        pass
