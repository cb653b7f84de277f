"""numba's cache of compiled kernels (`njit(cache=True)`, in __pycache__), cleared where it is out of date.

numba recompiles a kernel when the kernel's own file changes, but not when a kernel that it calls from another file
does: after a `git pull` that changes the packer, the dealer would still run the old one. `pipeline` calls
`drop_stale` when it is imported, before any kernel is loaded. The first use after an installation compiles all that
it meets: `tell_if_cold` says so.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

PACKAGES = [Path(__file__).parents[1] / name for name in ("pipeline", "curriculum", "train")]


def drop_stale(packages: Iterable[Path] = PACKAGES) -> None:
    """Delete every cached kernel that is older than the newest source file with kernels; the next call compiles it.

    A cache kept elsewhere (NUMBA_CACHE_DIR, or where the package cannot be written) is left alone.
    """
    with contextlib.suppress(OSError):  # another process may do the same
        indexes = [index for package in packages for index in (package / "__pycache__").glob("*.nbi")]
        sources = {index.parents[1] / f"{index.name.split('.')[0]}.py" for index in indexes}
        changed = max((source.stat().st_mtime_ns for source in sources if source.exists()), default=0)
        for index in indexes:
            if index.stat().st_mtime_ns < changed:
                index.unlink(missing_ok=True)


def is_cold(package: Path = PACKAGES[1]) -> bool:
    """Whether no kernel of `package` was ever compiled here, so that the first calls take half a minute."""
    return "NUMBA_CACHE_DIR" not in os.environ and not any((package / "__pycache__").glob("*.nbi"))


def tell_if_cold() -> None:
    """On a terminal, a line that says why nothing is seen for a while."""
    if sys.stderr.isatty() and is_cold():
        print("compiling, this first time: half a minute", file=sys.stderr)
