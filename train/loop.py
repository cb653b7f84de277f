"""The training loop: read it from `run` downwards."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import ConfigError
from pipeline.progress import ProgressLine
from train import checkpoint
from train.config import Config
from train.folder import check_folder, clear, write_config
from train.lock import locked
from train.metrics import MetricsFile
from train.run import Run
from train.signals import Signals


@dataclass(frozen=True)
class Outcome:
    """What a run ended with."""

    dir: str
    finished: bool
    """False where a signal stopped it."""
    step: int
    tokens_seen: int
    validation_loss: float | None
    """At full length, nats a token; None without held-out documents."""
    spikes: dict[str, int]
    """Threshold of the loss ratio -> steps above it."""
    clipped_share: float
    """Of the steps: those whose gradients were scaled down."""
    elapsed_s: float
    lengths: list[tuple[int, int]] = field(default_factory=list)
    """(first step, seqlen) that an adaptive schedule took."""


def run(
    config: Config, *, force: bool = False, change_schedule: bool = False, warn: Callable[[str], None]
) -> Outcome:
    """Train as `config` says, or go on where RUN left off.

    Raises ConfigError, StoreError; RunError where RUN holds another run or the loss is no longer finite.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("several ranks are not supported yet", found=f"WORLD_SIZE={os.environ['WORLD_SIZE']}")
    config.schedule()  # a mistake in it is told before anything is touched
    folder = config.run.dir
    check_folder(folder, config, change_schedule, force)
    with locked(folder):
        if force:
            clear(folder)
        check_folder(folder, config, change_schedule)  # again: another run may just have ended
        return _run(config, change_schedule, warn)


def _run(config: Config, change_schedule: bool, warn: Callable[[str], None]) -> Outcome:
    folder = config.run.dir
    checkpoint.sweep(folder)
    saved = checkpoint.load_latest(folder, warn)
    resumed = saved is not None
    this = Run(config, warn, saved)
    if saved:
        this.resume(saved, change_schedule)
    write_config(folder, config)
    metrics = MetricsFile(folder, keep_until_step=this.at.step if resumed else -1)
    if resumed:
        warn(f"going on after step {this.at.step:,} of {this.schedule.total_steps:,}")
    try:
        with _collector_off(), this.saver:
            finished, validation = _steps(this, metrics, resumed)
    finally:
        metrics.close()
        this.loader.close()
    at = this.at
    taken = [(phase.first_step, phase.seqlen) for phase in this.schedule.phases] if this.notches else []
    return Outcome(
        str(folder),
        finished,
        step=at.step,
        tokens_seen=at.tokens_seen,
        validation_loss=validation,
        spikes=this.ratio.spikes,
        clipped_share=at.clipped / max(at.step, 1),
        elapsed_s=at.elapsed_s,
        lengths=taken,
    )


def _steps(this: Run, metrics: MetricsFile, resumed: bool) -> tuple[bool, float | None]:
    """Train to the end or to a signal; returns (finished, last validation loss)."""
    settings, total_steps = this.config.run, this.schedule.total_steps
    validation = this.validate() if not resumed or this.at.step >= total_steps else None
    if not resumed and validation is not None:
        metrics.write({"step": 0, "tokens_seen": 0, "elapsed_s": 0.0, "validation_loss": validation})
    with Signals() as signals, ProgressLine("training", total_steps) as progress:
        this.pending.restart_clock()
        for batch in this.loader:
            this.step(batch)
            step, stop = this.at.step, signals.received
            last = step == total_steps
            validates = step % settings.validate_every_steps == 0 or last
            saves = step % settings.checkpoint_every_steps == 0 or last or stop
            if not (validates or saves or step % this.log_every_steps == 0):
                continue
            this.saver.check()
            lines = this.fetch()
            if validates:
                validation = this.validate()
                gc.collect()
                if validation is not None:
                    lines[-1]["validation_loss"] = validation
                    if raised := this.adapt(validation):
                        lines[-1]["seqlen_next"] = raised
                        total_steps = this.schedule.total_steps
            for line in lines:
                metrics.write(line)
            progress.update(step, _detail(lines[-1], total_steps, validation))
            if saves:
                this.save()
            if stop and not last:
                return False, validation
            if validates or saves:
                this.pending.restart_clock()
    return True, validation


@contextmanager
def _collector_off() -> Iterator[None]:
    """Python's garbage collector stops all for tens of milliseconds when it likes: here only at validations."""
    was_on = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


def _detail(line: dict[str, Any], total_steps: int, validation: float | None) -> str:
    shown = f"  val {validation:.3f}" if validation is not None else ""
    return (
        f"{line['step']}/{total_steps}  seqlen {line['seqlen']}  loss {line['loss']:.3f}{shown}  "
        f"{line['tokens_per_s'] / 1e3:,.1f}k tokens/s"
    )
