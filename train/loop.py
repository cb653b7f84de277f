"""The training loop: read it from `run` downwards."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curriculum.planner import PLANNERS
from pipeline.errors import ConfigError
from train import checkpoint
from train.config import Config
from train.determinism import deterministic
from train.distributed import Ranks, digest, together
from train.folder import check_folder, clear, locked, write_config
from train.metrics import METRICS_NAME
from train.out_of_memory import out_of_memory_explained
from train.recovery import recover
from train.report import Report
from train.run import Run
from train.signals import Signals
from train.state import resume, save
from train.trackers import check_installed
from train.warmup import warm_up


@dataclass(frozen=True)
class Outcome:
    """What a run ended with."""

    dir: str
    finished: bool
    """False where a signal stopped it."""
    step: int
    tokens_seen: int
    """Tokens that were a target, repeats counted; with `padding` and `lost` what `slw-train plan` foretold."""
    padding: int
    """Positions of the batches so far that had no target."""
    lost: int | None
    """Tokens passed over for good; None where the run is not at its end."""
    epochs: float
    """tokens_seen / tokens of the store."""
    validation_loss: float | None
    """At full length, nats a token; None without held-out documents."""
    spikes: dict[str, int]
    """Threshold of the loss ratio -> steps above it."""
    clipped_share: float
    """Share of the steps whose gradients were scaled down."""
    elapsed_s: float
    stopped_by: str | None = None
    """The signal that stopped it."""
    unlearnt: list[list[int]] = field(default_factory=list)
    """[first, last] batches, counted from 0, that were served but are in no weights, for they were not finite."""
    lengths: list[tuple[int, int]] = field(default_factory=list)
    """(first step, seqlen) that an adaptive schedule took."""


def run(
    config: Config,
    *,
    force: bool = False,
    change_schedule: bool = False,
    warn: Callable[[str], None],
    ranks: Ranks | None = None,
) -> Outcome:
    """Train as `config` says, or go on where RUN left off; with the other ranks if torchrun started this process.

    Raises ConfigError, StoreError; RunError where RUN holds another run or the loss is no longer finite.
    """
    if ranks is None:
        with together() as all_of_us:
            return run(config, force=force, change_schedule=change_schedule, warn=warn, ranks=all_of_us)
    config.schedule()  # a mistake in it is told before anything is touched
    ranks.agree({"config": digest(config.model_dump(mode="json", exclude={"store": True, "run": {"dir", "device"}}))})
    folder = config.run.dir
    with ExitStack() as held:
        signals = held.enter_context(Signals(tell=ranks.first))
        if config.run.deterministic:
            held.enter_context(deterministic())
        found = ranks.from_first(lambda: _opened(config, force, change_schedule, warn, held))
        saved = (Path(found[0]), found[1]) if found else None
        this = Run(config, warn if ranks.first else lambda text: None, saved, ranks)
        held.callback(this.loader.close)
        if saved:
            resume(this, saved, change_schedule)
            this.warn(f"going on after step {this.at.step:,} of {this.schedule.total_steps:,}")
        this.agree()
        if ranks.first:
            write_config(folder, config)
        warm_up(this)
        held.enter_context(this.saver)
        report = held.enter_context(Report(config, this.at.step, silent=not ranks.first))
        held.enter_context(_collector_off())
        with out_of_memory_explained(lambda: this.micro_batch_tokens):
            finished, validation = _steps(this, report, signals)
        if finished:
            _tell_short_end(this)
    return _outcome(this, validation, None if finished else signals.received or "a signal to another rank")


def _tell_short_end(this: Run) -> None:
    """Where an adaptive run ended below its full length."""
    notches, reached = this.asked.notches, this.schedule.phases[-1].seqlen
    if notches and reached < notches.seqlen_end:
        this.warn(
            f"the length rose to {reached:,} only, not to {notches.seqlen_end:,}, which takes "
            f"{notches.fewest_validations:,} calm validations; see curriculum.seqlen_multiple, patience, tolerance "
            "and run.validate_every_steps"
        )


def _outcome(this: Run, validation: float | None, stopped_by: str | None) -> Outcome:
    at = this.at
    return Outcome(
        dir=str(this.config.run.dir),
        finished=stopped_by is None,
        step=at.step,
        tokens_seen=at.tokens_seen,
        padding=this.schedule.tokens_before(at.step) - at.tokens_seen,
        lost=PLANNERS[this.schedule.planner].lost(this.loader.order) if stopped_by is None else None,
        epochs=at.tokens_seen / this.store.tokens,
        validation_loss=validation,
        spikes=this.ratio.spikes,
        clipped_share=at.clipped / max(at.step, 1),
        elapsed_s=at.elapsed_s,
        stopped_by=stopped_by,
        unlearnt=this.faults.unlearnt,
        lengths=[(phase.first_step, phase.seqlen) for phase in this.schedule.phases] if this.asked.notches else [],
    )


def _opened(
    config: Config, force: bool, change_schedule: bool, warn: Callable[[str], None], held: ExitStack
) -> tuple[str, dict[str, Any]] | None:
    """Lock the run folder until `held` ends; the checkpoint to go on from."""
    folder = config.run.dir
    if force and (restarts := int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))):
        raise ConfigError(
            "--force would delete the run each time that torchrun starts its ranks again",
            where=folder,
            found=f"--max-restarts {restarts}",
            remedy="delete the folder yourself, and leave out --force",
        )
    check_installed(config)
    check_folder(folder, config, change_schedule, force)
    held.enter_context(locked(folder))
    if force:
        clear(folder)
    check_folder(folder, config, change_schedule)  # again: another run may just have ended
    checkpoint.sweep(folder)
    saved = checkpoint.load_latest(folder, warn)
    if saved is None and (folder / METRICS_NAME).exists():
        warn(f"no checkpoint in {folder} yet: it begins again, and so do its metrics")
    return (str(saved[0]), saved[1]) if saved else None


def _steps(this: Run, report: Report, signals: Signals) -> tuple[bool, float | None]:
    """Train to the end or to a signal; returns (finished, last validation loss)."""
    validation = this.validate() if this.at.step in (0, this.schedule.total_steps) else None
    if this.at.step == 0 and validation is not None:
        report.write([{"step": 0, "tokens_seen": 0, "elapsed_s": 0.0, "validation_loss": validation}])
    this.asked_to_stop = lambda: this.ranks.any(signals.received is not None)
    signals.training = True
    this.pending.restart_clock()
    for batch in this.loader:
        done = this.step(batch)
        stop = not done or this.asked_to_stop()
        if this.at.step == 0:
            return False, validation
        validates, saves = _due(this, stop)
        if not (validates or saves or this.at.step % this.log_every_steps == 0):
            continue
        this.saver.check()
        lines = this.fetch()
        if this.bad:
            failure = recover(this, lines[-1])
            if failure:
                report.write(lines)
                raise failure
            validates, saves = _due(this, True)  # the weights of after a rollback are kept at once
        if validates and done:
            validation = _validate(this, lines[-1])
        if lines:
            report.write(lines)
            report.show(lines[-1], this.schedule, validation)
        if saves:
            report.sync()
            save(this)
        if stop and this.at.step < this.schedule.total_steps:
            return False, validation
        if validates or saves:
            this.pending.restart_clock()
    return True, validation


def _validate(this: Run, line: dict[str, Any]) -> float | None:
    """Validation after the step of `line`, which tells it, and a length that it raised."""
    validation = this.validate()
    gc.collect()
    if validation is not None:
        line["validation_loss"] = validation
        if raised := this.adapt(validation):
            line["seqlen_next"] = raised
    return validation


def _due(this: Run, stop: bool) -> tuple[bool, bool]:
    """(validation is due, checkpoint is due) after the last step; before the first there is nothing to save."""
    settings, step = this.config.run, this.at.step
    last = step == this.schedule.total_steps
    validates = step % settings.validate_every_steps == 0 or last
    return validates, step > 0 and (step % settings.checkpoint_every_steps == 0 or last or stop)


@contextmanager
def _collector_off() -> Iterator[None]:
    """Python's garbage collector may pause a step for tens of milliseconds: inside, it runs at validations only.

    Objects made before are frozen: it does not look at them. Objects that the caller has frozen stay so.
    """
    was_on, was_frozen = gc.isenabled(), gc.get_freeze_count()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        if not was_frozen:
            gc.unfreeze()
        if was_on:
            gc.enable()
