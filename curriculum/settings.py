"""The tables [curriculum] and [batch] of a run, checked and turned into pacings and batch sizes; and back to TOML."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

from curriculum import pacing as ramps
from curriculum.pacing import Pacing
from curriculum.skyladder import skyladder
from pipeline.errors import ConfigError

PACINGS: dict[str, Callable[..., Pacing]] = {**ramps.PACINGS, "skyladder": skyladder}
"""Pacing functions by their names in TOML."""


def paced(name: str, settings: dict[str, Any]) -> Pacing:
    """The pacing `name` with its parameters; raises ConfigError for one that is unknown, missing or not used."""
    if name not in PACINGS:
        raise ConfigError("unknown pacing", found=name, allowed=", ".join(PACINGS))
    parameters = inspect.signature(PACINGS[name]).parameters
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in settings]
    surplus = [key for key in settings if key not in parameters]
    if missing or surplus:
        raise ConfigError(
            f"[curriculum] does not fit pacing {name!r}",
            found=", ".join([f"{key} missing" for key in missing] + [f"{key} not used" for key in surplus]),
            allowed=", ".join(parameters),
        )
    return PACINGS[name](**settings)


def batch_size(pacing: Pacing, **size: int | None) -> Callable[[int], int]:
    """seqlen -> sequences of a batch, from one of `global_batch_sequences` and `global_batch_tokens`."""
    exactly_one(**size)
    sequences, tokens = size["global_batch_sequences"], size["global_batch_tokens"]
    if tokens is None:
        assert sequences is not None
        return lambda seqlen: sequences
    longest = max(seqlen for _, seqlen in pacing.points)
    if tokens < longest:
        raise ConfigError(
            "global_batch_tokens is less than one sequence",
            found=tokens,
            allowed=f"{longest} (the longest sequence) or more",
        )
    return lambda seqlen: tokens // seqlen


def end_of_run(total_tokens: int | None, epochs: int | None, max_epochs: int) -> dict[str, Any]:
    """The fields of a schedule that say where it ends; raises ConfigError for none or both."""
    exactly_one(total_tokens=total_tokens, epochs=epochs)
    if max_epochs < 1:
        raise ConfigError("max_epochs must be positive", found=max_epochs, allowed="1 or more")
    return {"total_tokens": total_tokens, "epochs": epochs, "max_epochs": max_epochs}


def exactly_one(**values: int | None) -> None:
    """Raise ConfigError unless exactly one is given, and positive."""
    names = " and ".join(values)
    given = {name: value for name, value in values.items() if value is not None}
    if len(given) != 1:
        raise ConfigError(f"give exactly one of {names}", found=", ".join(given) or "none of them")
    for name, value in given.items():
        if value < 1:
            raise ConfigError(f"{name} must be positive", found=value, allowed="1 or more")


def as_toml(tables: dict[str, dict[str, Any]]) -> str:
    """TOML of tables of numbers, strings, true and false, and lists of such; None is left out."""
    lines: list[str] = []
    for name, table in tables.items():
        given = {key: value for key, value in table.items() if value is not None}
        if given:
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in given.items()), ""]
    return "\n".join(lines)
