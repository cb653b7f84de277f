"""A comparison as a picture: the paper's figures, one colour an arm.

Several runs of an arm are their mean and, as a band, the range from the least to the largest, over the steps that all
have. Long curves are thinned: losses to means, ratios and variances to the largest of neighbouring steps, so that no
spike is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.plot import COLOURS, check_picture, rendered
from pipeline.writer import write_bytes
from train.compare import Arm, Comparison
from train.figures import SPIKE_RATIOS
from train.stability import SPIKE_RATIO

POINTS = 1000
"""Most points of a curve."""
DASHES = ("-", "--", ":", "-.")
STEPWISE = (
    ("loss", "training loss at the current length", np.mean),
    ("loss_ratio", "loss ratio, largest of neighbours", np.max),
    ("variance_l1", "Adam's variance: l1 norm of sqrt(v)", np.max),
    ("variance_max", "Adam's variance: largest of sqrt(v)", np.max),
)


def draw(comparison: Comparison, out: Path) -> None:
    """Write the picture OUT (.png, .svg, .pdf).

    Raises ConfigError where OUT's name is not that of a picture, StoreError where it cannot be written.
    """
    check_picture(out)
    write_bytes(out, picture(comparison, out.suffix[1:].lower()))


def picture(comparison: Comparison, form: str) -> bytes:
    """The picture as "png", "svg" or "pdf"; the same bytes for the same runs."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(16, 12), layout=ConstrainedLayoutEngine(hspace=0.05))
    axes = figure.subplots(3, 3)
    unit, scale = _unit(comparison)
    by_tokens = (f"tokens ({unit})" if unit else "tokens", "tokens_seen", scale)
    _validation(axes[0, 0], comparison, *by_tokens)
    _validation(axes[0, 1], comparison, "steps", "step", 1)
    _validation(axes[0, 2], comparison, "training time (s)", "elapsed_s", 1)
    _lengths(axes[1, 0], comparison, *by_tokens)
    for panel, (key, title, thin) in zip((axes[1, 1], axes[1, 2], axes[2, 0], axes[2, 1]), STEPWISE, strict=True):
        _stepwise(panel, comparison, key, thin, *by_tokens)
        panel.set_title(title)
    axes[1, 1].set_ylabel("nats a token")
    axes[1, 2].axhline(SPIKE_RATIO, color="grey", linestyle=":", linewidth=1)
    for panel in (axes[1, 2], axes[2, 0], axes[2, 1]):
        panel.set_yscale("log")
    axes[1, 2].yaxis.set_major_formatter("{x:g}")
    axes[1, 2].yaxis.set_minor_formatter("{x:g}")
    _spikes(axes[2, 2], comparison)
    for panel in axes.flat:
        panel.grid(alpha=0.3)
        panel.set_axisbelow(True)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), fontsize=11)
    with mpl.rc_context({"svg.hashsalt": "slw"}):
        dated = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
        return rendered(figure, form, dpi=90, metadata=dated[form])


def _style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index // len(COLOURS) % len(DASHES)]}


