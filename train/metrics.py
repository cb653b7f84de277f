"""RUN/metrics.jsonl: one JSON line a step, for programs and for `slw-train compare`.

`step` is the number of updates done. A resumed run cuts the file back to its checkpoint, so no step is there twice.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

from pipeline.errors import RunError

METRICS_NAME = "metrics.jsonl"


class MetricsFile:
    """Appends lines, flushed one by one."""

    def __init__(self, run: Path, *, keep_until_step: int) -> None:
        path = run / METRICS_NAME
        there = read_metrics(run) if path.exists() else []
        kept = [line for line in there if line["step"] <= keep_until_step]
        temporary = path.with_suffix(".partial")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(path)
        self._stream: IO[str] = path.open("a")

    def write(self, line: dict[str, Any]) -> None:
        """Append one line."""
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()

    def sync(self) -> None:
        """Return when all lines are on the disk: before a checkpoint that goes on from them."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All complete lines of a run; raises RunError where there is no such file."""
    path = run / METRICS_NAME
    if not path.is_file():
        raise RunError("no metrics here: not a run", where=run, remedy="train one: slw-train run CONFIG.toml")
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break  # cut off by a kill; what follows cannot be there
    return lines
