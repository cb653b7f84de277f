"""The SLW paper's low-cost tuning of L_s and T (arXiv 2108.06084, section 4; DeepSpeed's curriculum tutorial).

    1  Begin with a small L_s and T of a few multiples of the LR warmup. Raise L_s until the full-length validation
       perplexity no longer fluctuates at the very start.
    2  Search by halves for the largest T without a significant fluctuation over those multiples of the LR warmup.

A fluctuation is a perplexity above 1.3 times its best so far (`Probe.fluctuates`). Here L_s doubles, "the very start"
is the LR warmup, and T is one of a grid of equal factors, for the optimum is broad. Halving assumes that what
fluctuates at T does so at every larger T. Price: `cost` says it beforehand.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from curriculum.pacing import require_multiples
from pipeline.errors import ConfigError, RunError
from pipeline.place import remove_tree
from pipeline.reader import Store
from train.config import Config
from train.config_file import parse_config
from train.probe import KEPT_NAME, Probe, Probes, probing, ramped
from train.tuned import Tuned, TuningCost, toml_of

GRID = 1.25
"""Factor between neighbours of the T's that are tried."""


@dataclass(frozen=True)
class Settings:
    """How to tune; the defaults are the paper's where it has one."""

    threshold: float = 1.3
    multiples: int = 3
    """Length of a probe, and T of the first ones: so many times the LR warmup."""
    validations: int = 24
    """In a probe, evenly spaced."""
    most_share: float = 0.1
    """Largest share of the run's tokens that tuning may cost."""


@dataclass(frozen=True)
class Space:
    """What is tried, and the steps that a verdict looks at."""

    starts: list[int]
    durations: list[int]
    """Increasing; the first probes have `durations[first]`."""
    first: int
    warmup_steps: int
    probe_steps: int
    every: int
    """Steps between validations."""


def choose(space: Space, probe: Callable[[int, int], Probe], threshold: float) -> tuple[int, int] | None:
    """(L_s, T) by the procedure above; None where no L_s is calm at the start, or no T is calm after it.

    Asks `probe` for at most len(starts) + log2(len(durations)) + 1 different choices.
    """
    for start in space.starts:
        seen = probe(start, space.durations[space.first])
        if not seen.fluctuates(threshold, until=space.warmup_steps):
            break
    else:
        return None
    calm, wild = (-1, space.first) if seen.fluctuates(threshold) else (space.first, len(space.durations))
    while wild - calm > 1:
        middle = (calm + wild) // 2
        if probe(start, space.durations[middle]).fluctuates(threshold):
            wild = middle
        else:
            calm = middle
    return (start, space.durations[calm]) if calm >= 0 else None