def _validation(panel: Any, comparison: Comparison, label: str, x: str, scale: float) -> None:
    """Validation loss over x; a tick where an arm first trained at its longest length, a line at the target."""
    shown: list[float] = []
    for index, arm in enumerate(comparison.arms):
        found = [curves.validations for curves in arm.curves if curves.validations]
        name = arm.name + (f" ({len(arm.curves)} runs)" if len(arm.curves) > 1 else "")
        if not found:
            panel.plot([], [], label=name, **_style(index))
            continue
        xs, low, mean, high = _bands(found, x, "validation_loss", np.mean)
        panel.plot(xs / scale, mean, label=name, marker="o", markersize=3, linewidth=1.5, **_style(index))
        _band(panel, xs / scale, low, high, index)
        grown = _full_length(arm, x)
        if grown is not None:
            at = np.interp(grown, xs, mean)
            panel.plot([grown / scale], [at], marker="|", markersize=16, markeredgewidth=2, **_style(index))
        shown += [value for row in (low, high) for value in row[len(row) // 5 :] if np.isfinite(value)]
    if shown:
        room = 0.06 * (max(shown) - min(shown)) or 0.1
        panel.set_ylim(min(shown) - room, max(shown) + room)
    if comparison.target is not None:
        panel.axhline(comparison.target, color="grey", linestyle=":", linewidth=1)
    panel.set_title("validation loss, full length" + ("; | full length reached" if x == "tokens_seen" else ""))
    panel.set_xlabel(label)
    panel.set_ylabel("nats a token")


def _lengths(panel: Any, comparison: Comparison, label: str, x: str, scale: float) -> None:
    """Sequence length; attention windows, where there are any, dotted."""
    longest = 1
    for index, arm in enumerate(comparison.arms):
        steps = arm.curves[0].steps
        xs = np.array([line[x] for line in steps]) / scale
        lengths = np.array([line["seqlen"] for line in steps])
        longest = max(longest, int(lengths.max()))
        aside = 1 - 0.012 * index  # so that equal lengths can be told apart
        panel.plot(xs, lengths * aside, drawstyle="steps-post", linewidth=1.5, **_style(index))
        if any("attention_window" in line for line in steps):
            windows = np.array([line.get("attention_window") or line["seqlen"] for line in steps])
            panel.plot(xs, windows * aside, linewidth=1.2, color=_style(index)["color"], linestyle=(0, (1, 1)))
    panel.set_yscale("log", base=2)
    panel.yaxis.set_major_formatter("{x:,.0f}")
    panel.set_ylim(top=longest * 1.15)
    panel.set_title("sequence length (dotted: attention window)")
    panel.set_xlabel(label)


def _stepwise(panel: Any, comparison: Comparison, key: str, thin: Any, label: str, x: str, scale: float) -> None:
    for index, arm in enumerate(comparison.arms):
        xs, low, mean, high = _bands([curves.steps for curves in arm.curves], x, key, thin)
        panel.plot(xs / scale, mean, linewidth=1, **_style(index))
        _band(panel, xs / scale, low, high, index)
        grown = _full_length(arm, x)
        if grown is not None:
            panel.axvline(grown / scale, linewidth=0.8, alpha=0.5, color=_style(index)["color"], linestyle=":")
    panel.set_xlabel(label)


def _spikes(panel: Any, comparison: Comparison) -> None:
    """Bars: steps above each bound, mean of a run."""
    count = len(comparison.arms)
    width = 0.8 / count
    for index, arm in enumerate(comparison.arms):
        at = np.arange(len(SPIKE_RATIOS)) + (index - (count - 1) / 2) * width
        means = [arm.spikes(bound).mean for bound in SPIKE_RATIOS]
        bars = panel.bar(at, means, width, color=_style(index)["color"], hatch="/" * (index // len(COLOURS)))
        if count <= 4:
            panel.bar_label(bars, fmt="{:g}", fontsize=8)
    panel.set_xticks(range(len(SPIKE_RATIOS)), [f"> {bound:g}" for bound in SPIKE_RATIOS])
    most, room = max(arm.spikes(SPIKE_RATIOS[0]).mean for arm in comparison.arms), 1.1
    if most > 50:
        panel.set_yscale("symlog", linthresh=1)
        panel.yaxis.set_major_formatter("{x:g}")
        room = 2
    panel.set_ylim(0, max(most, 1) * room)
    panel.set_title("spikes: steps with a larger loss ratio, mean of a run")


def _band(panel: Any, xs: Any, low: Any, high: Any, index: int) -> None:
    if (low < high).any():
        panel.fill_between(xs, low, high, color=_style(index)["color"], alpha=0.15, linewidth=0)


def _bands(
    runs: list[list[dict[str, Any]]], x: str, y: str, thin: Callable[..., Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """float64 [points] each: x, and the least, mean and largest y of the runs at the steps that all have."""
    by_step = [{line["step"]: line for line in lines} for lines in runs]
    steps = sorted(set.intersection(*(set(lines) for lines in by_step)))
    xs = np.array([[lines[step][x] for step in steps] for lines in by_step], dtype=np.float64)
    ys = np.array([[lines[step][y] for step in steps] for lines in by_step], dtype=np.float64)
    if len(steps) > POINTS:
        edges = np.linspace(0, len(steps), POINTS + 1).astype(int)
        parts = [slice(a, b) for a, b in pairwise(edges.tolist())]
        xs = np.stack([xs[:, part].mean(1) for part in parts], 1)
        ys = np.stack([thin(ys[:, part], axis=1) for part in parts], 1)
    return xs.mean(0), ys.min(0), ys.mean(0), ys.max(0)


def _full_length(arm: Arm, x: str) -> float | None:
    """x at the first step of the longest length or window, from which on it stays; None where that is the first."""
    steps = arm.curves[0].steps
    reach = [line.get("attention_window") or line["seqlen"] for line in steps]
    first = len(reach)
    while first and reach[first - 1] == max(reach):
        first -= 1
    return float(steps[first][x]) if 0 < first < len(steps) and reach == sorted(reach) else None


def _unit(comparison: Comparison) -> tuple[str, float]:
    most = max(figure.tokens for arm in comparison.arms for figure in arm.figures)
    for unit, scale in (("billions", 1e9), ("millions", 1e6), ("thousands", 1e3)):
        if most >= scale:
            return unit, scale
    return "", 1.0
