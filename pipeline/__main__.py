"""`slw-prep`, and `python -m pipeline`: Ctrl-C while modules are imported ends it as later, without a traceback."""

from __future__ import annotations

import sys
from importlib import import_module


def call(module: str) -> None:
    """Import a module of commands and call its `main`."""
    try:
        command = import_module(module).main
    except KeyboardInterrupt:
        print("\nstopped; the same command begins again, or goes on", file=sys.stderr)
        sys.exit(130)
    command()


def main() -> None:
    """Call `slw-prep`."""
    call("pipeline.cli")


if __name__ == "__main__":
    main()
