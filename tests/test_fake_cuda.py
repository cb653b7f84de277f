"""The trainer on a GPU that is not there (fake_cuda.py): whole steps, without a value and without waiting for one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
LIBRARIES = Path(torch.__file__).parent / "lib"
pytestmark = pytest.mark.skipif(
    not shutil.which("g++") or torch.cuda.is_available(), reason="no compiler, or a GPU that is there"
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Case -> what came of it."""
    folder = tmp_path_factory.mktemp("fake")
    library, include = folder / "fake_cuda.so", Path(torch.__file__).parent / "include"
    source = ["-shared", "-fPIC", "-std=c++20", f"-I{include}", str(HERE / "fake_cuda.cpp"), "-o", str(library)]
    subprocess.run(["g++", *source, f"-L{LIBRARIES}", "-lc10", "-ltorch_cpu"], check=True)
    command = [sys.executable, str(HERE / "fake_cuda.py"), str(library), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["case"]: line["result"] for line in lines}


@pytest.mark.parametrize(
    ("case", "flat"),
    [
        ("document", True),
        ("causal", False),
        ("rope", True),
        ("skyladder", True),
        ("float32", False),
        ("recomputed", True),
        ("parts", True),
        ("skip", True),
        ("adagc", True),
        ("logits", True),
    ],
)
def test_a_step_on_cuda_waits_for_nothing_and_a_fetch_for_one_copy(results, case, flat):
    found = results[f"step {case}"]
    assert found["waits"] == []
    assert [wait.split(" [")[0] for wait in found["fetch"]] == ["cuda to cpu", "values"]
    kernels = {"torch_attn::_varlen_attn", "torch_attn::_varlen_attn_backward"} if flat else set()
    assert set(found["operations"]) == {"aten::_fused_adamw_", *kernels}


def test_a_step_that_waits_is_seen(results):
    assert results["step waits"]["waits"] == ["cuda to cpu []"] * 3


def test_a_batch_is_held_before_its_micro_batches_are_handed_out(results):
    assert results["step parts"]["held"] == [True] * 9


def test_a_ramp_compiled_on_cuda_makes_few_graphs_and_none_after_the_warm_up(results):
    for case, least in (("compiled", 20), ("compiled, recomputed", 10)):  # the steps of the ramp
        assert results[case]["step"] > least
        assert 0 < results[case]["graphs"] <= 12
        assert results[case]["recompiles"] == 0


def test_runs_on_cuda_go_on_from_a_checkpoint_and_past_a_step_that_is_not_finite(results):
    for case, unlearnt in (("run skip", [[24, 24]]), ("run rollback", [[14, 24]])):
        assert results[case]["finished"]
        assert results[case]["unlearnt"] == unlearnt
        assert results[case]["told"][0].startswith("going on after step 14")


def test_a_lone_gpu_has_a_number(results):
    assert results["device"] == "cuda:0"
