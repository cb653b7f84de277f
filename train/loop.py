"""The training loop: read it from `run` downwards."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from curriculum.adaptive import Calm
from curriculum.batch import Batch
from curriculum.loader import full_length_batches
from curriculum.schedule import Schedule
from pipeline.errors import ConfigError, RunError
from pipeline.progress import ProgressLine
from pipeline.reader import Store
from train import checkpoint
from train.config import Config
from train.data import micro_batches
from train.folder import CONFIG_NAME, check_folder, write_config
from train.metrics import MetricsFile
from train.model import GPT2
from train.optimizer import learning_rate, make_optimizer
from train.signals import Signals
from train.stability import LossRatio, adam_variance

Saved = tuple[Path, dict[str, Any]]
"""Folder and state of a checkpoint."""


@dataclass
class Progressed:
    """Where a run is; kept in checkpoints."""

    step: int = 0
    """Updates done."""
    tokens_seen: int = 0
    elapsed_s: float = 0.0
    """Training alone, without validation and checkpoints."""


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
    spikes: int
    elapsed_s: float
    lengths: list[tuple[int, int]] = field(default_factory=list)
    """(first step, seqlen) that an adaptive schedule took."""


class Run:
    """Everything that lives as long as a run."""

    def __init__(self, config: Config, warn: Callable[[str], None], saved: Saved | None = None) -> None:
        self.config = config
        self.warn = warn
        self.store = Store.open(config.store)
        self.loader = config.loader(self.store)
        self.schedule: Schedule = self.loader.schedule
        self.device = _device(config.run.device)
        torch.manual_seed(config.run.seed)
        positions = saved[1]["positions"] if saved else self.schedule.max_seqlen
        if self.schedule.max_seqlen > positions:
            raise RunError(
                "the schedule is longer than the model that was begun",
                where=config.run.dir,
                found=f"sequences of {self.schedule.max_seqlen} tokens",
                allowed=f"{positions} tokens: so many positions it has",
                remedy="keep the longest length, or begin another run",
            )
        self.model = GPT2(config.model, self.store.manifest.vocab_size, positions).to(self.device)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.at = Progressed()
        self.ratio = LossRatio()
        held_out = Store.open(config.store, "validation")
        self.held_out = held_out if held_out.documents else None
        if self.held_out is None:
            warn("the store has no held-out documents: no validation (slw-prep build --validation-fraction 0.01)")
        self.notches = self.schedule.notches
        self.calm = Calm()
        if self.notches and self.held_out is None:
            raise ConfigError("an adaptive length follows validation", found="no held-out documents")

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 matrix products where configured."""
        dtype = self.config.run.dtype
        use = dtype == "bfloat16" or (dtype == "auto" and self.device.type == "cuda")
        return torch.autocast(self.device.type, torch.bfloat16, enabled=use)

    def update(self, batch: Batch) -> tuple[float, float, float]:
        """One optimizer step; returns (loss in nats a token, gradient norm before clipping, learning rate)."""
        settings = self.config.optimizer
        rate = learning_rate(settings, batch.step, self.at.tokens_seen, self.schedule.total_tokens or 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=self.device)
        size, mask = self.config.batch.micro_batch_tokens, self.config.model.mask
        for ids, positions, labels, spans in micro_batches(batch, size, self.device, mask):
            with self.autocast():
                loss = self.model.loss(ids, positions, labels, spans) / batch.targets
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(total), float(norm), rate

    @torch.no_grad()
    def validate(self) -> float | None:
        """Loss in nats a token at full length on held-out documents, always the same ones; None without any."""
        if self.held_out is None:
            return None
        seqlen = self.schedule.max_seqlen
        rows = max(1, self.config.batch.micro_batch_tokens // seqlen)
        total, targets = torch.zeros((), device=self.device), 0
        for batch in full_length_batches(self.held_out, seqlen, rows):
            for ids, positions, labels, _ in micro_batches(batch, rows * seqlen, self.device):
                with self.autocast():
                    total += self.model.loss(ids, positions, labels)
            targets += batch.targets
            if targets >= self.config.run.validation_tokens:
                break
        return float(total) / targets

    def adapt(self, validation: float) -> int | None:
        """The length from the next step on, where `validation` has raised it."""
        if self.notches is None or self.at.step >= self.schedule.total_steps:
            return None
        seqlen = self.schedule.seqlen(self.at.step)
        raised = self.calm.observe(validation, seqlen, self.notches)
        if raised == seqlen:
            return None
        self.loader.change_schedule(self.loader.order.asked[-1][1].raised_to(raised))
        self.schedule = self.loader.schedule
        return raised

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        state = {
            "progressed": asdict(self.at),
            "loss_ratio": asdict(self.ratio),
            "calm": asdict(self.calm),
            "positions": self.model.positions.num_embeddings,
            "loader": self.loader.state_dict(),
        }
        run = self.config.run
        checkpoint.save(run.dir, self.at.step, self.model, self.optimizer, state, run.keep_checkpoints)

    def resume(self, saved: Saved, change_schedule: bool) -> None:
        """Go on from a checkpoint."""
        folder, state = saved
        self.loader.load_state_dict(state["loader"], change_schedule=change_schedule)
        self.schedule = self.loader.schedule
        checkpoint.restore(folder, state, self.model, self.optimizer)
        self.at = Progressed(**state["progressed"])
        self.ratio = LossRatio(**state["loss_ratio"])
        self.calm = Calm(**state["calm"])


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
    if force and (folder / CONFIG_NAME).exists():
        shutil.rmtree(folder)
    check_folder(folder, config, change_schedule)
    saved = checkpoint.load_latest(folder, warn)
    resumed = saved is not None
    this = Run(config, warn, saved)
    if saved:
        this.resume(saved, change_schedule)
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, config)
    metrics = MetricsFile(folder, keep_until_step=this.at.step if resumed else -1)
    if resumed:
        warn(f"going on after step {this.at.step:,} of {this.schedule.total_steps:,}")
    try:
        finished, validation = _steps(this, metrics, resumed)
    finally:
        metrics.close()
        this.loader.close()
    at = this.at
    taken = [(phase.first_step, phase.seqlen) for phase in this.schedule.phases] if this.notches else []
    return Outcome(str(folder), finished, at.step, at.tokens_seen, validation, this.ratio.spikes, at.elapsed_s, taken)


