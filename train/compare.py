"""Runs side by side: a picture and a table. Arms are compared on full-length validation loss only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import RunError
from pipeline.plot import COLOURS
from train.metrics import read_metrics
from train.stability import SPIKE_RATIO

PANELS = (
    ("tokens", "validation_loss", "validation loss, full length"),
    ("seconds", "validation_loss", "validation loss, full length"),
    ("tokens", "seqlen", "sequence length"),
    ("tokens", "loss", "training loss at the current length"),
    ("tokens", "loss_ratio", "loss ratio"),
    ("tokens", "variance_max", "largest Adam variance, sqrt(v)"),
)


def summarise(run: Path) -> dict[str, Any]:
    """The last line of a table: plain JSON values. Raises RunError where `run` holds no finished step."""
    lines = read_metrics(run)
    steps = [line for line in lines if "loss" in line]
    validations = [line["validation_loss"] for line in lines if "validation_loss" in line]
    if not steps:
        raise RunError("the run has no step yet", where=run, remedy="go on with it: slw-train run CONFIG.toml")
    return {
        "run": str(run),
        "steps": steps[-1]["step"],
        "tokens": steps[-1]["tokens_seen"],
        "seconds": steps[-1]["elapsed_s"],
        "validation_loss": validations[-1] if validations else None,
        "validation_loss_best": min(validations, default=None),
        "spikes": sum(line["loss_ratio"] > SPIKE_RATIO for line in steps),
        "loss_ratio_max": max(line["loss_ratio"] for line in steps),
        "variance_max": max(line["variance_max"] for line in steps),
    }


def render(rows: Sequence[dict[str, Any]]) -> str:
    """The summaries as a table."""
    heads = ("run", "steps", "tokens", "seconds", "validation loss", "best", "spikes", "max ratio", "max variance")
    table = [heads]
    for row in rows:
        losses = [f"{row[k]:.4f}" if row[k] is not None else "-" for k in ("validation_loss", "validation_loss_best")]
        cells = (row["run"], f"{row['steps']:,}", f"{row['tokens']:,}", f"{row['seconds']:.0f}", *losses)
        table.append((*cells, str(row["spikes"]), f"{row['loss_ratio_max']:.2f}", f"{row['variance_max']:.2e}"))
    widths = [max(len(line[i]) for line in table) for i in range(len(heads))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in table
    )


def draw(runs: Sequence[Path], out: Path) -> None:
    """Write the picture OUT (.png, .svg, .pdf). Raises RunError where it cannot be written."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    for panel, (x, y, title) in zip(axes.flat, PANELS, strict=True):
        for index, run in enumerate(runs):
            lines = [line for line in read_metrics(run) if y in line]
            xs = [line["tokens_seen"] / 1e6 if x == "tokens" else line["elapsed_s"] for line in lines]
            style = {"marker": "o", "markersize": 3} if y == "validation_loss" else {"linewidth": 1}
            panel.plot(xs, [line[y] for line in lines], color=COLOURS[index % len(COLOURS)], label=run.name, **style)
        panel.set_title(title)
        panel.set_xlabel("tokens (millions)" if x == "tokens" else "training time (s)")
        panel.set_ylabel("nats a token" if y in ("loss", "validation_loss") else "")
        panel.grid(alpha=0.3)
        if y in ("variance_max", "loss_ratio"):
            panel.set_yscale("log")
        if y == "loss_ratio":
            panel.axhline(SPIKE_RATIO, color="grey", linestyle=":", linewidth=1)
        panel.legend()
    try:
        figure.savefig(out, dpi=90)
    except (OSError, ValueError) as error:
        raise RunError("cannot write the picture", where=out, found=error, allowed=".png, .svg or .pdf") from error
    finally:
        plt.close(figure)