def space_of(config: Config, steps: int, settings: Settings) -> Space:
    """What to try for a run of `steps` steps. Raises ConfigError where there is nothing to tune."""
    ramped(config, 1, 1)
    warmup, curriculum = config.optimizer.warmup_steps, config.curriculum
    if warmup < 1:
        raise ConfigError(
            "probes are as long as a few LR warmups", found="optimizer.warmup_steps = 0", allowed=">= 1"
        )
    end, multiple = curriculum.seqlen_end, curriculum.seqlen_multiple or 8
    start = curriculum.seqlen_start or multiple
    if end is None:
        raise ConfigError("a ramp has an end", found="no curriculum.seqlen_end")
    require_multiples(start, end, multiple)
    probe_steps = settings.multiples * warmup
    if probe_steps >= steps:
        raise ConfigError(
            "a probe would be as long as the run",
            found=f"{settings.multiples} times {warmup:,} steps of LR warmup, a run of {steps:,}",
            remedy="fewer --multiples, a shorter optimizer.warmup_steps",
        )
    starts = [start]
    while starts[-1] < end:
        starts.append(min(2 * starts[-1], end))
    below = int(math.log(settings.multiples, GRID))
    above = int(math.log(steps / probe_steps, GRID))
    durations = sorted({round(probe_steps * GRID**power) for power in range(-below, above + 1)})
    every = max(1, probe_steps // settings.validations)
    return Space(starts, durations, durations.index(probe_steps), warmup, probe_steps, every)


def cost(config: Config, space: Space, tokens: int, held_out: int) -> tuple[TuningCost, TuningCost]:
    """(likely, at most) of tuning a run of `tokens` tokens with so many held out.

    Likely: the first L_s is calm and T in the middle. At most: only the last L_s is calm, and T where it costs most.
    """
    validated = min(held_out, config.run.validation_tokens) * validations(space)

    def asked(calm_start: int, calm_duration: int) -> TuningCost:
        """Where these are the least L_s that is calm at the start and the largest T that is calm after it."""
        probed: dict[tuple[int, int], int] = {}

        def probe(start: int, duration: int) -> Probe:
            if (start, duration) not in probed:
                shape = probing(config, start, duration, tokens, space.probe_steps)
                probed[start, duration] = shape.run.total_tokens or 0
            rises = [(1, 99.0)] if start < calm_start else []
            rises += [(space.probe_steps, 99.0)] if duration > calm_duration else []
            return Probe(start, duration, [(0, 0.0), *rises], False)

        choose(space, probe, 1.3)
        return TuningCost(len(probed), sum(probed.values()), validated * len(probed), tokens)

    middle = space.durations[(space.first + len(space.durations)) // 2]
    every = [asked(space.starts[-1], duration) for duration in space.durations]
    return asked(space.starts[0], middle), max(every, key=lambda one: one.share)


def validations(space: Space) -> int:
    """Validations of one probe: before it, every `space.every` steps, and at its end."""
    return 1 + -(-space.probe_steps // space.every)


def tune(config: Config, out: Path, settings: Settings, *, force: bool = False, warn: Callable[[str], None]) -> Tuned:
    """Tune L_s and T of `config` by probes in folder `out`; what is done there already is not done again.

    Raises ConfigError where there is nothing to tune or it would cost too much, RunError where `out` cannot be
    written or holds another tuning, `Stopped` where a signal has ended a probe.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("tuning runs on one rank", found=f"WORLD_SIZE={os.environ['WORLD_SIZE']}", allowed="1")
    store, held_out = Store.open(config.store), Store.open(config.store, "validation")
    if not held_out.documents:
        raise ConfigError("tuning follows validation", where=config.store, found="no held-out documents")
    schedule = config.loader(store).schedule
    tokens = schedule.total_tokens or 0
    space = space_of(config, schedule.total_steps, settings)
    likely, most = cost(config, space, tokens, held_out.tokens)
    warn(f"tuning will likely take {likely}; at most {most}")
    _check_cost(likely, settings)
    if force and (out / KEPT_NAME).is_file():
        remove_tree(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError("cannot write here", where=out, found=error, remedy="choose another --out") from error
    probes = Probes(config, out, tokens=tokens, steps=space.probe_steps, every=space.every, warn=warn)
    chosen = choose(space, probes, settings.threshold)
    data = ramped(config, *chosen) if chosen else None
    validated = min(held_out.tokens, config.run.validation_tokens)
    return Tuned(
        dir=str(out),
        seqlen_start=chosen[0] if chosen else None,
        duration_steps=chosen[1] if chosen else None,
        run_steps=parse_config(data, where="tune").loader(store).schedule.total_steps if data else None,
        threshold=settings.threshold,
        warmup_steps=space.warmup_steps,
        probes=probes.done,
        cost=TuningCost(
            probes=len(probes.done),
            tokens=sum(probe.tokens for probe in probes.done),
            validated_tokens=sum(validated * len(probe.losses) for probe in probes.done),
            run_tokens=tokens,
        ),
        toml=toml_of(data) if data else None,
    )


def _check_cost(likely: TuningCost, settings: Settings) -> None:
    if likely.share > settings.most_share:
        raise ConfigError(
            "tuning would cost too much beside the run",
            found=str(likely),
            allowed=f"{settings.most_share:.0%} of the run",
            remedy=f"--most-share {math.ceil(100 * likely.share) / 100:g} takes it; cheaper are fewer --multiples ("
            f"{settings.multiples}) or --validations ({settings.validations}), a smaller run.validation_tokens",
        )
