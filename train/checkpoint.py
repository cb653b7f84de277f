"""Checkpoints on disk: safetensors, JSON and digests, whole or not there; nothing is ever unpickled.

    RUN/checkpoints/step-00001000/model.safetensors       weights by name
                                  optimizer.safetensors   KIND:NAME, the kinds being exp_avg, exp_avg_sq and step
                                  state.json              where the run is: docs/checkpoints.md
                                  digests.json            XXH3 (128 bits, hex) of the three files above; written last
    RUN/checkpoints/LATEST        the newest folder, for other programs; to us a sign that there were folders

A folder is written under a hidden name, flushed and renamed; one that goes is renamed before it is deleted. So a
folder called step-* is whole whenever the process is killed, unless the disk damages it: then its digests tell.
Price: a byte is read once and written once. Tensors come in and go out as plain mappings from name to tensor.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import RunError, StoreError
from pipeline.place import sync
from pipeline.writer import write_bytes

FOLDER = "checkpoints"
LATEST_NAME = "LATEST"
MODEL_NAME, OPTIMIZER_NAME = "model.safetensors", "optimizer.safetensors"
STATE_NAME, DIGESTS_NAME = "state.json", "digests.json"
FILES = (MODEL_NAME, OPTIMIZER_NAME, STATE_NAME)
CHUNK_BYTES = 1 << 24
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""As safetensors calls them."""

Tensors = Mapping[str, Tensor]
Saved = tuple[Path, dict[str, Any]]
"""Folder and state of a checkpoint."""


@dataclass(frozen=True)
class Kept:
    """Which checkpoints stay when one more is there."""

    newest: int
    """So many of the newest."""
    every_steps: int | None = None
    """Those at multiples of this, too."""
    steps_back: int = 0
    """And the newest that is so many or more steps older than the last, and all since: what rollbacks go back to."""


