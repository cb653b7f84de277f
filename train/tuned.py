"""What tuning has found: as text, as a config that is ready to run, as a picture."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curriculum.plan import aligned
from curriculum.settings import as_toml
from pipeline.errors import RunError
from pipeline.plot import COLOURS, save
from pipeline.shell import pasted
from train.probe import Probe

FORWARD_SHARE = 1 / 3
"""Work of validating a token over that of training on it: validation has no backward pass."""
CHOSEN_NAME = "chosen.toml"
PICTURE_NAME = "probes.png"


@dataclass(frozen=True)
class TuningCost:
    """What probes train on and validate on."""

    probes: int
    tokens: int
    validated_tokens: int
    run_tokens: int

    @property
    def share(self) -> float:
        """Share of the run's work; a validated token counts a third."""
        return (self.tokens + FORWARD_SHARE * self.validated_tokens) / self.run_tokens

    def __str__(self) -> str:
        return (
            f"{self.probes} probes, {self.tokens:,} tokens trained on and {self.validated_tokens:,} validated: "
            f"{self.share:.1%} of the run"
        )


@dataclass(frozen=True)
class Tuned:
    """What tuning has found; None where every probe fluctuated."""

    dir: str
    seqlen_start: int | None
    duration_steps: int | None
    run_steps: int | None
    """Steps of the run with the chosen ramp."""
    threshold: float
    warmup_steps: int
    """Steps of the learning rate's warmup: the paper's "very start"."""
    probes: list[Probe]
    """In the order they were made."""
    cost: TuningCost
    """What the probes cost."""
    toml: str | None
    """The chosen config, whole."""

    @property
    def note(self) -> str | None:
        """What to do where no ramp from the chosen L_s fluctuated: only the search has ended T then."""
        of_start = [probe for probe in self.probes if probe.seqlen_start == self.seqlen_start]
        if not self.duration_steps or any(probe.fluctuates(self.threshold) for probe in of_start):
            return None
        return (
            f"nothing fluctuated: T {self.duration_steps:,} is no limit, only the longest that is tried; take 20 to "
            "40 % of the steps, as the paper does, or tune with a higher optimizer.lr, more --multiples or a lower "
            "--threshold"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; infinite ratios are None."""
        value = dataclasses.asdict(self) | {"note": self.note}
        value["cost"]["share"] = self.cost.share
        for probe, shown in zip(self.probes, value["probes"], strict=True):
            worst, step = probe.worst()
            shown |= {"worst_ratio": worst if worst < float("inf") else None, "worst_step": step}
            shown |= dict(zip(("fluctuates_at_start", "fluctuates"), self.verdicts(probe), strict=True))
        return value

    def verdicts(self, probe: Probe) -> tuple[bool, bool]:
        """(fluctuates at the very start, fluctuates at all)."""
        return probe.fluctuates(self.threshold, until=self.warmup_steps), probe.fluctuates(self.threshold)


def render(tuned: Tuned) -> str:
    """What each probe showed, what was chosen and what it cost."""
    rows = [["L_s", "T", "largest ratio", "at step", "verdict"]]
    for probe in tuned.probes:
        at_start, fluctuates = tuned.verdicts(probe)
        verdict = "fluctuates at the start" if at_start else "fluctuates" if fluctuates else "calm"
        worst, step = probe.worst()
        rows.append([f"{probe.seqlen_start:,}", f"{probe.duration_steps:,}", f"{worst:.3f}", f"{step:,}", verdict])
    words = (
        "L_s: tokens of the first sequences; T: steps until they are full; ratio: validation perplexity over its "
        f"best before, above {tuned.threshold:g} it fluctuates"
    )
    lines = [words, aligned(rows), "", f"cost: {tuned.cost}"]
    if tuned.toml and tuned.duration_steps and tuned.run_steps:
        lines += [
            f"chosen: L_s {tuned.seqlen_start:,}, T {tuned.duration_steps:,}, "
            f"{tuned.duration_steps / tuned.run_steps:.0%} of the run's {tuned.run_steps:,} steps",
            *([f"note: {tuned.note}"] if tuned.note else []),
            f"ready to run: slw-train run {pasted(Path(tuned.dir) / CHOSEN_NAME)}",
            "",
            tuned.toml.rstrip(),
        ]
    return "\n".join(lines)


def failure(tuned: Tuned) -> RunError:
    """The error of a tuning that has chosen nothing."""
    return RunError(
        "every probe fluctuates",
        where=tuned.dir,
        found=f"perplexities above {tuned.threshold:g} times their best, whatever L_s and T",
        remedy="a lower optimizer.lr, a longer optimizer.warmup_steps, or a higher --threshold",
    )


def toml_of(data: dict[str, Any]) -> str:
    """A config's settings as TOML: values of its own first, then its tables."""
    plain = {name: value for name, value in data.items() if not isinstance(value, dict)}
    tables = {name: value for name, value in data.items() if isinstance(value, dict) and name != "mixture"}
    tables |= {f"mixture.{name}": value for name, value in (data.get("mixture") or {}).items()}
    return f"{as_toml({'head': plain}).removeprefix('[head]').lstrip()}\n{as_toml(tables)}"


def draw(tuned: Tuned, out: Path) -> None:
    """Validation perplexity of every probe over its steps, as OUT (.png, .svg, .pdf); see `save`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    panel = figure.subplots()
    for index, probe in enumerate(tuned.probes):
        at_start, fluctuates = tuned.verdicts(probe)
        colour = COLOURS[index % len(COLOURS)]
        label = f"L_s {probe.seqlen_start:,}, T {probe.duration_steps:,}" + ": fluctuates" * (at_start or fluctuates)
        steps, losses = zip(*probe.losses, strict=True)
        style = ":" if fluctuates else "-"
        panel.plot(steps, losses, style, color=colour, linewidth=1.8, label=label)
        if probe.diverged:
            panel.plot(steps[-1:], losses[-1:], "x", color=colour)
    panel.axvline(tuned.warmup_steps, color="0.5", linewidth=1)
    place: dict[str, Any] = {
        "xycoords": ("data", "axes fraction"),
        "xytext": (4, -4),
        "textcoords": "offset points",
        "va": "top",
    }
    panel.annotate("end of the LR warmup", (tuned.warmup_steps, 1), **place)
    panel.set_xlabel("step")
    panel.set_ylabel("validation loss at full length, nats a token")
    title = (
        f"chosen: L_s {tuned.seqlen_start:,}, T {tuned.duration_steps:,}" if tuned.toml else "every probe fluctuates"
    )
    panel.set_title(f"{title}; a rise of {tuned.threshold:g}x in perplexity is a fluctuation")
    panel.grid(alpha=0.3)
    panel.legend()
    save(figure, out, dpi=100)
