"""Runs side by side, several seeds of one arm as one line: losses, targets reached, how stable each was.

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

from pipeline.errors import SlwError
from train.figures import SPIKE_RATIOS, Curves, Figures, figures, reached, read_curves
from train.folder import FREE_KEYS, config_of_flat
from train.stability import SPIKE_RATIO
from train.statistics import Mean, mean_of

SAME_ARM = (FREE_KEYS - {"run.validate_every_steps"}) | {"run.seed"}
"""Settings in which runs of one arm may differ."""

VALIDATED_ON = ("store", "run.validation_tokens")
"""Settings that say on which tokens."""


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


Table = tuple[list[str], list[list[str]]]
"""Heads and rows; the first column is a name, the others numbers."""


def losses(comparison: Comparison) -> Table:
    """Where the arms ended, and when they reached the target."""
    target = "target" if comparison.target is None else f"{comparison.target:.4f}"
    heads = ["arm", "runs", "steps", "tokens", "seconds", "validation loss", "best"]
    heads += [f"tokens to {target}", "fewer", f"seconds to {target}", "less"]
    return heads, [_losses_row(arm) for arm in comparison.arms]


def _losses_row(arm: Arm) -> list[str]:
    shares = [figure.share for figure in arm.figures if figure.share is not None and figure.share < 1]
    steps, tokens, seconds = arm.mean("steps"), arm.mean("tokens"), arm.mean("seconds")
    assert steps and tokens and seconds, "a run has a step"
    return [
        arm.name + (f" ({min(shares):.0%} done)" if shares else ""),
        str(len(arm.figures)),
        f"{steps.mean:,.0f}",
        f"{tokens.mean:,.0f}",
        f"{seconds.mean:,.0f}",
        _shown(arm.mean("validation_loss"), ".4f"),
        _shown(arm.mean("validation_loss_best"), ".4f"),
        _shown(arm.tokens_to_target, ",.0f"),
        f"{arm.fewer_tokens:.2f}x" if arm.fewer_tokens else "-",
        _shown(arm.seconds_to_target, ",.1f"),
        f"{arm.less_time:.2f}x" if arm.less_time else "-",
    ]


def stability(comparison: Comparison) -> Table:
    """Spikes, largest loss ratio and variance, and whether they go together."""
    spikes = [f"> {bound:g}" for bound in SPIKE_RATIOS]
    heads = ["arm", f"spikes {spikes[0]}", *spikes[1:], "max ratio", "at any length"]
    heads += ["max variance norm", "max variance", "r(ratio, norm)", "r(ratio, max)"]
    return heads, [_stability_row(arm) for arm in comparison.arms]


def _stability_row(arm: Arm) -> list[str]:
    def largest(name: str, form: str) -> str:
        values = arm.known(name)
        return format(max(values), form) if values else "-"

    def correlations(name: str) -> str:
        found = arm.known(name)
        if not found:
            return "-"
        if len(found) == 1:
            return f"{found[0].r:.2f} (p {found[0].p:.1g})"
        return _shown(mean_of([value.r for value in found]), ".2f")

    return [
        arm.name,
        *(f"{arm.spikes(bound).mean:g}" for bound in SPIKE_RATIOS),
        largest("loss_ratio_max", ".2f"),
        largest("loss_ratio_overall_max", ".2f"),
        largest("variance_l1_max", ".3g"),
        largest("variance_max", ".2e"),
        correlations("ratio_with_variance_l1"),
        correlations("ratio_with_variance_max"),
    ]


def _shown(mean: Mean | None, form: str) -> str:
    if mean is None:
        return "-"
    half = "" if mean.half is None else f" ± {mean.half:{form}}"
    return f"{mean.mean:{form}}{half}"


def notes(comparison: Comparison) -> list[str]:
    """What the tables mean, a sentence a line."""
    said = [
        "Validation loss: the last, at full length, nats a token; best: the lowest. ± is half of the 95 % t-interval "
        "over seeds.",
        f"Spikes: steps whose loss is so many times the least before at their length, mean of a run; {SPIKE_RATIO:g} "
        "is the usual bound. Variance: sqrt(v) of Adam, its l1 norm and largest element.",
        "r: Pearson's correlation over the steps of a run; p as if steps were independent, which they are not.",
    ]
    if comparison.target is not None:
        said.insert(
            1,
            f"To {comparison.target:.4f}: where validation first came down to it, linear between validations; "
            f"fewer, less: how many times less than {comparison.arms[0].name} needed.",
        )
    configs = [curves.config for arm in comparison.arms for curves in arm.curves]
    lengths = {length for config in configs if (length := _full_length(config)) is not None}
    if len(lengths) > 1:
        said.append(
            "Not validated at the same length, so losses do not compare: full length is "
            f"{', '.join(f'{length:,}' for length in sorted(lengths))}."
        )
    for key in VALIDATED_ON:
        if len(values := {str(config[key]) for config in configs if key in config}) > 1:
            said.append(
                f"Not validated on the same tokens, so losses do not compare: {key} is {', '.join(sorted(values))}."
            )
    return said


def _full_length(config: dict[str, Any]) -> int | None:
    """Where the run of these settings was validated; None where they make no run."""
    try:
        return config_of_flat(config, where="config").schedule().max_seqlen
    except SlwError:
        return None


def as_text(table: Table) -> str:
    """Aligned columns."""
    heads, rows = table
    widths = [max(len(line[i]) for line in (heads, *rows)) for i in range(len(heads))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in (heads, *rows)
    )


def as_markdown(comparison: Comparison) -> str:
    """Both tables and their notes."""
    parts = []
    for heads, rows in (losses(comparison), stability(comparison)):
        lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
        parts.append("\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines))
    return "\n\n".join([*parts, "\n".join(notes(comparison))]) + "\n"
