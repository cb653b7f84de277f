"""What `pip install` gets: every module of the three packages, their types, both commands, and nothing else."""

import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "curriculum", "train")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    from hatchling.builders.wheel import WheelBuilder

    folder = tmp_path_factory.mktemp("wheel")
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    return zipfile.ZipFile(path)


def test_it_holds_the_packages_and_that_they_are_typed(wheel):
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert held == modules | {f"{package}/py.typed" for package in PACKAGES}


def test_both_commands_are_entry_points_that_exist(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    lines = [line for line in wheel.read(name).decode().splitlines() if "=" in line]
    assert {line.split(" = ")[0] for line in lines} == {"slw-prep", "slw-train"}
    for line in lines:
        module, function = line.split(" = ")[1].split(":")
        assert f"def {function}(" in wheel.read(module.replace(".", "/") + ".py").decode()
