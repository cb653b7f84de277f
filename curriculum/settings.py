"""The tables [curriculum] and [batch] of a run, checked and turned into pacings and batch sizes; and back to TOML."""

from __future__ import annotations

import inspect
import json
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from curriculum import pacing as ramps
from curriculum.adaptive import Notches
from curriculum.buckets import Buckets
from curriculum.layout import batch_warmup, lay_out
from curriculum.pacing import Pacing, require_positive
from curriculum.phases import MOST_TOKENS, Phases
from curriculum.skyladder import skyladder
from pipeline.errors import ConfigError

SEQLEN_NOW = "seqlen_now"
"""The setting that holds how far an adaptive schedule has come: added by `Schedule.raised_to`."""
BUCKET_SEQUENCES = "bucket_sequences"
"""The setting that holds a store's sequences of each bucket, shortest first: added by `Schedule.resolve`."""
PACINGS: dict[str, Callable[..., Pacing]] = {**ramps.PACINGS, "skyladder": skyladder}
MAKERS: dict[str, Callable[..., Any]] = {**PACINGS, "buckets": Buckets, "adaptive": Notches}
"""By the names of pacings in TOML, what takes their parameters."""
RUN_KEYS = ("total_tokens", "epochs", "max_epochs")
BATCH_KEYS = ("global_batch_sequences", "global_batch_tokens")
COMMON_KEYS = ("control", "dealing", "first_piece", "attention_window_positions")
"""What every pacing may have beside its own parameters."""
WHOLE = {
    *("seqlen", "seqlen_start", "seqlen_end", "seqlen_multiple", "duration_steps", "duration_tokens", "degree"),
    *("attention_window_start", "attention_window_end", "attention_window_multiple"),
    *("patience", "cycles", "order_seed"),
    *RUN_KEYS,
    *BATCH_KEYS,
}
"""Settings that are whole numbers."""
WHOLE_LISTS = {"seqlens", "boundaries", "boundaries_tokens", "table"}
"""Settings that are lists of whole numbers, or of lists of them."""
CONTROLS = ("batch_warmup",)
DEALINGS = {"pack": "dealing", "truncate": "truncate"}
"""`dealing` in [curriculum] -> the planner."""


