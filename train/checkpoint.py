"""Checkpoints: safetensors, JSON and digests, written whole or not at all; nothing is unpickled.

    RUN/checkpoints/step-00001000/model.safetensors
                                  optimizer.safetensors    exp_avg, exp_avg_sq and step of every parameter
                                  state.json               step, loader, random states, digests of the files above

The folder is written under another name, flushed and renamed: a kill leaves the one before.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.errors import RunError
from pipeline.place import sync

FOLDER = "checkpoints"
STATE_NAME = "state.json"


def save(
    run: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int
) -> None:
    """Write RUN/checkpoints/step-N and delete all but the last `keep`. Raises RunError where the disk is full."""
    target = run / FOLDER / f"step-{step:08d}"
    temporary = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, temporary / "model.safetensors")
        save_file(_moments(model, optimizer), temporary / "optimizer.safetensors")
        digests = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
        document = {**state, "step": step, "random": _random_state(), "digests": digests}
        (temporary / STATE_NAME).write_text(json.dumps(document))
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        sync(target.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(
            "cannot write a checkpoint", where=target, found=error, remedy="make room, run again"
        ) from error
    for old in find(run)[:-keep]:
        shutil.rmtree(old)


def find(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((run / FOLDER).glob("step-*"))


def load_latest(run: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """Folder and state of the newest sound checkpoint; None where a run has none at all.

    `warn` hears of damaged ones passed over. Raises RunError where all are damaged.
    """
    found = find(run)
    for folder in reversed(found):
        what = damage(folder)
        if what is None:
            return folder, json.loads((folder / STATE_NAME).read_bytes())
        warn(f"checkpoint {folder} is damaged ({what}); trying the one before")
    if found:
        raise RunError("every checkpoint is damaged", where=run / FOLDER, remedy="start over: --force")
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        state = json.loads((folder / STATE_NAME).read_bytes())
        wrong = [name for name, digest in state["digests"].items() if _digest(folder / name) != digest]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return str(error)
    return f"{', '.join(wrong)} differs from its digest" if wrong else None


def load_model(folder: Path, model: nn.Module) -> None:
    """Read the weights into `model`."""
    model.load_state_dict(load_file(folder / "model.safetensors"))


def restore(folder: Path, state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Weights, moments and random states, bit for bit."""
    load_model(folder, model)
    moments = load_file(folder / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        kinds = ("exp_avg", "exp_avg_sq", "step")
        kept = {kind: moments[f"{kind}:{name}"] for kind in kinds if f"{kind}:{name}" in moments}
        device = parameter.device
        optimizer.state[parameter] = {
            k: v.to(device) if k != "step" or device.type != "cpu" else v for k, v in kept.items()
        }
    torch.set_rng_state(_decoded(state["random"]["cpu"]))
    if "cuda" in state["random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decoded(state["random"]["cuda"]))


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{kind}:{name}": value.contiguous()
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def _random_state() -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def _decoded(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
