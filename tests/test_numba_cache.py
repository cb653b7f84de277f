"""A kernel that calls a changed kernel is compiled again."""

import os
import subprocess
import sys

from pipeline.numba_cache import PACKAGES, drop_stale, is_cold, tell_if_cold

INNER = "from numba import njit\n@njit(cache=True)\ndef inner(x):\n    return x + {}\n"
OUTER = "from numba import njit\nfrom inner import inner\n@njit(cache=True)\ndef outer(x):\n    return inner(x)\n"
RUN = "import sys\nfrom pathlib import Path\n{}from outer import outer\nprint(outer(1))\n"
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


def test_a_first_use_says_on_a_terminal_that_it_compiles(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    (tmp_path / "__pycache__").mkdir()
    assert is_cold(tmp_path)
    (tmp_path / "__pycache__" / "dealer.nbi").touch()
    assert not is_cold(tmp_path)
    monkeypatch.setattr("pipeline.numba_cache.is_cold", lambda: True)
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        tell_if_cold()
        assert ("compiling" in capsys.readouterr().err) == terminal