def tables_of(name: str, keywords: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """([curriculum], [batch], the end) of the keywords of a constructor, with the defaults of what is not given.

    Raises ConfigError for a keyword that it does not have.
    """
    own = {key: keywords.get(key, parameter.default) for key, parameter in parameters_of(name).items()}
    unknown = keywords.keys() - {*own, *RUN_KEYS, *BATCH_KEYS, *COMMON_KEYS}
    if unknown:
        raise ConfigError(
            f"Schedule.{name} knows no such keyword",
            found=", ".join(f"{key} not used" for key in sorted(unknown)),
            allowed=", ".join([*own, *RUN_KEYS, *BATCH_KEYS, *COMMON_KEYS]),
        )
    given = {key: value for key, value in own.items() if value is not None and value is not inspect.Parameter.empty}
    common, batch, end = (
        {key: keywords[key] for key in keys if key in keywords} for keys in (COMMON_KEYS, BATCH_KEYS, RUN_KEYS)
    )
    return {"pacing": name, **given, **common}, batch, end


def build(curriculum: dict[str, Any], batch: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """The fields of the `Schedule` of these tables; see `Schedule.from_settings`."""
    curriculum, batch, run = _whole(curriculum), _whole(batch), _whole(run)
    settings = {key: value for key, value in curriculum.items() if value is not None}
    size = {key: batch.get(key) for key in BATCH_KEYS}
    end = end_of_run(run.get("total_tokens"), run.get("epochs"), run.get("max_epochs"))
    made = {**end, "settings": {"curriculum": dict(settings), "batch": size}}
    name = settings.pop("pacing", "constant")
    if name == "buckets":
        phases = _bucket_phases(settings, size, end)
        return {**made, "planner": "buckets", "phases": phases, "seqlen_to_come": settings["seqlen_end"]}
    control = _choice(settings, "control", None, CONTROLS)
    if control and name == "adaptive":
        raise ConfigError(
            "a batch warmup matches tokens a step that are known beforehand",
            found=f"control = {control!r} of an adaptive length",
            remedy='to match a run that is done, write its lengths as a table: pacing = "table"',
        )
    dealing = _choice(settings, "dealing", "pack", tuple(DEALINGS))
    if name == "adaptive" and dealing == "truncate" and end["epochs"]:
        raise ConfigError(
            "where an adaptive length is cut out of full-length rows, what an epoch serves is not known beforehand",
            found=f"epochs = {end['epochs']}",
            remedy="set total_tokens in place of epochs",
        )
    made["first_piece"] = _choice(settings, "first_piece", "random", ("random", "beginning"))
    made["attention_window_positions"] = _choice(settings, "attention_window_positions", "kept", ("kept", "restart"))
    if name == "adaptive":
        made["seqlen_to_come"] = settings.get("seqlen_end")
        pacing = _adaptive(settings)
    else:
        check_fit(name, settings)
        pacing = PACINGS[name](**settings)
    phases = lay_out(pacing, batch_size(pacing, **size))
    return {
        **made,
        "planner": DEALINGS[dealing],
        "phases": batch_warmup(phases) if control else phases,
    }


def buckets_of(settings: dict[str, Any]) -> Buckets:
    """The decomposition of a schedule's settings."""
    given = {key: value for key, value in settings["curriculum"].items() if key not in ("pacing", BUCKET_SEQUENCES)}
    return Buckets(batch_tokens=settings["batch"]["global_batch_tokens"], **given)


def notches_of(settings: dict[str, Any] | None) -> Notches | None:
    """When an adaptive schedule's length rises; None for any other."""
    if settings is None or settings["curriculum"].get("pacing") != "adaptive":
        return None
    known = parameters_of("adaptive")
    return Notches(**{key: value for key, value in settings["curriculum"].items() if key in known})


def parameters_of(name: str) -> dict[str, inspect.Parameter]:
    """What the pacing `name` takes; raises ConfigError for one that is unknown."""
    if name not in MAKERS:
        raise ConfigError("unknown pacing", found=name, allowed=", ".join(MAKERS))
    parameters = inspect.signature(MAKERS[name]).parameters
    return {key: parameter for key, parameter in parameters.items() if key != "batch_tokens"}  # which is in [batch]


def check_fit(name: str, settings: dict[str, Any]) -> None:
    """Raise ConfigError where a parameter of the pacing `name` is missing, or one in `settings` is not used by it."""
    parameters = parameters_of(name)
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in settings]
    surplus = [key for key in settings if key not in parameters]
    away = " ".join(f"curriculum.{key}=" for key in surplus)
    if missing or surplus:
        raise ConfigError(
            f"[curriculum] does not fit pacing {name!r}",
            found=", ".join([f"{key} missing" for key in missing] + [f"{key} not used" for key in surplus]),
            allowed=", ".join(parameters),
            remedy=f"take away what is not used: {away}" if surplus else None,
        )


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


def end_of_run(total_tokens: int | None, epochs: int | None, max_epochs: int | None) -> dict[str, Any]:
    """The fields of a schedule that say where it ends; raises ConfigError for none or both."""
    exactly_one(total_tokens=total_tokens, epochs=epochs)
    max_epochs = 1 if max_epochs is None else max_epochs
    require_positive(max_epochs=max_epochs)
    if (total_tokens or 0) >= MOST_TOKENS:
        raise ConfigError("total_tokens cannot be counted", found=total_tokens, allowed=f"below {MOST_TOKENS:,}")
    return {"total_tokens": total_tokens, "epochs": epochs, "max_epochs": max_epochs}


def exactly_one(**values: int | None) -> None:
    """Raise ConfigError unless exactly one is given, and positive."""
    names = " and ".join(values)
    given = {name: value for name, value in values.items() if value is not None}
    if len(given) != 1:
        raise ConfigError(f"give exactly one of {names}", found=", ".join(given) or "none of them")
    require_positive(**given)


def _whole(table: dict[str, Any]) -> dict[str, Any]:
    """With the whole numbers as Python's, so that they are plain JSON; raises ConfigError for one that is not."""
    for key, value in table.items():
        if key in WHOLE and value is not None:
            try:
                table = {**table, key: operator.index(value)}
            except TypeError:
                raise ConfigError(f"{key} is a whole number", found=repr(value), allowed="such as 1_000") from None
            if isinstance(value, bool):
                raise ConfigError(f"{key} is a whole number", found=value, allowed="such as 1_000")
        elif key in WHOLE_LISTS and value is not None:
            table = {**table, key: _whole_list(key, value)}
    return table


def _whole_list(key: str, value: Any) -> Any:
    try:
        numbers = np.asarray(value)
    except ValueError:  # rows of several lengths: for the pacing to say
        return value
    whole = numbers.dtype.kind in "iu" or all(type(number) is int for number in numbers.flat)  # beyond 64 bits
    if not (numbers.ndim and whole):
        raise ConfigError(f"{key} is a list of whole numbers", found=repr(value)[:80])
    return numbers.tolist()


def _choice(settings: dict[str, Any], key: str, default: str | None, allowed: tuple[str, ...]) -> Any:
    value = settings.pop(key, default)
    if value not in (default, *allowed):
        raise ConfigError(f"unknown {key}", found=value, allowed=", ".join(allowed))
    return value


def _adaptive(settings: dict[str, Any]) -> Pacing:
    """The length that holds until a validation raises it."""
    now = settings.pop(SEQLEN_NOW, None)
    check_fit("adaptive", settings)
    return ramps.constant(seqlen=now or Notches(**settings).seqlen_start)


def _bucket_phases(settings: dict[str, Any], size: dict[str, int | None], end: dict[str, Any]) -> Phases:
    """Known once the store is: its sequences in each bucket are added to the settings then."""
    sequences = settings.pop(BUCKET_SEQUENCES, None)
    check_fit("buckets", settings)
    if size["global_batch_tokens"] is None or size["global_batch_sequences"] is not None:
        raise ConfigError("buckets have as many tokens in every batch", allowed="global_batch_tokens alone")
    buckets = Buckets(batch_tokens=size["global_batch_tokens"], **settings)
    if sequences is None:
        return Phases.of(())
    return buckets.phases(sequences, end["epochs"] or end["max_epochs"], end["total_tokens"])


def as_toml(tables: dict[str, dict[str, Any]]) -> str:
    """TOML of tables of numbers, strings, true and false, and lists of such; None is left out."""
    lines: list[str] = []
    for name, table in tables.items():
        given = {key: value for key, value in table.items() if value is not None}
        if given:
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in given.items()), ""]
    return "\n".join(lines)
