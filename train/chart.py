"""A plan as a picture: lengths over steps and over tokens, batches, the learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from curriculum.plan import Stretch, stretches
from curriculum.schedule import Schedule
from pipeline.plot import COLOURS, save
from train.config import Config
from train.forecast import Forecast
from train.optimizer import learning_rate

POINTS = 600
"""Steps at which a curve is drawn."""
LINE = "0.35"
"""The curves are grey: colours are for the landmarks."""


def draw(config: Config, schedule: Schedule, what: Forecast, out: Path) -> None:
    """Write the picture OUT (.png, .svg, .pdf). See `save`."""
    from matplotlib.figure import Figure

    parts = stretches(schedule)
    unit, scale = _scaled(what.plan.total_tokens)
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    _lengths_over_steps(axes[0, 0], parts, what)
    if what.plan.take_turns:
        _shares(axes[0, 1], what)
    else:
        _lengths_over_tokens(axes[0, 1], parts, schedule, scale, what)
    _batches(axes[1, 0], parts, schedule, scale)
    _rates(axes[1, 1], config, schedule, scale, what)
    for panel in (*axes[1], *([] if what.plan.take_turns else [axes[0, 1]])):
        panel.set_xlabel(f"tokens ({unit})" if unit else "tokens")
        panel.set_xlim(0, what.plan.total_tokens / scale)
    for panel in axes.flat:
        panel.grid(alpha=0.3)
        panel.set_axisbelow(True)
        panel.set_ylim(bottom=0)
    for panel in (*axes[0], axes[1, 0]):
        panel.yaxis.set_major_formatter("{x:,.0f}")
    axes[0, 0].xaxis.set_major_formatter("{x:,.0f}")
    plan = what.plan
    figure.suptitle(
        f"{plan.total_steps:,} steps, {plan.total_tokens:,} tokens, {plan.epochs:.2f} epochs, "
        f"{len(plan.lengths)} lengths, at most {what.cost.flops:.2g} FLOPs"
    )
    save(figure, out, dpi=90)


def _scaled(tokens: int) -> tuple[str, float]:
    for unit, scale in (("billions", 1e9), ("millions", 1e6)):
        if tokens >= scale:
            return unit, scale
    return "", 1.0


def _lengths_over_steps(panel: Any, parts: list[Stretch], what: Forecast) -> None:
    panel.set_title("sequence length over steps")
    panel.set_xlabel("step")
    panel.set_xlim(0, what.plan.total_steps)
    if what.plan.take_turns:
        chosen = parts[:: max(1, len(parts) // 4000)]
        xs, ys = [part.phase.first_step for part in chosen], [part.phase.seqlen for part in chosen]
        panel.plot(xs, ys, ".", markersize=2, color=LINE)
        return
    edges = [part.phase.first_step for part in parts] + [parts[-1].end]
    _steps(panel, edges, parts)
    _marks(panel, [(mark.step, mark.seqlen) for mark in what.landmarks])


def _lengths_over_tokens(panel: Any, parts: list[Stretch], schedule: Schedule, scale: float, what: Forecast) -> None:
    panel.set_title("sequence length over tokens")
    _steps(panel, _token_edges(parts, schedule, scale), parts)
    _marks(panel, [(mark.tokens_before / scale, mark.seqlen) for mark in what.landmarks])


def _steps(panel: Any, edges: list[Any], parts: list[Stretch]) -> None:
    panel.stairs([part.phase.seqlen for part in parts], edges, baseline=None, color=LINE, linewidth=1.8)
    if any(part.phase.reach < part.phase.seqlen for part in parts):
        reach = [part.phase.reach for part in parts]
        panel.stairs(reach, edges, baseline=None, color=LINE, linestyle="--", label="attention window")
        panel.legend(loc="lower right")


def _marks(panel: Any, marks: list[tuple[float, float]]) -> None:
    """A dot at each landmark, in its colour of the panel of rates, which names them."""
    for index, (x, y) in enumerate(marks):
        panel.plot([x], [y], "o", color=COLOURS[index % len(COLOURS)], clip_on=False, zorder=3)


def _shares(panel: Any, what: Forecast) -> None:
    panel.set_title("share of the tokens by sequence length")
    lengths = what.plan.lengths
    panel.bar(range(len(lengths)), [100 * part.share for part in lengths], color=LINE)
    panel.set_xticks(range(len(lengths)), [f"{part.seqlen:,}" for part in lengths], rotation=45)
    panel.set_ylabel("%")


def _batches(panel: Any, parts: list[Stretch], schedule: Schedule, scale: float) -> None:
    panel.set_title("tokens a batch")
    sizes = [part.phase.batch_tokens for part in parts]
    panel.stairs(sizes, _token_edges(parts, schedule, scale), baseline=None, color=LINE, linewidth=1.8)


def _rates(panel: Any, config: Config, schedule: Schedule, scale: float, what: Forecast) -> None:
    panel.set_title("learning rate")
    total, steps = schedule.total_tokens or 1, schedule.total_steps
    warm = np.linspace(0, min(config.optimizer.warmup_steps, steps - 1), POINTS // 4)
    chosen = np.unique(np.concatenate([warm, np.linspace(0, steps - 1, POINTS)]).astype(int)).tolist()
    tokens = [schedule.tokens_before(step) for step in chosen]
    rates = [learning_rate(config.optimizer, s, t, total) for s, t in zip(chosen, tokens, strict=True)]
    panel.plot([t / scale for t in tokens], rates, color=LINE, linewidth=1.8)
    for index, mark in enumerate(what.landmarks):
        x = mark.tokens_before / scale
        label = f"{mark.name}: {mark.lr:.2g}"
        panel.plot([x], [mark.lr], "o", color=COLOURS[index % len(COLOURS)], label=label, clip_on=False, zorder=3)
    panel.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    panel.legend()


def _token_edges(parts: list[Stretch], schedule: Schedule, scale: float) -> list[float]:
    edges = [part.phase.first_step for part in parts] + [parts[-1].end]
    return [schedule.tokens_before(step) / scale for step in edges]
