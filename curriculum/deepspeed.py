"""DeepSpeed's seqlen curriculum as ours, value for value: `translate` gives the tables [curriculum] and [batch].

DeepSpeed removed its implementation in September 2026; configs with it are many. Both places are read:

    "curriculum_learning": {...}                                                              the legacy one
    "data_efficiency": {"data_sampling": {"curriculum_learning": {"curriculum_metrics": {"seqlen": {...}}}}}

Its rule, for steps s counted from 1: d = floor((s / T)**(1 / degree) * (max - min) + min), less d mod
`difficulty_step`, at most max, in double precision. A double may miss an exact tie by a step: where it does, the
result is a table with DeepSpeed's values, else `linear` or `root`. What it does wrong is refused and explained, not
copied: length 0, a maximum that is reached late or never, a discrete schedule that stays at the maximum it once had.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from curriculum.pacing import linear, root
from pipeline.errors import ConfigError

LEGACY = "curriculum_learning"
METRIC = "data_efficiency.data_sampling.curriculum_learning.curriculum_metrics"
TYPES = {
    "fixed_linear": ("total_curriculum_step", "difficulty_step"),
    "fixed_root": ("total_curriculum_step", "difficulty_step", "root_degree"),
    "fixed_discrete": ("difficulty", "max_step"),
    "custom": (),
}
"""schedule_type -> the keys of its schedule_config."""
READ = {
    "enabled",
    "curriculum_type",
    "difficulty_type",
    "clustering_type",
    "min_difficulty",
    "max_difficulty",
    "schedule_type",
    "schedule_config",
}
"""Keys of a curriculum of lengths that we know; clusters are of samples, which it has none of."""


def translate(config: dict[str, Any] | str | Path) -> tuple[dict[str, Any], dict[str, int], list[str]]:
    """([curriculum], [batch], keys not read) of a DeepSpeed config, a dict or a JSON file.

    [batch] is empty without a batch size. Raises ConfigError: no such file or schedule in it, a key missing, or a
    schedule that DeepSpeed gets wrong.
    """
    data, source = (
        (config, "the DeepSpeed config") if isinstance(config, dict) else (_read(Path(config)), str(config))
    )
    schedule, where = _find(data, source)
    kind = _need(schedule, "schedule_type", where)
    if not isinstance(kind, str) or kind not in TYPES:
        raise ConfigError("unknown schedule_type", where=where, found=repr(kind), allowed=", ".join(TYPES))
    if kind == "custom":
        raise ConfigError(
            "a custom schedule is a Python function, which the config does not hold",
            where=where,
            remedy="call it once: Schedule.from_function(lambda step: f(step + 1), steps=N, ...).to_toml()",
        )
    details = f"{where}.schedule_config"
    parameters = _need(schedule, "schedule_config", where)
    least, most = (_length(schedule, key, where) for key in ("min_difficulty", "max_difficulty"))
    if least > most:
        raise ConfigError(
            "min_difficulty is above max_difficulty: DeepSpeed would stay at the minimum for ever",
            where=where,
            found=f"{least} and {most}",
        )
    curriculum = (
        _discrete(parameters, least, most, details)
        if kind == "fixed_discrete"
        else _growing(parameters, least, most, details, rooted=kind == "fixed_root")
    )
    sized = data.get("train_batch_size", "auto") != "auto"
    batch = {"global_batch_sequences": _length(data, "train_batch_size", source)} if sized else {}
    left_out = [key for key in data if key not in (LEGACY, METRIC.partition(".")[0], "train_batch_size")]
    left_out += _beside(data) + [key for key in schedule if key not in READ]
    left_out += [f"schedule_config.{key}" for key in parameters if key not in TYPES[kind]]
    return curriculum, batch, left_out


def _growing(parameters: dict[str, Any], least: int, most: int, where: str, *, rooted: bool) -> dict[str, Any]:
    duration = _length(parameters, "total_curriculum_step", where)
    multiple = _length(parameters, "difficulty_step", where)
    degree = _need(parameters, "root_degree", where) if rooted else 1
    if isinstance(degree, bool) or not isinstance(degree, int | float) or not 0 < degree < math.inf:
        raise ConfigError("root_degree must be a positive number", where=where, found=repr(degree))
    if least < multiple:
        raise ConfigError(
            "min_difficulty is below difficulty_step: DeepSpeed rounds it down to a length of 0",
            where=where,
            found=f"min_difficulty = {least}, difficulty_step = {multiple}",
            remedy=f"min_difficulty = {multiple}, or a smaller difficulty_step",
        )
    if most % multiple:
        raise ConfigError(
            "max_difficulty is no multiple of difficulty_step: DeepSpeed reaches it only after total_curriculum_step",
            where=where,
            found=f"max_difficulty = {most}, difficulty_step = {multiple}",
            allowed=f"{most - most % multiple} or {most - most % multiple + multiple}",
        )

    def seqlen(step: int) -> int:
        """DeepSpeed's own arithmetic; `step` counts from 1."""
        reached = math.floor((float(step) / duration) ** (1.0 / degree) * (most - least) + least)
        return int(min(reached - reached % multiple, most))

    if least == most:
        return {"pacing": "constant", "seqlen": least}
    points = _points(seqlen, most, duration)
    settings = {
        "seqlen_start": least,
        "seqlen_end": most,
        "duration_steps": duration,
        "seqlen_multiple": multiple,
    }
    if least % multiple == 0 and degree == int(degree):
        exact = linear(**settings) if degree == 1 else root(**settings, degree=int(degree))
        if exact.points == points:
            named = {"pacing": "linear"} if degree == 1 else {"pacing": "root", "degree": int(degree)}
            return {**named, **settings}
    return {"pacing": "table", "table": [list(point) for point in points]}


