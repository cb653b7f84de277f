"""Deterministic kernels, which always add in the same order: a resumed run is bit-identical on a GPU too.

On the CPU it is anyway, with the same number of threads. Price on a GPU: slower backward passes of attention
and embeddings; an operation that has no such kernel is an error, never a silent difference.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic() -> Iterator[None]:
    """Only such kernels inside. Enter it before anything runs on a GPU: cuBLAS reads its variable once.

    torch: `use_deterministic_algorithms`; FlashAttention and cuDNN follow it. Memory that is not written yet is left
    alone: filling it would cost and finds bugs only.
    """
    memory: Any = torch.utils.deterministic
    os.environ.setdefault(CUBLAS, ":4096:8")
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        memory.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
    )
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = before[2]
        torch.backends.cudnn.benchmark = before[3]
