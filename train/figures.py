"""What the metrics of one run come to: its losses, how stable it was, when it reached a target.

Loss ratio and Adam's variance are those of arXiv 2108.06084, section 3; see `train.stability`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.errors import RunError
from train.folder import CONFIG_NAME
from train.metrics import METRICS_NAME, read_metrics
from train.stability import SPIKE_RATIO
from train.statistics import Correlation, correlation

SPIKE_RATIOS = (1.1, SPIKE_RATIO, 1.5, 2.0)
"""Spikes are counted above each."""
NEEDED: tuple[str, ...] = ("step", "tokens_seen", "elapsed_s")
NEEDED_OF_A_STEP = ("seqlen", "loss_ratio", "loss_ratio_overall", "variance_l1", "variance_max")


@dataclass(frozen=True)
class Curves:
    """The metrics of a run, and its settings."""

    run: Path
    steps: list[dict[str, Any]]
    """Lines of updates, one or more, in order."""
    validations: list[dict[str, Any]]
    """Lines with a validation at full length, in order; perhaps none."""
    config: dict[str, Any]
    """RUN/config.json, flat: {"run.seed": 1, ...}; empty where it is missing or damaged."""


@dataclass(frozen=True)
class Figures:
    """The last word on a run."""

    run: str
    seed: int | None
    steps: int
    tokens: int
    seconds: float
    """Training alone."""
    share: float | None
    """Tokens seen over tokens planned, at most 1; None where the config tells no number of tokens."""
    validation_loss: float | None
    """The last, at full length, nats a token; None before the first validation, or where it was not finite."""
    validation_loss_best: float | None
    loss_ratio_max: float | None
    """Largest, each length compared with itself; None where none is finite."""
    loss_ratio_overall_max: float | None
    """The same against the least loss at any length."""
    spikes: dict[str, int]
    """{"1.2": steps with a larger loss ratio, ...}."""
    variance_l1_max: float | None
    variance_max: float | None
    """Largest element of sqrt(v) at any step."""
    clipped: float | None
    """Share of the steps whose gradient was clipped."""
    ratio_with_variance_l1: Correlation | None
    """Over steps; None where a side is constant or there are fewer than three steps."""
    ratio_with_variance_max: Correlation | None


def read_curves(run: Path) -> Curves:
    """Raises RunError where `run` is no run, has no finished step yet, or its metrics are damaged."""
    lines = read_metrics(run)
    for number, line in enumerate(lines, 1):
        keys = line if isinstance(line, dict) else {}
        needed = (*NEEDED, *((*NEEDED_OF_A_STEP, "loss") if "loss" in keys else ()))
        needed += ("validation_loss",) if "validation_loss" in keys else ()
        if not all(isinstance(keys.get(key), int | float) for key in needed):
            raise RunError(
                "not a line of metrics",
                where=f"{run / METRICS_NAME}:{number}",
                found=json.dumps(line)[:80],
                allowed=f"an object with the numbers {', '.join(needed)}",
                remedy="delete that line and what follows, or leave the run out",
            )
    steps = [line for line in lines if "loss" in line]
    if not steps:
        raise RunError("the run has no step yet", where=run, remedy="go on with it: slw-train run CONFIG.toml")
    return Curves(run, steps, [line for line in lines if "validation_loss" in line], _config(run))


def figures(curves: Curves) -> Figures:
    """The figures of a run, finished or not."""
    steps, config = curves.steps, curves.config
    losses = [line["validation_loss"] for line in curves.validations if math.isfinite(line["validation_loss"])]
    ratios = [line["loss_ratio"] for line in steps]
    clipped = [line["clipped"] for line in steps if "clipped" in line]
    asked = config.get("run.total_tokens")
    return Figures(
        run=str(curves.run),
        seed=config.get("run.seed"),
        steps=steps[-1]["step"],
        tokens=steps[-1]["tokens_seen"],
        seconds=steps[-1]["elapsed_s"],
        share=min(steps[-1]["tokens_seen"] / asked, 1.0) if asked else None,
        validation_loss=losses[-1] if losses and losses[-1] == curves.validations[-1]["validation_loss"] else None,
        validation_loss_best=min(losses, default=None),
        loss_ratio_max=_largest(ratios),
        loss_ratio_overall_max=_largest(line["loss_ratio_overall"] for line in steps),
        spikes={f"{bound:g}": sum(not ratio <= bound for ratio in ratios) for bound in SPIKE_RATIOS},
        variance_l1_max=_largest(line["variance_l1"] for line in steps),
        variance_max=_largest(line["variance_max"] for line in steps),
        clipped=sum(share > 0 for share in clipped) / len(clipped) if clipped else None,
        ratio_with_variance_l1=correlation(ratios, [line["variance_l1"] for line in steps]),
        ratio_with_variance_max=correlation(ratios, [line["variance_max"] for line in steps]),
    )


def reached(curves: Curves, target: float, of: str = "tokens_seen") -> float | None:
    """`tokens_seen` or `elapsed_s` at which validation first came down to `target`; None where it did not.

    Linear between the two validations around it.
    """
    if curves.validations and curves.validations[0]["validation_loss"] <= target:
        return float(curves.validations[0][of])
    for before, after in pairwise(curves.validations):
        high, low = before["validation_loss"], after["validation_loss"]
        if low <= target:
            if not math.isfinite(high):
                return float(after[of])
            return float(before[of] + (after[of] - before[of]) * (high - target) / (high - low))
    return None


def _largest(values: Iterable[float]) -> float | None:
    """The largest that is finite."""
    return max((value for value in values if math.isfinite(value)), default=None)


def _config(run: Path) -> dict[str, Any]:
    try:
        config = json.loads((run / CONFIG_NAME).read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
