"""The tables and the picture of a study's results: see study.py."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any

from pipeline.errors import RunError
from pipeline.plot import COLOURS
from train.statistics import CONFIDENCE, holm, mean_of, p_of

BAR = 0.5
TABLE_NAME, JSON_NAME, PICTURE_NAME = "table.md", "table.json", "study.png"
MARKERS = "osD^vP*X<>h"
REFERENCES = ("slw", "batch-warmup")
"""Arms that, beside the first, every other is compared with, where the study has them."""
Results = list[dict[str, Any]]


def report(results: Results, out: Path, bar: float = BAR) -> dict[str, Any]:
    """Write table.md, table.json and study.png into `out`; returns what table.json holds."""
    if not results:
        raise RunError("the study has no result yet", where=out, remedy="run it: --store, --arms, --lrs, --seeds")
    summary = summarise(results, bar)
    (out / JSON_NAME).write_text(json.dumps(summary, indent=1) + "\n")
    (out / TABLE_NAME).write_text(as_markdown(summary))
    draw(summary, out / PICTURE_NAME)
    return summary


def summarise(results: Results, bar: float) -> dict[str, Any]:
    """Plain JSON values: for each arm what each rate came to, its best rate, the largest that trains."""
    arms = list(dict.fromkeys(result["arm"] for result in results))
    cells = {
        arm: {
            lr: [r for r in results if r["arm"] == arm and r["lr"] == lr]
            for lr in sorted({r["lr"] for r in results if r["arm"] == arm})
        }
        for arm in arms
    }
    made = {arm: arm_summary(rates, bar) for arm, rates in cells.items()}
    references = list(dict.fromkeys([arms[0], *(arm for arm in REFERENCES if arm in arms)]))
    for arm in arms:
        made[arm]["less"] = {other: difference(cells, made, arm, other) for other in references}
    pairs: dict[frozenset[str], list[dict[str, Any]]] = {}  # two references are compared both ways: one question
    for arm in arms:
        for other, less in made[arm]["less"].items():
            if less and less["p"] is not None:
                pairs.setdefault(frozenset((arm, other)), []).append(less)
    for sides, p in zip(pairs.values(), holm([sides[0]["p"] for sides in pairs.values()]), strict=True):
        for less in sides:
            less["p_holm"] = p
    return {"bar": bar, "runs": len(results), "references": references, "arms": made}


def arm_summary(rates: dict[float, Results], bar: float) -> dict[str, Any]:
    """One arm: its best rate, and the largest of `rates`, in order, up to which no seed failed.

    A run has failed where its loss is not finite, or at a rate above the best ends `bar` above the mean there.
    """
    means = {
        lr: math.fsum(losses_of(cell)) / len(cell) for lr, cell in rates.items() if len(losses_of(cell)) == len(cell)
    }
    best = min(means, key=lambda lr: means[lr], default=None)
    limit = means[best] + bar if best is not None else math.inf
    rows = {
        lr: cell_summary(cell, limit if best is not None and lr > best else math.inf) for lr, cell in rates.items()
    }
    sound = list(takewhile(lambda lr: rows[lr]["failed"] == 0, rows))
    return {
        "rates": [{"lr": lr, **row} for lr, row in rows.items()],
        "best_lr": best,
        "limit": limit if best is not None else None,
        "largest_lr": max(sound, default=None),
    }


def cell_summary(cell: Results, limit: float) -> dict[str, Any]:
    """One arm at one rate: over its seeds."""
    losses = losses_of(cell)

    def largest(key: str) -> float | None:
        return max((r[key] for r in cell if r.get(key) is not None), default=None)

    def mean(of: Callable[[dict[str, Any]], float | None]) -> dict[str, Any] | None:
        values = [value for r in cell if (value := of(r)) is not None and math.isfinite(value)]
        return asdict(mean_of(values)) if values else None

    return {
        "seeds": [r["seed"] for r in cell],
        "failed": sum(r["validation_loss"] is None or not r["validation_loss"] <= limit for r in cell),
        "not_finite": sum(r["status"] != "finished" for r in cell),
        "validation_loss": mean(lambda r: r["validation_loss"]),
        "losses": losses,
        "spikes": mean(lambda r: r["spikes"]["1.2"] if r.get("spikes") else None),
        "spike_share": mean(lambda r: r["spikes"]["1.2"] / r["steps"] if r.get("spikes") else None),
        "loss_ratio_max": largest("loss_ratio_max"),
        "loss_ratio_overall_max": largest("loss_ratio_overall_max"),
        "variance_max": mean(lambda r: r["variance_max"]),
        "seconds": mean(lambda r: r["seconds"]),
        "tokens": largest("tokens"),
    }


def difference(cells: dict[str, Any], made: dict[str, Any], arm: str, other: str) -> dict[str, Any] | None:
    """Loss of `arm` less that of `other`, each at its best rate, seed by seed over those both have.

    `p`: two-sided, of no difference; None of one pair. `p_holm`, where it has been set: among all of a study.
    """
    if arm == other or made[arm]["best_lr"] is None or made[other]["best_lr"] is None:
        return None
    here, there = (
        {r["seed"]: r["validation_loss"] for r in cells[name][made[name]["best_lr"]]} for name in (arm, other)
    )
    pairs = [here[seed] - there[seed] for seed in here if seed in there]
    if not pairs:
        return None
    mean = mean_of(pairs)
    return {**asdict(mean), "p": p_of(mean), "p_holm": None}


def losses_of(cell: Results) -> list[float]:
    return [
        r["validation_loss"] for r in cell if r["validation_loss"] is not None and math.isfinite(r["validation_loss"])
    ]


def as_markdown(summary: dict[str, Any]) -> str:
    """Tables with what they mean."""
    arms, references = summary["arms"], summary["references"]
    rates = sorted({row["lr"] for arm in arms.values() for row in arm["rates"]})
    lines = [
        f"{summary['runs']} runs. Validation loss at full length, nats a token: mean ± half of its 95 % t-interval "
        "over seeds (n). A run has *failed* where its loss is not finite, or where, at a rate above its arm's best, "
        f"it ends more than {summary['bar']:g} nats above the mean there; a rate *trains* where no seed failed there "
        "or at a lower one. Differences are seed by seed, each arm at its best rate; *slanted* where their interval "
        "leaves out 0, as one in twenty does by chance; **bold** where that holds among all of the table (Holm).",
        "",
        f"| arm | best rate | loss there | {' | '.join(f'less {name}' for name in references)} | "
        "largest rate that trains | spikes at best |",
        "|---" * (5 + len(references)) + "|",
    ]
    for name, arm in arms.items():
        at_best = next((row for row in arm["rates"] if row["lr"] == arm["best_lr"]), None)
        cells = ["-"] * (4 + len(references))
        if at_best:
            spikes = at_best["spikes"]
            cells = [
                f"{arm['best_lr']:g}",
                shown(at_best["validation_loss"]),
                *(less_cell(arm["less"][other]) for other in references),
                "none" if arm["largest_lr"] is None else f"{arm['largest_lr']:g}",
                f"{spikes['mean']:.1f}" if spikes else "-",
            ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", *grid("validation loss", arms, rates, loss_cell)]
    lines += [
        "",
        "Unstable is not the same as having learnt less: the largest loss ratio of any step and seed against the "
        "least loss before at its length, and at any length (share of the steps above 1.2 at their length).",
        "",
        *grid("loss ratio", arms, rates, ratio_cell),
    ]
    lines += ["", *grid("largest element of sqrt(v), mean", arms, rates, variance_cell)]
    return "\n".join(lines) + "\n"


def grid(title: str, arms: dict[str, Any], rates: list[float], cell: Callable[[dict[str, Any]], str]) -> list[str]:
    """A table of arms by learning rates."""
    lines = [f"| {title} | " + " | ".join(f"{lr:g}" for lr in rates) + " |", "|---" * (len(rates) + 1) + "|"]
    for name, arm in arms.items():
        rows = {row["lr"]: row for row in arm["rates"]}
        lines.append(f"| {name} | " + " | ".join(cell(rows[lr]) if lr in rows else "" for lr in rates) + " |")
    return lines


def loss_cell(row: dict[str, Any]) -> str:
    loss = shown(row["validation_loss"]) if row["validation_loss"] else ""
    failed = f"{row['failed']} of {len(row['seeds'])} failed" if row["failed"] else ""
    return "; ".join(part for part in (loss, failed) if part)


def less_cell(less: dict[str, Any] | None) -> str:
    if less is None:
        return ""
    sure = 1 - CONFIDENCE
    alone, among_all = (p is not None and p < sure for p in (less["p"], less["p_holm"]))
    mark = "**" if among_all else "*" if alone else ""
    return f"{mark}{shown(less, '+')}{mark}"


def ratio_cell(row: dict[str, Any]) -> str:
    if row["loss_ratio_max"] is None or row["spike_share"] is None:
        return "-"
    overall = row["loss_ratio_overall_max"]
    shares = f"({100 * row['spike_share']['mean']:.1f} %)"
    return f"{row['loss_ratio_max']:.2f}, {'-' if overall is None else f'{overall:.2f}'} {shares}"


def variance_cell(row: dict[str, Any]) -> str:
    return f"{row['variance_max']['mean']:.2e}" if row["variance_max"] else "-"


def shown(mean: dict[str, Any], sign: str = "") -> str:
    half = "" if mean["half"] is None else f" ± {mean['half']:.3f}"
    return f"{mean['mean']:{sign}.3f}{half} ({mean['n']})"


def draw(summary: dict[str, Any], out: Path) -> None:
    """Loss, share of spikes, largest loss ratio and variance over the learning rate, an arm a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 9), layout="constrained")
    axes = figure.subplots(2, 2)
    loss, spikes, ratio, variance = axes.flat
    arms = summary["arms"]
    for index, (name, arm) in enumerate(arms.items()):
        aside = 1.03 ** (index - (len(arms) - 1) / 2)  # so that intervals do not hide each other
        style = {
            "color": COLOURS[index % len(COLOURS)],
            "linestyle": ("-", "--", ":")[index // len(COLOURS) % 3],
            "marker": MARKERS[index % len(MARKERS)],
            "markersize": 5,
            "linewidth": 1.3,
        }
        curve(loss, arm["rates"], "validation_loss", name, style, aside)
        curve(spikes, arm["rates"], "spike_share", name, style, aside)
        curve(variance, arm["rates"], "variance_max", name, style, aside)
        points = [
            (row["lr"] * aside, row["loss_ratio_overall_max"] or row["loss_ratio_max"])
            for row in arm["rates"]
            if row["loss_ratio_max"]
        ]
        ratio.plot(*zip(*points, strict=True), label=name, **style) if points else None
    means = [row["validation_loss"]["mean"] for a in arms.values() for row in a["rates"] if row["validation_loss"]]
    if means:
        loss.set_ylim(min(means) - 0.1, max(means) + 0.3)
    titles = {
        loss: "validation loss at full length: mean, 95 % interval of 3 seeds or more, runs",
        spikes: "steps with a loss ratio above 1.2 at their length, mean of seeds",
        ratio: "largest loss ratio of all seeds, against the least loss at any length",
        variance: "largest element of sqrt(v), mean of seeds",
    }
    for panel, title in titles.items():
        panel.set_title(title)
        panel.set_xlabel("learning rate")
        panel.set_xscale("log")
        panel.grid(alpha=0.3)
    loss.set_ylabel("nats a token")
    ratio.set_yscale("log")
    variance.set_yscale("log")
    spikes.set_ylim(bottom=0)
    spikes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    ratio.yaxis.set_major_formatter("{x:g}")
    ratio.yaxis.set_minor_formatter("{x:g}")
    handles, labels = loss.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)))
    figure.savefig(out, dpi=90)


def curve(panel: Any, rates: list[dict[str, Any]], key: str, name: str, style: dict[str, Any], aside: float) -> None:
    """Means; with their intervals from three seeds on (of two they span the panel), and each run's loss as a dot."""
    rows = [row for row in rates if row[key]]
    halves = [(row[key]["half"] or 0.0) if row[key]["n"] > 2 and key != "spike_share" else 0.0 for row in rows]
    xs, ys = [row["lr"] * aside for row in rows], [row[key]["mean"] for row in rows]
    panel.errorbar(xs, ys, yerr=halves, capsize=2, elinewidth=0.8, label=name, **style)
    if key == "validation_loss":
        dots = [(row["lr"] * aside, loss) for row in rows for loss in row["losses"]]
        panel.plot(*zip(*dots, strict=True), ".", markersize=3, alpha=0.6, color=style["color"]) if dots else None
