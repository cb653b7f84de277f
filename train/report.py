"""What a run tells while it trains: lines of metrics in its folder, a progress line on standard error."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pipeline.progress import ProgressLine
from train.metrics import MetricsFile


class Report:
    """Of rank 0; `silent` on the others, which know the same."""

    def __init__(self, folder: Path, *, step: int, total_steps: int, silent: bool) -> None:
        self._held = ExitStack()
        self._metrics: MetricsFile | None = None
        self._progress: ProgressLine | None = None
        if not silent:
            self._metrics = MetricsFile(folder, keep_until_step=step or -1)
            self._held.callback(self._metrics.close)
            self._progress = self._held.enter_context(ProgressLine("training", total_steps))

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def write(self, lines: list[dict[str, Any]]) -> None:
        """Lines of metrics, of consecutive steps."""
        if self._metrics:
            for line in lines:
                self._metrics.write(line)

    def show(self, line: dict[str, Any], total_steps: int, validation: float | None) -> None:
        """How far the run is, after the step of `line`."""
        if self._progress:
            self._progress.update(line["step"], _detail(line, total_steps, validation))


def _detail(line: dict[str, Any], total_steps: int, validation: float | None) -> str:
    shown = f"  val {validation:.3f}" if validation is not None else ""
    return (
        f"{line['step']}/{total_steps}  seqlen {line['seqlen']}  loss {line['loss']:.3f}{shown}  "
        f"{line['tokens_per_s'] / 1e3:,.1f}k tokens/s"
    )
