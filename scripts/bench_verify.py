#!/usr/bin/env python3
"""How fast `verify` reads a store, beside `cat` of the same files: one JSON line, GB/s, the median of the repeats.

    scripts/bench_verify.py shards/books

"cold": the pages of the files are dropped from the page cache before each (posix_fadvise); "warm": they are in it.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.format import Manifest
from pipeline.verify import verify


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    shards = Manifest.load(arguments.store).shards
    files = [arguments.store / shard.file for shard in shards]
    size = sum(shard.bytes for shard in shards)

    def check() -> None:
        assert verify(arguments.store) == [], "the store is damaged"

    def cat() -> None:
        subprocess.run(["sh", "-c", 'cat "$@" | cat > /dev/null', "cat", *map(str, files)], check=True)

    os.sync()
    check()  # imports
    figures = {
        f"{name}_{cache}_gb_per_s": round(speed(action, files, size, arguments.repeats, cold=cache == "cold"), 2)
        for cache in ("cold", "warm")
        for name, action in (("verify", check), ("cat", cat))
    }
    print(json.dumps({"subject": "verify", "bytes": size, "shards": len(shards), **figures}))


def speed(action: Callable[[], None], files: list[Path], size: int, repeats: int, *, cold: bool) -> float:
    seconds = []
    for _ in range(repeats):
        for file in files if cold else []:
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
        began = time.monotonic()
        action()
        seconds.append(time.monotonic() - began)
    return size / 1e9 / statistics.median(seconds)


if __name__ == "__main__":
    main()
