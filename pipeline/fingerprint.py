"""Digests of samples of the local input files, so that a build notices one that was rewritten in the same size.

Not a proof: it reads at most `SAMPLES` pieces of a file, of at most `FILES` files. Modification times are not used,
since a copy has others. Files at a URL are known by name and size alone.
"""

from __future__ import annotations

import os

import xxhash

from pipeline.errors import CorpusError
from pipeline.files import STDIN
from pipeline.inputs import InputFile
from pipeline.urls import is_remote

FILES = 1000
SAMPLES = 16
SAMPLE_BYTES = 4096


def fingerprints(files: list[InputFile]) -> list[str]:
    """A digest of samples of each file; "" for those not looked at: by URL, or between every n-th of very many."""
    step = -(-len(files) // FILES)
    return [
        _fingerprint(file) if at % max(step, 1) == 0 and file.path != STDIN and not is_remote(file.path) else ""
        for at, file in enumerate(files)
    ]


def _fingerprint(file: InputFile) -> str:
    """Digest of a whole small file, or of evenly spaced pieces of a large one, first and last byte included."""
    last = max(file.size - SAMPLE_BYTES, 0)
    starts = sorted({last * sample // (SAMPLES - 1) for sample in range(SAMPLES)})
    digest = xxhash.xxh3_64()
    try:
        handle = os.open(file.path, os.O_RDONLY)
        try:
            for start in starts:
                digest.update(os.pread(handle, SAMPLE_BYTES, start))
        finally:
            os.close(handle)
    except OSError as error:
        raise CorpusError(
            "an input that cannot be read", where=file.path, found=error, remedy="check the path and its permissions"
        ) from error
    return digest.hexdigest()
