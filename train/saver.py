"""Checkpoints written in the background: a step hands over a consistent copy, a thread writes while training goes on.

At most one is being written. The copy is taken in stream order, on CUDA into pinned memory without waiting for the
device; its memory is used again for the next one. Price: the bytes of a checkpoint once more in the host's memory, on
CUDA up to twice, since torch rounds each pinned tensor up to a power of two.
What the writer meets, a full disk for example, is raised by the next call of the loop.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from train import checkpoint
from train.checkpoint import Kept, Tensors
from train.config import RunConfig
from train.parallel import whole


class Saver:
    """Writes the checkpoints of a run with these settings."""

    def __init__(self, settings: RunConfig) -> None:
        self.run = settings.dir
        back = settings.rollback_steps if settings.on_nonfinite == "rollback" else 0
        self.kept = Kept(settings.keep_checkpoints, settings.keep_every_steps, back)
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, step: int, *, model: Tensors, optimizer: Tensors, state: Mapping[str, Any]) -> None:
        """Copy everything as it is now and write it in the background; waits where one is still being written.

        Sharded tensors are gathered one by one: the other ranks call `whole`, of `model`, then of `optimizer`.
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
                checkpoint.write(self.run, step, model=weights, optimizer=moments, state=frozen, kept=self.kept)
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
        for name, shard in tensors.items():
            key, tensor = f"{part}/{name}", whole(shard)
            buffer = self._buffers.get(key)
            if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = copies[name] = buffer.copy_(tensor, non_blocking=True)
        return copies
