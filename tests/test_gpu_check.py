"""What a machine with a GPU runs, at tiny sizes on the CPU; and the bench alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable}


def test_every_check_of_the_gpu_runs_on_the_cpu_and_passes():
    done = subprocess.run(
        [ROOT / "scripts/gpu_check.sh", "--cpu"], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    results = [json.loads(line) for line in lines if line.startswith("{")]
    assert {result["check"] for result in results} == {"parity", "bench", "modes", "resume", "short", "large"}
    passed = [result for result in results if result["ok"]]
    assert {result["check"] for result in passed} == {"parity", "bench", "modes", "resume", "short"}
    assert {r["case"] for r in passed if r["check"] == "modes"} == {
        "constant",
        "slw",
        "truncation",
        "skyladder",
        "buckets",
    }
    table = lines[-len(results) :]
    assert all(result["case"] in line for result, line in zip(results, table, strict=True))
    (beside,) = [r for r in results if r["case"] == "tiny L=32"]
    assert beside["ratio"] == pytest.approx(beside["tokens_per_s"] / beside["nanogpt_tokens_per_s"], abs=1e-2)


def test_a_check_that_fails_or_has_no_time_is_told(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import gpu_check

    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--cpu", "--only", "parity", "--seconds", "0"])
    assert gpu_check.main() == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["note"] == "no time left"
    monkeypatch.setattr(gpu_check, "in_own_process", lambda *_: iter([{"check": "a", "case": "b", "ok": False}]))
    assert gpu_check.main() == 1
    assert "NO" in capsys.readouterr().out