def _points(seqlen: Callable[[int], int], most: int, duration: int) -> tuple[tuple[int, int], ...]:
    """(step from 0, length) where `seqlen`, a function of steps from 1, has risen; it is `most` at `duration`."""
    points = [(0, seqlen(1))]
    while points[-1][1] < most:
        low, high = points[-1][0] + 1, duration  # the first step, from 1, with more than the last length
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if seqlen(middle) > points[-1][1] else (middle + 1, high)
        points.append((low - 1, seqlen(low)))
    return tuple(points)


def _discrete(parameters: dict[str, Any], least: int, most: int, where: str) -> dict[str, Any]:
    seqlens, ends = (_need(parameters, key, where) for key in ("difficulty", "max_step"))
    if not isinstance(seqlens, list) or not isinstance(ends, list) or not ends or len(seqlens) != len(ends) + 1:
        raise ConfigError(
            "max_step is one entry shorter than difficulty: the last length has no end",
            where=where,
            found=f"difficulty = {seqlens}, max_step = {ends}",
        )
    if not all(isinstance(number, int) and number > 0 for number in seqlens + ends):
        raise ConfigError("lengths and steps are positive integers", where=where, found=f"{seqlens}, {ends}")
    if any(late <= early for early, late in pairwise(ends)):
        raise ConfigError("max_step must increase: DeepSpeed takes the first that fits", where=where, found=ends)
    if least == most and set(seqlens) != {most}:
        raise ConfigError(
            "DeepSpeed never leaves min_difficulty, which is the maximum already", where=where, found=most
        )
    stuck = next((i for i, seqlen in enumerate(seqlens) if seqlen >= most), len(seqlens) - 1)
    if any(seqlen != seqlens[stuck] for seqlen in seqlens[stuck:]):
        raise ConfigError(
            f"DeepSpeed stays for ever at the first length that is not below max_difficulty = {most}",
            where=where,
            found=f"difficulty = {seqlens}: everything after the {seqlens[stuck]} at place {stuck} is never used",
            remedy="raise max_difficulty, or end the list there: what you want is [curriculum] pacing = "
            f'"staged", seqlens = {seqlens}, boundaries = {ends}',
        )
    # max_step counts from 1 and is inclusive: the next length begins with our step of that number.
    return {"pacing": "staged", "seqlens": seqlens, "boundaries": ends}


def _find(data: dict[str, Any], source: str) -> tuple[dict[str, Any], str]:
    """The seqlen schedule and where it is."""
    legacy = data.get(LEGACY)
    if isinstance(legacy, dict):
        kind = legacy.get("curriculum_type", "seqlen")
        if kind != "seqlen":
            raise ConfigError(
                "not a curriculum of sequence lengths",
                where=f"{source}: {LEGACY}.curriculum_type",
                found=repr(kind),
                allowed='"seqlen"',
            )
        _enabled(legacy, f"{source}: {LEGACY}")
        return legacy, f"{source}: {LEGACY}"
    node: Any = data
    path = ""
    for key in METRIC.split("."):
        node, path = node.get(key) if isinstance(node, dict) else None, f"{path}.{key}".strip(".")
        if isinstance(node, dict) and path != METRIC:
            _enabled(node, f"{source}: {path}")
    named = sorted(node) if isinstance(node, dict) else []
    chosen = [name for name in named if name.startswith("seqlen")]
    if len(chosen) != 1:
        raise ConfigError(
            "no curriculum of sequence lengths in it",
            where=source,
            found=f"metrics {', '.join(named)}" if named else ", ".join(data) or "nothing",
            allowed=f"{LEGACY}, or {METRIC}.seqlen",
        )
    metric, where = node[chosen[0]], f"{source}: {METRIC}.{chosen[0]}"
    _need(metric, "schedule_type", where)
    if metric.get("difficulty_type", "value") != "value":
        raise ConfigError("its difficulties are percentiles of the data, not lengths", where=where, allowed="value")
    return metric, where


def _beside(data: dict[str, Any]) -> list[str]:
    """What else of data_efficiency is switched on: random layerwise token dropping, other metrics."""
    found, node, path = [], data, ""
    for key in (*METRIC.split("."), "seqlen"):
        if path:
            others = [name for name, value in node.items() if isinstance(value, dict) and not name.startswith(key)]
            found += [f"{path}.{name}" for name in others if node[name].get("enabled", True)]
        below = node.get(key)
        node, path = below if isinstance(below, dict) else {}, f"{path}.{key}".strip(".")
    return found


def _enabled(node: dict[str, Any], where: str) -> None:
    if not node.get("enabled", False):  # its default
        raise ConfigError("it is switched off: DeepSpeed would ignore it", where=where, allowed='"enabled": true')


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError("cannot read the DeepSpeed config", where=path, found=error.strerror) from error
    except ValueError as error:
        raise ConfigError("the DeepSpeed config is not JSON", where=path, found=error) from error
    if not isinstance(data, dict):
        raise ConfigError("a DeepSpeed config is a JSON object", where=path, found=type(data).__name__)
    return data


def _need(node: Any, key: str, where: str) -> Any:
    if not isinstance(node, dict):
        raise ConfigError("an object is wanted here", where=where, found=repr(node), allowed=f'{{"{key}": ...}}')
    if key not in node:
        raise ConfigError(f"{key} is missing", where=where, found=", ".join(node) or "nothing")
    return node[key]


def _length(node: dict[str, Any], key: str, where: str) -> int:
    value = _need(node, key, where)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{key} must be a positive integer", where=where, found=repr(value))
    return value
