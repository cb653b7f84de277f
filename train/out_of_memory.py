"""A micro-batch that does not fit the device's memory: recognised, explained, or halved until it fits."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from pipeline.errors import RunError


def largest_that_fits(
    attempt: Callable[[int], None], most: int, least: int, agreed: Callable[[bool], bool] = bool
) -> int:
    """The first of `most`, `most` / 2, ... tokens whose `attempt` does not run out of memory, at least `least`.

    `agreed` turns this rank's answer into that of all ranks. Raises RunError where even `least` does not fit.
    """
    tokens = max(most, least)
    while not agreed(_fits(attempt, tokens)):
        if tokens == least:
            raise _too_large(tokens)
        tokens = max(least, tokens // 2)
    return tokens


@contextmanager
def out_of_memory_explained(tokens: Callable[[], int]) -> Iterator[None]:
    """Running out of device memory inside, in micro-batches of `tokens()`, becomes a RunError with a remedy."""
    try:
        yield
    except RuntimeError as error:
        if _is_out_of_memory(error):
            raise _too_large(tokens(), error) from error
        raise


def _is_out_of_memory(error: RuntimeError) -> bool:
    """torch's allocator has an error class of its own; cuBLAS, Triton and NCCL only say it in the message."""
    words = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _too_large(tokens: int, error: RuntimeError | None = None) -> RunError:
    said = f": {str(error).splitlines()[0]}" if error and str(error) else ""
    return RunError(
        "a micro-batch does not fit the device's memory",
        found=f"{tokens:,} tokens{said}",
        remedy='a smaller batch.micro_batch_tokens, or "auto"; if it is one row, run.activation_checkpointing; '
        "all of them may change when a run goes on",
    )


def _fits(attempt: Callable[[int], None], tokens: int) -> bool:
    enough = True
    try:
        attempt(tokens)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        enough = False
    if not enough:  # outside of the handler: the error's traceback holds what was allocated
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return enough
