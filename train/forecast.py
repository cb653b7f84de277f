"""What a planned run asks of the trainer: learning rates at its landmarks, shapes to compile, FLOPs, hours.

FLOPs are those of train/utilisation.py, as if every token saw as far as attention may reach. An upper bound: a causal
kernel does half of attention's part, one that skips what documents hide does `attention_flops_documents`.
"""

from __future__ import annotations

import bisect
import dataclasses
from dataclasses import asdict, dataclass
from typing import Any

from curriculum.ledger import rehearse
from curriculum.plan import Plan, aligned, not_reached, plan, stretches, take_turns
from curriculum.schedule import Schedule
from pipeline.amount import amount
from pipeline.reader import Store
from train.config import Config
from train.optimizer import learning_rate
from train.utilisation import attention_flops, flops_per_token, parameters
from train.warmup import CPU_TOKENS, shapes_of


@dataclass(frozen=True)
class Landmark:
    """A step worth knowing the learning rate at."""

    name: str
    step: int
    tokens_before: int
    seqlen: int
    lr: float


@dataclass(frozen=True)
class RunCost:
    """What the run computes, and how long that takes."""

    parameters: int
    """That take part in matrix products: all but positions."""
    flops: int
    """Forward and backward of the whole run: an upper bound, see the module."""
    attention_flops: int
    """The part of it that grows with the length."""
    attention_flops_documents: int | None
    """That part if attention between documents is skipped; None for plain causal masks and before a rehearsal."""
    shapes: list[tuple[int, int]]
    """(rows, seqlen) of micro-batches on one rank: what a compiler sees, with `batch.micro_batch_tokens` of now."""
    tflops: float | None
    """Sustained by all devices together, as given."""
    hours: float | None
    """flops at that rate."""


@dataclass(frozen=True)
class Forecast:
    """A plan and what it asks of the trainer."""

    plan: Plan
    landmarks: list[Landmark]
    cost: RunCost
    warmup_cut_short: str | None = None
    """The learning rate's warmup, where the run ends within it."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **self.plan.to_json(),
            "landmarks": [asdict(landmark) for landmark in self.landmarks],
            "cost": asdict(self.cost),
            "warmup_cut_short": self.warmup_cut_short,
        }


def forecast(config: Config, *, rehearsed: bool = True, tflops: float | None = None) -> tuple[Schedule, Forecast]:
    """The resolved schedule and the forecast of a run; `rehearsed`: with a ledger of what the dealing serves.

    Raises ConfigError where the data cannot feed the schedule.
    """
    store = Store.open(config.store)
    loader = config.loader(store)
    schedule = loader.schedule
    table = plan(schedule, store)
    if rehearsed:
        table = dataclasses.replace(table, ledger=rehearse(loader))
    cost = _cost(config, schedule, parameters(config.model, store.manifest.vocab_size), table, tflops)
    warmup, steps = config.optimizer.warmup_steps, schedule.total_steps
    cut_short = f"warmup_steps = {warmup:,}, the run has {amount(steps, 'step')}" if warmup > steps else None
    return schedule, Forecast(table, landmarks(config, schedule), cost, cut_short)


def landmarks(config: Config, schedule: Schedule) -> list[Landmark]:
    """End of the learning rate's warmup, end of the ramp, half of the tokens, last step; in the order of steps."""
    steps, total = schedule.total_steps, schedule.total_tokens or 1
    parts = stretches(schedule)
    found = {"first step": 0}
    if 0 < config.optimizer.warmup_steps <= steps:
        found["end of the LR warmup"] = config.optimizer.warmup_steps - 1
    if len(parts) > 1 and not take_turns(parts) and not_reached(schedule) is None:
        found["end of the ramp"] = parts[-1].phase.first_step
    half = bisect.bisect_left(range(steps), total / 2, key=schedule.tokens_before)
    found["half of the tokens"] = min(half, steps - 1)
    found["last step"] = steps - 1
    return [
        Landmark(name, step, tokens, schedule.seqlen(step), learning_rate(config.optimizer, step, tokens, total))
        for name, step in sorted(found.items(), key=lambda item: item[1])
        for tokens in [schedule.tokens_before(step)]
    ]


def _cost(config: Config, schedule: Schedule, count: int, table: Plan, tflops: float | None) -> RunCost:
    model, parts, asked = config.model, stretches(schedule), config.batch.micro_batch_tokens
    size = asked if isinstance(asked, int) else CPU_TOKENS
    each = attention_flops(model)
    attention = each * sum(part.tokens * part.phase.reach for part in parts)
    flops = sum(part.tokens * flops_per_token(model, count, part.phase.reach) for part in parts)
    windows = any(part.phase.reach < part.phase.seqlen for part in parts)
    ledger = table.ledger if model.mask == "document" and not windows else None
    return RunCost(
        parameters=count,
        flops=flops,
        attention_flops=attention,
        attention_flops_documents=each * ledger.attended if ledger else None,
        shapes=sorted({(shape.rows, shape.seqlen) for shape in shapes_of(schedule, size)}),
        tflops=tflops,
        hours=flops / (tflops * 1e12 * 3600) if tflops else None,
    )


def render_forecast(what: Forecast) -> str:
    """The trainer's side as text."""
    cost = what.cost
    heads = ["", "step", "tokens before", "seqlen", "LR"]
    rows = [[m.name, f"{m.step:,}", f"{m.tokens_before:,}", f"{m.seqlen:,}", f"{m.lr:.3g}"] for m in what.landmarks]
    share = cost.attention_flops / cost.flops
    cut_short = what.warmup_cut_short
    lines = [
        "",
        aligned([heads, *rows]),
        *(
            [f"note: the LR never comes to its peak, for the run ends in the warmup: {cut_short}"]
            if cut_short
            else []
        ),
        "",
        f"{amount(len(cost.shapes), 'shape')} of micro-batches to compile",
        f"{cost.flops:.3g} FLOPs at most with {cost.parameters:,} parameters, {share:.1%} of them attention",
    ]
    if cost.attention_flops_documents is not None:
        part = cost.attention_flops_documents / cost.attention_flops
        lines[-1] += f" (of which documents kept apart need {part:.1%})"
    if cost.hours is not None:
        hours = f"{cost.hours:,.1f}" if cost.hours >= 10 else f"{cost.hours:.2g}"
        lines.append(f"{hours} hours at {cost.tflops:,g} TFLOP/s")
    return "\n".join(lines)
