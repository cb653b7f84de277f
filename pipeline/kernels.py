"""numba's files of compiled kernels, which outlive what they were compiled from.

numba keeps a kernel while the file of the kernel is the same, whatever became of the kernels that it calls from other
files: after `git pull` a changed packer would go on dealing as before, and a resumed run with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

PACKAGES = [Path(__file__).parents[1] / name for name in ("pipeline", "curriculum", "train")]


def drop_stale(packages: Iterable[Path] = PACKAGES) -> None:
    """Delete kernels compiled before any file of kernels changed: they are compiled again when next called.

    Where numba keeps them elsewhere (NUMBA_CACHE_DIR, or folders one may not write) they are left alone.
    """
    with contextlib.suppress(OSError):  # another process may do the same
        indexes = [index for package in packages for index in (package / "__pycache__").glob("*.nbi")]
        sources = {index.parents[1] / f"{index.name.split('.')[0]}.py" for index in indexes}
        changed = max((source.stat().st_mtime_ns for source in sources if source.exists()), default=0)
        for index in indexes:
            if index.stat().st_mtime_ns < changed:
                index.unlink(missing_ok=True)