def write(run: Path, step: int, *, model: Tensors, optimizer: Tensors, state: Mapping[str, Any], kept: Kept) -> Path:
    """Write RUN/checkpoints/step-N, point LATEST at it and delete what is not `kept`; returns the folder.

    The tensors are on the CPU. Raises RunError where the disk is full or refuses: then nothing is half-written and
    the checkpoints that were there still are.
    """
    target = run / FOLDER / f"step-{step:08d}"
    temporary = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        digests = {
            MODEL_NAME: write_tensors(temporary / MODEL_NAME, model),
            OPTIMIZER_NAME: write_tensors(temporary / OPTIMIZER_NAME, optimizer),
            STATE_NAME: _write_json(temporary / STATE_NAME, {**state, "step": step}),
        }
        _write_json(temporary / DIGESTS_NAME, digests)
        sync(temporary)
        _discard(target)
        temporary.rename(target)
        sync(target.parent)
        sync(run)
        write_bytes(run / FOLDER / LATEST_NAME, f"{target.name}\n".encode())
        prune(run, kept)
    except (OSError, StoreError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(
            "cannot write a checkpoint",
            where=target,
            found=error.details["found"] if isinstance(error, StoreError) else error,
            remedy="make room; the same command goes on from the checkpoint before",
        ) from error
    return target


def prune(run: Path, kept: Kept) -> None:
    """Delete all checkpoints but those `kept`."""
    found = find(run)
    staying = set(found[-kept.newest :])
    if kept.every_steps:
        staying |= {folder for folder in found if step_of(folder) % kept.every_steps == 0}
    if kept.steps_back:
        back = [folder for folder in found if step_of(folder) <= step_of(found[-1]) - kept.steps_back]
        staying |= set(found[max(len(back) - 1, 0) :])
    for folder in found:
        if folder not in staying:
            _discard(folder)


def sweep(run: Path) -> None:
    """Delete what a kill left half-written or half-deleted. Only for who holds the run's lock."""
    for folder in (run / FOLDER).glob(".*"):
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()


def find(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((run / FOLDER).glob("step-*"), key=lambda folder: (step_of(folder), folder.name))


def step_of(folder: Path) -> int:
    """Updates done at a checkpoint, by its name; -1 where that is none of ours."""
    digits = folder.name.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


def load_latest(run: Path, warn: Callable[[str], None], files: Iterable[str] = FILES) -> Saved | None:
    """Folder and state of the newest sound checkpoint; None where a run has none at all.

    `warn` hears of damaged ones passed over: which, and which file. `files`: only those are read and must be sound.
    Raises RunError where all are damaged, or all are gone that there were.
    """
    found = find(run)
    for folder in reversed(found):
        what = damage(folder, files)
        if what is None:
            return folder, read_state(folder)
        warn(f"checkpoint {folder} is damaged ({what}); trying the one before")
    if found:
        raise RunError("every checkpoint is damaged", where=run / FOLDER, remedy="start over: --force")
    if (run / FOLDER / LATEST_NAME).exists():  # else a run whose checkpoints were moved would begin anew, unasked
        raise RunError(
            "the checkpoints are gone",
            where=run / FOLDER,
            found=f"{LATEST_NAME}, and no folder step-*",
            remedy="put them back, or start over: --force",
        )
    return None


def damage(folder: Path, files: Iterable[str] = FILES) -> str | None:
    """What is wrong with a checkpoint and in which file, or None."""
    try:
        digests = json.loads((folder / DIGESTS_NAME).read_bytes())
        missing = set(FILES) - digests.keys()
    except (OSError, ValueError, AttributeError) as error:
        return f"{DIGESTS_NAME}: {error}"
    if missing:
        return f"{DIGESTS_NAME} lacks {', '.join(sorted(missing))}"
    wrong = [problem for name in {*files, STATE_NAME} if (problem := _compare(folder / name, digests[name]))]
    return "; ".join(sorted(wrong)) or None


def read_state(folder: Path) -> dict[str, Any]:
    """What state.json holds."""
    state: dict[str, Any] = json.loads((folder / STATE_NAME).read_bytes())
    return state


def read_model(folder: Path) -> dict[str, Tensor]:
    """Weights by name, on the CPU."""
    return load_file(folder / MODEL_NAME)


def read_optimizer(folder: Path) -> dict[str, Tensor]:
    """Optimizer state by KIND:NAME, on the CPU."""
    return load_file(folder / OPTIMIZER_NAME)


def write_tensors(path: Path, tensors: Tensors) -> str:
    """Write CPU tensors as safetensors, flushed to the disk; returns the digest of the file.

    The format: the header's length as 8 bytes, little-endian; the header, JSON padded with blanks to a multiple of 8;
    the tensors' bytes in the header's order. Written here so that its bytes are digested as they go out, other
    threads run meanwhile, and a full disk is an OSError.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return _write(path, [len(text).to_bytes(8, "little"), text, *_chunks(tensors)])


def _chunks(tensors: Tensors) -> Iterator[memoryview]:
    for tensor in tensors.values():
        data: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        view = memoryview(data)
        for first in range(0, len(view), CHUNK_BYTES):
            yield view[first : first + CHUNK_BYTES]


def _write_json(path: Path, value: Mapping[str, Any]) -> str:
    return _write(path, [json.dumps(value, indent=1).encode()])


def _write(path: Path, chunks: Iterable[bytes | memoryview]) -> str:
    """Write and flush to the disk; returns the digest."""
    digest = xxhash.xxh3_128()
    with path.open("wb") as stream:
        for chunk in chunks:
            stream.write(chunk)
            digest.update(chunk)
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def _compare(path: Path, expected: str) -> str | None:
    """What is wrong with a file, or None."""
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    return None if digest.hexdigest() == expected else f"{path.name} differs from its digest"


def _discard(folder: Path) -> None:
    """Delete a checkpoint, whole or not at all as far as its name tells."""
    if folder.exists():
        gone = folder.with_name(f".{folder.name}.deleted")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone)
