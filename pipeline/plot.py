"""The lengths of a store's documents as a picture: by documents, by tokens, and what is shorter than each length."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import ConfigError
from pipeline.lengths import LengthCounts, merge
from pipeline.writer import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, told apart by the colour-blind."""
SUFFIXES = (".png", ".svg", ".pdf")
BINS_PER_DOUBLING = 4
MARKS = (0.1, 0.5, 0.9)


def check_picture(out: Path) -> None:
    """Raise ConfigError where OUT's name is not that of a picture: before the work whose picture it is to be."""
    if out.suffix.lower() not in SUFFIXES:
        found = f"the suffix {out.suffix!r}" if out.suffix else "no suffix"
        raise ConfigError("not a kind of picture", where=out, found=found, allowed=", ".join(SUFFIXES))


def save(figure: Figure, out: Path, *, dpi: int) -> None:
    """Write a figure as the picture OUT, whole or not at all.

    Raises ConfigError where OUT's name is not that of a picture, StoreError where it cannot be written.
    """
    check_picture(out)
    write_bytes(out, rendered(figure, out.suffix[1:].lower(), dpi=dpi))


def rendered(figure: Figure, form: str, **options: Any) -> bytes:
    """A figure as "png", "svg" or "pdf"."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format=form, **options)
    return drawn.getvalue()


def draw_lengths(sources: dict[str, LengthCounts], out: Path, title: str) -> None:
    """Write the picture OUT (.png, .svg, .pdf) of the lengths of each source.

    Raises ConfigError for another suffix, StoreError where it cannot be written.
    """
    from matplotlib.figure import Figure

    everything = merge(sources.values())
    longest = int(everything.length[-1])
    figure = Figure(figsize=(12, 8), layout="constrained")  # pyplot would choose a window system, and keep it
    axes = figure.subplot_mosaic("AB;CC", height_ratios=(1, 1.3))
    figure.suptitle(title)
    edges = _edges(longest)
    for name, by_tokens in (("A", False), ("B", True)):
        what = "tokens" if by_tokens else "documents"
        _histogram(axes[name], sources, everything, edges, by_tokens)
        axes[name].set_title(f"where the {what} are ({BINS_PER_DOUBLING} bars a doubling)")
        axes[name].set_ylabel(f"% of all {what}")
    _cumulative(axes["C"], sources, everything)
    axes["C"].set_title("what is in documents shorter than a length")
    axes["C"].set_ylabel("% in shorter documents")
    for panel in axes.values():
        panel.set_xlabel("tokens of a document")
        panel.set_xscale("log", base=2)
        panel.set_xlim(max(int(everything.length[0]), 1) / 1.1, max(longest, 2) * 1.1)
        panel.xaxis.set_major_formatter(lambda value, position: _short(value))
        panel.grid(alpha=0.3)
    save(figure, out, dpi=100)


def _histogram(
    panel: Axes, sources: dict[str, LengthCounts], everything: LengthCounts, edges: np.ndarray, by_tokens: bool
) -> None:
    """Sources stacked, so that the outline is the whole store."""
    total = everything.histogram(edges, by_tokens=by_tokens).sum()
    bottom = np.zeros(len(edges) - 1)
    for index, (source, lengths) in enumerate(sources.items()):
        share = 100 * lengths.histogram(edges, by_tokens=by_tokens) / total
        panel.stairs(
            bottom + share,
            edges,
            baseline=bottom,
            fill=True,
            color=COLOURS[index % len(COLOURS)],
            label=source or "no name",
        )
        bottom = bottom + share
    if set(sources) != {""}:
        panel.legend()


def _cumulative(panel: Axes, sources: dict[str, LengthCounts], everything: LengthCounts) -> None:
    """Shares of tokens as lines, of documents dotted; the lengths at which the whole store crosses MARKS."""
    if len(sources) > 1:
        for index, (source, lengths) in enumerate(sources.items()):
            _line(panel, lengths, True, color=COLOURS[index % len(COLOURS)], label=f"tokens of {source or 'no name'}")
    name = "" if len(sources) == 1 else " of all sources"
    _line(panel, everything, True, color="black", linewidth=2, label=f"tokens{name}")
    _line(panel, everything, False, color="black", linewidth=1, linestyle=":", label=f"documents{name}")
    shortest, longest = float(everything.length[0]), float(everything.length[-1])
    far = shortest * (longest / shortest) ** 0.75  # three quarters along the axis, which is logarithmic
    for share in MARKS:
        at = everything.quantile(share, by_tokens=True)
        right = at > far  # then the room is to its left
        panel.plot([at], [100 * share], marker="o", color="black", markersize=5)
        panel.annotate(
            f"{100 * share:.0f} % of the tokens: up to {at:,}",
            (at, 100 * share),
            xytext=(-8, 4) if right else (8, -4),
            textcoords="offset points",
            ha="right" if right else "left",
            va="bottom" if right else "top",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1},
        )
    panel.set_ylim(0, 100)
    panel.legend(loc="upper left")


def _line(panel: Axes, lengths: LengthCounts, by_tokens: bool, **style: Any) -> None:
    at = np.unique(np.geomspace(1, int(lengths.length[-1]) + 1, 500).round().astype(np.int64))
    panel.plot(at, 100 * lengths.shorter(at, by_tokens=by_tokens), **style)


def _edges(longest: int) -> np.ndarray:
    """int64: BINS_PER_DOUBLING bins each time the length doubles, of whole lengths."""
    doublings = int(longest).bit_length()
    edges: np.ndarray = np.unique(
        np.ceil(2 ** (np.arange(doublings * BINS_PER_DOUBLING + 1) / BINS_PER_DOUBLING)).astype(np.int64)
    )
    return edges


def _short(value: float) -> str:
    """1, 512, 4K, 1M: powers of two as people write them."""
    for size, letter in ((1 << 20, "M"), (1 << 10, "K")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
