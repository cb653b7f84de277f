#!/usr/bin/env python
"""Draw the shape of each schedule: python scripts/draw_schedules.py docs/schedules.png

Reads no data; the lengths are those that `slw-train run` would use.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from curriculum.schedule import Schedule

BATCH = {"global_batch_sequences": 64, "total_tokens": 10**9}
RAMP = {"seqlen_start": 8, "seqlen_end": 1024, "duration_steps": 600}
STEPS = range(1000)
BUCKETS = [6400, 3200, 1600, 800, 400, 200]
"""Sequences of 32, 64, ... 1024 tokens: as many tokens in each bucket."""


def draw(out: Path) -> None:
    """Write the picture."""
    figure = Figure(figsize=(15, 8), layout="constrained")
    axes = figure.subplots(2, 3)
    for name, schedule in {
        "linear": Schedule.linear(**RAMP, **BATCH),
        "root, degree 2": Schedule.root(**RAMP, **BATCH),
        "sine": Schedule.sine(**RAMP, **BATCH),
        "exponential": Schedule.exponential(**RAMP, **BATCH),
        "staged": Schedule.staged(seqlens=[64, 256, 1024], boundaries=[200, 400], **BATCH),
    }.items():
        plot(axes[0, 0], [schedule.seqlen(step) for step in STEPS], name)
    label(axes[0, 0], "pacing: sequence length", "tokens a sequence")

    in_tokens = {**RAMP, "duration_steps": None, "duration_tokens": 20_000_000}
    for name, schedule in {
        "duration_steps = 600": Schedule.linear(**RAMP, **BATCH),
        "duration_tokens = 20 M": Schedule.linear(**in_tokens, **BATCH),
        "the same, 65,536 tokens a batch": Schedule.linear(
            **in_tokens, global_batch_tokens=1 << 16, total_tokens=10**9
        ),
    }.items():
        plot(axes[0, 1], [schedule.seqlen(step) for step in STEPS], name)
    label(axes[0, 1], "linear, in steps and in tokens seen", "tokens a sequence")

    warmup, control = (Schedule.linear(**RAMP, **BATCH, control=control) for control in (None, "batch_warmup"))
    plot(axes[0, 2], [warmup.seqlen(step) * 64 for step in STEPS], "linear: 64 sequences that grow")
    plot(
        axes[0, 2], [control.sequences(step) * 1024 for step in STEPS], "control: sequences of 1,024", linestyle="--"
    )
    label(axes[0, 2], 'control = "batch_warmup"', "tokens a step")

    for shape in ("linear", "stepwise", "sine", "exponential"):
        multiple = 128 if shape == "stepwise" else 1
        schedule = Schedule.skyladder(
            seqlen=1024, attention_window_shape=shape, attention_window_multiple=multiple, duration_steps=600, **BATCH
        )
        plot(axes[1, 0], [schedule.attention_window(step) or 1024 for step in STEPS], shape)
    label(axes[1, 0], "SkyLadder: attention window in rows of 1,024", "positions")

    for odds, colour in (("grow-p2", "C0"), ("uniform", "C1")):
        schedule = Schedule.buckets(
            seqlen_start=32, seqlen_end=1024, odds=odds, cycles=3, global_batch_tokens=1 << 11, epochs=1
        ).resolve(sum(n << (i + 5) for i, n in enumerate(BUCKETS)), BUCKETS)
        lengths = [schedule.seqlen(step) for step in range(schedule.total_steps)]
        offset = 1 if odds == "uniform" else 0.9
        axes[1, 1].plot([n * offset for n in lengths], ".", markersize=2, color=colour, label=f"{odds}, 3 cycles")
    axes[1, 1].set_yscale("log", base=2)
    label(axes[1, 1], "Dataset Decomposition: bucket of each batch", "tokens a sequence")

    truncated = Schedule.linear(**RAMP, **BATCH, dealing="truncate")
    plot(axes[1, 2], [truncated.uncut.tokens_before(step) / 1e6 for step in STEPS], "read: full-length rows")
    plot(axes[1, 2], [truncated.tokens_before(step) / 1e6 for step in STEPS], "served: what is not cut off")
    label(axes[1, 2], 'dealing = "truncate"', "tokens (millions)")
    figure.savefig(out, dpi=80)


def plot(panel, values, name, **style):
    panel.plot(list(STEPS), values, label=name, linewidth=1.2, **style)


def label(panel, title, unit):
    panel.set_title(title)
    panel.set_xlabel("step")
    panel.set_ylabel(unit)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)


if __name__ == "__main__":
    draw(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/schedules.png"))
