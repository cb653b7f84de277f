"""A kernel that calls a changed kernel is compiled again; whoever waits for one is told."""

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
from click.testing import CliRunner
from runs import as_toml, settings_of

from pipeline.cli import main as prep
from pipeline.numba_cache import PACKAGES, drop_stale
from train.cli import main as train

INNER = "from numba import njit\n@njit(cache=True)\ndef inner(x):\n    return x + {}\n"
OUTER = "from numba import njit\nfrom inner import inner\n@njit(cache=True)\ndef outer(x):\n    return inner(x)\n"
RUN = "import sys\nfrom pathlib import Path\n{}from outer import outer\nprint(outer(1))\n"
TELL = """
from outer import outer
from pipeline.numba_cache import compiling_told
with compiling_told(lambda text: print(end="1")):
    print(outer(0))
"""
DROP = "from pipeline.numba_cache import drop_stale\ndrop_stale([Path.cwd()])\n"


def run(folder, text):
    path = os.pathsep.join([str(PACKAGES[0].parent), str(folder)])
    command = [sys.executable, "-c", text]
    environment = {**os.environ, "PYTHONPATH": path}
    return int(subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True).stdout)


def test_a_kernel_is_compiled_again_when_one_that_it_calls_changed(tmp_path):
    (tmp_path / "outer.py").write_text(OUTER)
    (tmp_path / "inner.py").write_text(INNER.format(1))
    assert run(tmp_path, RUN.format(DROP)) == 2
    compiled = {file: file.stat().st_mtime_ns for file in (tmp_path / "__pycache__").glob("*.nbi")}
    assert len(compiled) == 2
    (tmp_path / "inner.py").write_text(INNER.format(10))
    assert run(tmp_path, RUN.format("")) == 2, "numba sees it by itself now: pipeline/numba_cache.py can go"
    assert run(tmp_path, RUN.format(DROP)) == 11
    again = {file: file.stat().st_mtime_ns for file in compiled}
    drop_stale([tmp_path])
    assert again == {file: file.stat().st_mtime_ns for file in compiled}


def test_who_waits_for_a_compiler_is_told_once_and_who_need_not_wait_is_not(tmp_path):
    (tmp_path / "outer.py").write_text(OUTER)
    (tmp_path / "inner.py").write_text(INNER.format(2))
    assert run(tmp_path, TELL) == 12
    assert run(tmp_path, TELL) == 2


@pytest.mark.parametrize(
    "command", ["pack no --seqlen 8", "trace no --step 1", "plan run.toml", "run run.toml", "tune run.toml"]
)
def test_every_command_with_kernels_tells(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(as_toml(settings_of(tmp_path / "no", tmp_path / "run")))
    begun = []
    monkeypatch.setattr("pipeline.numba_cache.compiling_told", lambda tell: nullcontext(begun.append(tell)))
    result = CliRunner().invoke(prep if command.startswith("pack") else train, command.split())
    assert result.exit_code in (1, 2) and "error" in result.stderr
    assert len(begun) == 1
