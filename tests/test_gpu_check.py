"""What a machine with a GPU runs, at tiny sizes on the CPU; and the bench alone."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable}


def test_every_check_of_the_gpu_runs_on_the_cpu_and_passes():
    done = subprocess.run(
        [ROOT / "scripts/gpu_check.sh", "--cpu", "--seconds", "3000"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    results = [json.loads(line) for line in lines if line.startswith("{")]
    assert {result["check"] for result in results} == {
        "machine",
        "parity",
        "bench",
        "modes",
        "resume",
        "short",
        "large",
    }
    passed = [result for result in results if result["ok"]]
    assert {result["check"] for result in passed} == {"machine", "parity", "bench", "modes", "resume", "short"}
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


def first(cpu):
    yield {"case": "first", "ok": True}


def breaks(cpu):
    yield from first(cpu)
    raise ValueError("of no use")


def dies(cpu):
    yield from first(cpu)
    os.kill(os.getpid(), signal.SIGKILL)


def sleeps(cpu):
    yield from first(cpu)
    subprocess.run(["sleep", "600"], check=True)


@pytest.fixture
def checks(monkeypatch):
    """gpu_check, with checks of so many seconds that stand in for its own."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import gpu_check

    def stands_in(**seconds):
        known = {"sleeps": sleeps, "breaks": breaks, "dies": dies, "works": first}
        monkeypatch.setattr(gpu_check, "SECONDS", seconds)
        monkeypatch.setattr(gpu_check, "CHECKS", {name: known[name] for name in seconds})
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--cpu"])
        return gpu_check

    return stands_in


def test_a_check_that_breaks_off_dies_or_takes_too_long_leaves_its_results_and_the_other_checks(checks, capfd):
    gpu_check = checks(sleeps=6, breaks=300, dies=300, works=300)
    assert gpu_check.main() == 1
    output = capfd.readouterr().out
    found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    told = [(result["check"], result["case"], result["ok"], result.get("note", "")) for result in found]
    assert [name for name, *_ in told if name != "sleeps"] == ["breaks", "breaks", "dies", "dies", "works"]
    (cut,) = [result for result in told if result[0] == "sleeps" and not result[1]]
    assert cut[2] is None and "were over" in cut[3]
    assert told[-5:-3] == [("breaks", "first", True, ""), ("breaks", "broke off", False, "ValueError: of no use")]
    assert told[-3:-1] == [("dies", "first", True, ""), ("dies", "", False, "exit -9")]
    assert told[-1] == ("works", "first", True, "")
    assert [line.split()[0] for line in output.splitlines()[-len(told) :]] == [name for name, *_ in told]


def test_without_time_that_is_told_and_no_failure(checks, monkeypatch, capsys):
    gpu_check = checks(sleeps=8, works=300)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--seconds", "0"])
    assert gpu_check.main() == 0
    assert capsys.readouterr().out.count("no time left") == 4
