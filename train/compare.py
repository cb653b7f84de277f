"""Runs side by side, several seeds of one arm together: losses, targets reached, how stable each was.

Arms are compared on full-length validation loss only: a training loss is that of its step's length.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from train.figures import SPIKE_RATIOS, Curves, Figures, figures, reached, read_curves
from train.folder import FREE_KEYS
from train.statistics import Mean, mean_of

SAME_ARM = (FREE_KEYS - {"run.validate_every_steps"}) | {"run.seed"}
"""Settings in which runs of one arm may differ."""


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed alone, or one run."""

    name: str
    curves: list[Curves]
    figures: list[Figures]
    tokens_to_target: Mean | None
    """None where a run did not reach it, or nothing was validated."""
    seconds_to_target: Mean | None
    fewer_tokens: float | None
    """Tokens to the target of the first arm, over those of this one: 2.2 is "2.2x fewer tokens"."""
    less_time: float | None

    def known(self, name: str) -> list[Any]:
        """A figure of each run that has it."""
        return [value for figure in self.figures if (value := getattr(figure, name)) is not None]

    def mean(self, name: str) -> Mean | None:
        """Mean of a figure over the runs that have it; None where none has."""
        values = self.known(name)
        return mean_of(values) if values else None

    def spikes(self, bound: float) -> Mean:
        """Mean number of steps with a larger loss ratio."""
        return mean_of([figure.spikes[f"{bound:g}"] for figure in self.figures])

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        means = ("validation_loss", "validation_loss_best", "tokens", "seconds", "loss_ratio_max", "variance_max")
        return {
            "arm": self.name,
            "runs": [figure.run for figure in self.figures],
            **{name: _json(self.mean(name)) for name in means},
            "spikes": {f"{bound:g}": _json(self.spikes(bound)) for bound in SPIKE_RATIOS},
            "tokens_to_target": _json(self.tokens_to_target),
            "seconds_to_target": _json(self.seconds_to_target),
            "fewer_tokens": self.fewer_tokens,
            "less_time": self.less_time,
        }


@dataclass(frozen=True)
class Comparison:
    """Arms in the order of their first runs; the first is the baseline."""

    arms: list[Arm]
    target: float | None
    """Validation loss to reach; None where nothing was validated."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: arms, and every run for itself."""
        runs = [{"arm": arm.name, **asdict(figure)} for arm in self.arms for figure in arm.figures]
        return {"target": self.target, "arms": [arm.to_json() for arm in self.arms], "runs": runs}


def compare(runs: Sequence[Path], *, target: float | None = None, each: bool = False) -> Comparison:
    """Read the runs, put those that differ in their seed alone together (unless `each`), and measure them.

    A second run of a seed is no further sample: it is of an arm of its own.
    `target`: by default the worst run's last validation loss, which all have reached. Raises RunError for a run
    without a finished step or with damaged metrics.
    """
    read = [read_curves(run) for run in dict.fromkeys(runs)]
    groups: dict[object, list[Curves]] = {}
    seen: Counter[object] = Counter()
    for curves in read:
        key = curves.run if each else _arm_key(curves)
        sample = key, curves.config.get("run.seed")
        groups.setdefault((key, seen[sample]), []).append(curves)
        seen[sample] += 1
    last = [curves.validations[-1]["validation_loss"] for curves in read if curves.validations]
    if target is None:
        target = max((loss for loss in last if math.isfinite(loss)), default=None)
    names = _names([[curves.run for curves in group] for group in groups.values()])
    tokens = [_to_target(group, target, "tokens_seen") for group in groups.values()]
    seconds = [_to_target(group, target, "elapsed_s") for group in groups.values()]
    arms = [
        Arm(
            name=name,
            curves=group,
            figures=[figures(curves) for curves in group],
            tokens_to_target=in_tokens,
            seconds_to_target=in_seconds,
            fewer_tokens=_times(tokens[0], in_tokens),
            less_time=_times(seconds[0], in_seconds),
        )
        for name, group, in_tokens, in_seconds in zip(names, groups.values(), tokens, seconds, strict=True)
    ]
    return Comparison(arms, target)


def _arm_key(curves: Curves) -> object:
    """What runs of one arm have in common; a run whose settings are unknown is alone."""
    if not curves.config:
        return curves.run
    return tuple(sorted((key, repr(value)) for key, value in curves.config.items() if key not in SAME_ARM))


def _names(groups: Sequence[Sequence[Path]]) -> list[str]:
    """Names of arms: what their paths do not share. runs/slw/seed-1 and -2, runs/constant/seed-1: slw, constant."""
    paths = [run.parts for group in groups for run in group]
    shared = [part for part in paths[0] if all(part in parts for parts in paths)] if len(paths) > 1 else []
    names: list[str] = []
    for group in groups:
        parts = [part for part in group[0].parts if all(part in run.parts for run in group) and part not in shared]
        name = "/".join(parts) if len(paths) > 1 and parts else _common([run.name for run in group])
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    return names


def _common(names: Sequence[str]) -> str:
    """slw-1, slw-2: slw."""
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in same).rstrip("-_. ") or names[0]


def _to_target(group: Iterable[Curves], target: float | None, of: str) -> Mean | None:
    """Mean over a group's runs of `reached`; None unless all reached it."""
    values = [reached(curves, target, of) if target is not None else None for curves in group]
    known = [value for value in values if value is not None]
    return mean_of(known) if len(known) == len(values) else None


def _times(first: Mean | None, this: Mean | None) -> float | None:
    return first.mean / this.mean if first and this and this.mean > 0 else None


def _json(mean: Mean | None) -> dict[str, Any] | None:
    return asdict(mean) if mean else None
