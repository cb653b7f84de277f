"""numba's cache of compiled kernels (`njit(cache=True)`, in __pycache__), and who has to wait for it.

numba recompiles a kernel when the kernel's own file changes, but not when a kernel that it calls from another file
does: after a `git pull` that changes the packer, the dealer would still run the old one. `pipeline` calls
`drop_stale` when it is imported, before any kernel is loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
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


@contextlib.contextmanager
def compiling_told(tell: Callable[[str], None]) -> Iterator[None]:
    """`tell` when the first kernel is compiled: whoever waits half a minute wants to know for what."""
    from numba.core import event

    class Told(event.Listener):  # type: ignore[misc]
        told = False

        def on_start(self, event: object) -> None:
            if not self.told:
                self.told = True
                tell("compiling kernels: once after an installation or a change, up to half a minute")

        def on_end(self, event: object) -> None:
            pass

    listener = Told()
    event.register("numba:compile", listener)
    try:
        yield
    finally:
        event.unregister("numba:compile", listener)