def _steps(this: Run, metrics: MetricsFile, resumed: bool) -> tuple[bool, float | None]:
    """Train to the end or to a signal; returns (finished, last validation loss)."""
    settings, total_steps = this.config.run, this.schedule.total_steps
    validation = this.validate() if not resumed or this.at.step >= total_steps else None
    if not resumed and validation is not None:
        metrics.write({"step": 0, "tokens_seen": 0, "elapsed_s": 0.0, "validation_loss": validation})
    with Signals() as signals, ProgressLine("training", total_steps) as progress:
        started = time.perf_counter()
        for batch in this.loader:
            line = _step(this, batch, started)
            step = this.at.step
            if step % settings.validate_every_steps == 0 or step == total_steps:
                validation = this.validate()
                if validation is not None:
                    line["validation_loss"] = validation
                    if raised := this.adapt(validation):
                        line["seqlen_next"] = raised
                        total_steps = this.schedule.total_steps
            metrics.write(line)
            progress.update(step, _detail(line, total_steps, validation))
            if step % settings.checkpoint_every_steps == 0 or step == total_steps or signals.received:
                this.save()
            if signals.received and step < total_steps:
                return False, validation
            started = time.perf_counter()
    return True, validation


def _step(this: Run, batch: Batch, started: float) -> dict[str, Any]:
    """One update and its line of metrics. Raises RunError where the loss is not finite."""
    at = this.at
    assert (batch.step, batch.seqlen) == (at.step, this.schedule.seqlen(at.step)), "batch and schedule disagree"
    loss, norm, rate = this.update(batch)
    at.step += 1
    at.tokens_seen += batch.targets
    took = time.perf_counter() - started
    at.elapsed_s += took
    line = {
        "step": at.step,
        "tokens_seen": at.tokens_seen,
        "elapsed_s": round(at.elapsed_s, 4),
        "seqlen": batch.seqlen,
        "sequences": len(batch.labels),
        **({"window": batch.window} if batch.window is not None else {}),
        "loss": loss,
        "loss_ratio": this.ratio.update(loss),
        "grad_norm": norm,
        "lr": rate,
        "tokens_per_s": round(batch.targets / took, 1),
        **adam_variance(this.model, this.optimizer),
    }
    if not math.isfinite(loss):
        raise RunError(
            "the loss is not finite any more",
            where=f"{this.config.run.dir}, step {at.step}",
            found=f"loss {loss}, gradient norm {norm}, largest Adam variance in {line['variance_argmax'] or 'none'}",
            remedy="lower optimizer.lr, or lengthen the warmup: optimizer.warmup_steps, curriculum.duration_steps",
        )
    return line


def _detail(line: dict[str, Any], total_steps: int, validation: float | None) -> str:
    shown = f"  val {validation:.3f}" if validation is not None else ""
    return (
        f"{line['step']}/{total_steps}  seqlen {line['seqlen']}  loss {line['loss']:.3f}{shown}  "
        f"{line['tokens_per_s'] / 1e3:,.1f}k tokens/s"
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            "no such device", found=f"run.device = {name}: {error}", allowed="auto, cpu, cuda"
        ) from error
    return device
