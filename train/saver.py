"""Checkpoints written in the background: a step hands over a consistent copy, a thread writes while training goes on.

At most one is being written. The copy is taken in stream order, on CUDA into pinned memory without waiting for the
device; its memory is used again for the next one. Price: the bytes of a checkpoint once more in the host's memory.
What the writer meets, a full disk for example, is raised by the next call of the loop.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train import checkpoint
from train.checkpoint import Tensors
from train.config import RunConfig


class Saver:
    """Writes a run's checkpoints; `keep...` as in `checkpoint.prune`."""

    def __init__(
        self, run: Path, *, keep: int, keep_every_steps: int | None = None, keep_steps_back: int = 0
    ) -> None:
        self.run = run
        self.keeping: dict[str, Any] = {
            "keep": keep,
            "keep_every_steps": keep_every_steps,
            "keep_steps_back": keep_steps_back,
        }
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, step: int, *, model: Tensors, optimizer: Tensors, state: Mapping[str, Any]) -> None:
        """Copy everything as it is now and write it in the background; waits where one is still being written.

        Raises what kept the one before from being written.
        """
        self.wait()
        weights, moments = self._copy("model", model), self._copy("optimizer", optimizer)
        frozen = copy.deepcopy(dict(state))
        on_cuda = any(tensor.is_cuda for tensor in (*model.values(), *optimizer.values()))
        copied = torch.cuda.current_stream().record_event() if on_cuda else None

        def write() -> None:
            try:
                if copied:
                    copied.synchronize()
                checkpoint.write(self.run, step, model=weights, optimizer=moments, state=frozen, **self.keeping)
            except BaseException as failure:  # handed to the loop
                self._failure = failure

        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for what is being written; raises as `check` does, but where something else is raised already."""
        if kind is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()

    def check(self) -> None:
        """Raise what kept a checkpoint from being written, if anything did so far; does not wait."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def wait(self) -> None:
        """Return when no checkpoint is being written; raises as `check` does."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def _copy(self, part: str, tensors: Tensors) -> dict[str, Tensor]:
        copies = {}
        for name, tensor in tensors.items():
            key = f"{part}/{name}"
            buffer = self._buffers.get(key)
            if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = copies[name] = buffer.copy_(tensor, non_blocking=True)
        return copies


def saver_of(settings: RunConfig) -> Saver:
    """The saver of a run with these settings."""
    return Saver(
        settings.dir,
        keep=settings.keep_checkpoints,
        keep_every_steps=settings.keep_every_steps,
        keep_steps_back=settings.rollback_steps if settings.on_nonfinite == "rollback" else 0,
    )
