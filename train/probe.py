"""A probe: the first steps of a run as it would be with another start length or ramp, watched by its validations.

What a probe has shown is kept in TUNE/probes.json, written whole or not at all; its run folder goes once it is known.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, RunError
from train.config import Config
from train.config_file import parse_config
from train.faults import NotFinite
from train.folder import FREE_KEYS, flat
from train.loop import run
from train.metrics import read_metrics

KEPT_NAME = "probes.json"
CHECKPOINTS = 4
"""Checkpoints of one probe: a kill costs a quarter of it at most."""
RAMPS = ("linear", "root", "sine", "exponential")


@dataclass(frozen=True)
class Probe:
    """A choice of the two numbers that are tuned, and what its first steps showed."""

    seqlen_start: int
    duration_steps: int
    losses: list[tuple[int, float]]
    """(step, validation loss at full length in nats a token), step 0 being before training."""
    diverged: bool
    """The training loss was no longer finite: the losses end there."""
    tokens: int = 0
    """Trained on."""

    def fluctuates(self, threshold: float, until: int | None = None) -> bool:
        """Was a perplexity above `threshold` times the best before it, up to step `until`?

        The rule of arXiv 2108.06084, section 4, with its 1.3; in nats: loss > best + ln(threshold).
        """
        best = math.inf
        for step, loss in self.losses:
            if until is not None and step > until:
                return False
            if not loss <= best + math.log(threshold):
                return True
            best = min(best, loss)
        return self.diverged

    def worst(self) -> tuple[float, int]:
        """The largest perplexity over the best before it, and its step; infinite, and the last, where it diverged."""
        if self.diverged:
            return math.inf, self.losses[-1][0]
        best, worst = self.losses[0][1], (-math.inf, 0)
        for step, loss in self.losses[1:]:
            worst = max(worst, (loss - best, step), key=lambda pair: pair[0])
            best = min(best, loss)
        return math.exp(min(worst[0], 700.0)), worst[1]


def probing(config: Config, seqlen_start: int, duration_steps: int, tokens: int, probe_steps: int) -> Config:
    """The first `probe_steps` steps of `config` with another ramp; `tokens` are those of the whole run.

    The learning rate is that of the whole run: its decay still ends with `tokens`. Raises ConfigError where the
    config has no ramp.
    """
    data = ramped(config, seqlen_start, duration_steps)
    data["optimizer"] = {"decay_tokens": tokens} | data.get("optimizer", {})
    ends = parse_config(data, where="tune").schedule().tokens_before(probe_steps)
    if epochs := data["run"].pop("epochs", None):
        data["run"]["max_epochs"] = epochs
    data["run"] |= {"total_tokens": ends, "checkpoint_every_steps": -(-probe_steps // CHECKPOINTS)}
    data["run"] |= {"keep_checkpoints": 1, "keep_every_steps": None}
    return parse_config(data, where="tune")


def ramped(config: Config, seqlen_start: int, duration_steps: int) -> dict[str, Any]:
    """The settings given to `config`, with these two in the place of its own."""
    data = config.model_dump(mode="json", exclude_unset=True)
    curriculum = data["curriculum"]
    if curriculum.get("pacing", "constant") not in RAMPS:
        raise ConfigError(
            "only a ramp can be tuned",
            found=f"curriculum.pacing = {curriculum.get('pacing', 'constant')}",
            allowed=", ".join(RAMPS),
        )
    curriculum.pop("duration_tokens", None)
    curriculum |= {"seqlen_start": seqlen_start, "duration_steps": duration_steps}
    return data


class Probes:
    """The probes of one tuning: made when they are asked for, and never twice, even after a kill."""

    def __init__(
        self, config: Config, folder: Path, *, tokens: int, steps: int, every: int, warn: Callable[[str], None]
    ) -> None:
        self.config = config
        self.folder = folder
        self.tokens = tokens
        self.steps = steps
        self.every = every
        """Steps between validations."""
        self.warn = warn
        self.done = self._read()

    def __call__(self, seqlen_start: int, duration_steps: int) -> Probe:
        """What this choice shows. Raises RunError where its run fails otherwise than by divergence, or is stopped."""
        for probe in self.done:
            if (probe.seqlen_start, probe.duration_steps) == (seqlen_start, duration_steps):
                return probe
        folder = self.folder / f"start-{seqlen_start}-over-{duration_steps}-steps"
        data = probing(self.config, seqlen_start, duration_steps, self.tokens, self.steps)
        own = {"dir": folder, "validate_every_steps": self.every}
        config = data.model_copy(update={"run": data.run.model_copy(update=own)})
        self.warn(f"probe: start length {seqlen_start:,}, ramp over {duration_steps:,} steps")
        diverged = False
        try:
            finished = run(config, warn=self.warn).finished
        except NotFinite:
            finished = diverged = True
        if not finished:
            raise Stopped(self.folder)
        lines = [line for line in read_metrics(folder) if "validation_loss" in line]
        losses = [(line["step"], line["validation_loss"]) for line in lines]
        tokens = config.run.total_tokens or 0
        self.done.append(Probe(seqlen_start, duration_steps, losses, diverged, tokens))
        self._write()
        shutil.rmtree(folder)
        ratio, step = self.done[-1].worst()
        self.warn(f"  largest ratio of perplexities {ratio:.3f}, at step {step:,}")
        return self.done[-1]

    def _asked(self) -> dict[str, Any]:
        """What must be equal for kept probes to be of this tuning: all settings but those a probe replaces."""
        own = {"curriculum.seqlen_start", "curriculum.duration_steps", "curriculum.duration_tokens", *FREE_KEYS}
        asked = {key: value for key, value in flat(self.config).items() if key not in own}
        return asked | {"tune.steps": self.steps, "tune.every": self.every}

    def _read(self) -> list[Probe]:
        path = self.folder / KEPT_NAME
        if not path.is_file():
            return []
        kept, asked = json.loads(path.read_bytes()), self._asked()
        if odd := [key for key in asked if kept["asked"].get(key) != asked[key]]:
            raise RunError(
                "the folder holds a tuning with other settings",
                where=self.folder,
                found="; ".join(f"{key}: {kept['asked'].get(key)} there, {asked[key]} asked" for key in odd),
                remedy="choose another --out, or start over: --force",
            )
        return [Probe(**{**probe, "losses": [tuple(pair) for pair in probe["losses"]]}) for probe in kept["probes"]]

    def _write(self) -> None:
        temporary = self.folder / f".{KEPT_NAME}.partial"
        temporary.write_text(json.dumps({"asked": self._asked(), "probes": [asdict(p) for p in self.done]}, indent=1))
        temporary.replace(self.folder / KEPT_NAME)


class Stopped(Exception):
    """A signal has stopped a probe; the same command goes on."""
