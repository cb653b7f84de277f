"""A failure or a kill -9 at the n-th thing asked of the disk, for n = 1, 2, 3, ...: the same command goes on.

What it ends in is to the last bit what an undisturbed run ends in. tests/disk.py does it in processes of its own.
"""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from ranks import program
from runs import as_toml, config_of, settings_of, tiny_store

from train import checkpoint, loop
from train.metrics import read_metrics

DISK = Path(__file__).with_name("disk.py")
SMALL = {
    "model__layers": 1,
    "model__width": 8,
    "batch__global_batch_sequences": 6,
    "run__epochs": None,
    "run__total_tokens": 480,
    "run__checkpoint_every_steps": 4,
    "run__keep_checkpoints": 1,
    "run__validate_every_steps": 4,
    "run__validation_tokens": 50,
}
TIMES = ("elapsed_s", "tokens_per_s")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    """An undisturbed run: two checkpoints, the second of which replaces the first."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert loop.run(config_of(store, folder, **SMALL), warn=print).step == 8
    return ends_in(folder)


def ends_in(folder):
    newest = checkpoint.find(folder)[-1]
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(folder)]
    return newest.name, checkpoint.read_model(newest), checkpoint.read_optimizer(newest), lines


def assert_same(one, other):
    assert (one[0], one[3]) == (other[0], other[3])
    for left, right in zip(one[1:3], other[1:3], strict=True):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(("fault", "every"), [("kill", 1), ("full", 5), ("once", 5)])
def test_any_operation_on_the_disk_may_be_the_last_or_fail(store, whole, tmp_path, fault, every):
    (tmp_path / "run.toml").write_text(as_toml(settings_of(store, tmp_path / "unused", **SMALL)))
    done = program(DISK.read_text(), "run.toml", fault, every, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    *disturbed, last = cases
    assert last["status"] == 9  # came through: it asked for less than n things
    statuses = Counter(case["status"] for case in disturbed)
    assert set(statuses) <= ({-9} if fault == "kill" else {7, 0}), done.stderr
    assert statuses[-9 if fault == "kill" else 7] > 40 // every
    assert {case["checkpoints"] for case in disturbed} == {0, 1, 2}  # two where the older is not deleted yet
    for case in cases:
        assert case["again"] == 0, (case, done.stderr)
        assert not any(case["damage"]), case  # nothing half-written under the name of a checkpoint
        assert_same(ends_in(tmp_path / f"{case['n']:05d}"), whole)
        assert not [*(tmp_path / f"{case['n']:05d}").rglob("*.partial")]
