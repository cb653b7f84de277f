"""A comparison as tables, and what they mean: as text, as Markdown."""

from __future__ import annotations

from typing import Any

from pipeline.errors import SlwError
from train.compare import Arm, Comparison
from train.figures import SPIKE_RATIOS
from train.folder import config_of_flat
from train.stability import SPIKE_RATIO
from train.statistics import Mean, mean_of

Table = tuple[list[str], list[list[str]]]
"""Heads and rows; the first column is a name, the others numbers."""

VALIDATED_ON = ("store", "run.validation_tokens")
"""Settings that say on which tokens."""


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
