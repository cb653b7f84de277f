"""A run's TOML file with `key=value` overrides, checked; an unknown key is refused with the nearest known one."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.errors import ConfigError
from train.config import Bare, Config, Section, SourceConfig
from train.config_layers import lay_over, make_room, place_of, read_layers
from train.habits import SAYS_THE_SAME


def load_config(
    path: Path, overrides: Iterable[str] = (), translated: tuple[dict[str, Any], dict[str, int]] | None = None
) -> Config:
    """Read TOML at `path` and apply overrides such as `optimizer.lr=1e-3`.

    `translated`: [curriculum] and [batch] of `curriculum.deepspeed.translate`; they take the place of the file's.

    A file may say `base = "other.toml"`, relative to its own folder: its keys replace those there, one by one.
    `key=` takes a key away, or a whole table: `mixture.wiki=`. Raises ConfigError: no such file, no TOML, an unknown
    key, a value that is not allowed, or values that do not make a schedule together.
    """
    data, files = read_layers(path)
    where = " on ".join(map(str, files))
    if translated is not None:
        curriculum, batch = translated
        data = lay_over({**data, "curriculum": curriculum}, {"batch": batch})
    given = [_override(data, override) for override in overrides]
    make_room(data, set(given))
    if given:
        where = f"{where} and the command line"
    config = parse_config(data, where=where, files=files, given=given)
    try:
        config.schedule()
    except ConfigError as error:
        raise error.within(where) from error
    return config


def parse_config(
    data: dict[str, Any], *, where: str, files: Sequence[Path] = (), given: Sequence[str] = ()
) -> Config:
    """Check `data` against `Config`; raises ConfigError naming the key, what is allowed, and where it was found.

    That is a line of `files`, or the command line, whose keys are `given`; `where` is for what is in neither.
    """
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise _explained([dict(one) for one in error.errors()], where, files, given) from error


def known_keys() -> list[str]:
    """All dotted keys of a config: store, model.preset, ..."""
    keys = []
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            keys += [f"{name}.{key}" for key in section.model_fields]
        elif name == "mixture":
            keys += [f"mixture.NAME.{key}" for key in SourceConfig.model_fields]
        else:
            keys.append(name)
    return keys


def _override(data: dict[str, Any], text: str) -> str:
    """Apply key=value to `data`; returns the full key."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError("an override is key=value", found=text, allowed="for example optimizer.lr=1e-3")
    key, value = key.strip(), value.strip()
    if not value and _take_table(data, key):
        return key
    mixed = key.startswith("mixture.") and key.count(".") > 1
    if not mixed and key not in known_keys():
        ends = [known for known in known_keys() if known.endswith(f".{key}")]
        if len(ends) != 1:
            raise _unknown(key, "the command line")
        key = ends[0]
    *sections, leaf = key.split(".")
    if mixed:
        sections, leaf = ["mixture", key.removeprefix("mixture.").rpartition(".")[0]], key.rpartition(".")[2]
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise ConfigError(
                f"{section} is a table", where="the config file", found=data, remedy=f"write [{section}]"
            )
    if value:
        data[leaf] = _parse_value(value)
    else:
        data.pop(leaf, None)
    return key


def _take_table(data: dict[str, Any], key: str) -> bool:
    """Take a section, or a source of the mixture, out of `data`; False where `key` is neither."""
    if any(known.startswith(f"{key}.") for known in known_keys()):
        data.pop(key, None)
        return True
    section, _, source = key.partition(".")
    sources = data.get(section)
    if section != "mixture" or not isinstance(sources, dict) or source not in sources:
        return False
    del sources[source]
    return True


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return Bare(text)  # run.dir=runs/a


def _place(key: tuple[str | int, ...], files: Sequence[Path], given: Sequence[str]) -> str | None:
    """Where the value of `key` comes from; None where nothing says."""
    dotted = ".".join(map(str, key)) + "."
    if any(dotted.startswith(f"{one}.") for one in given):
        return "the command line"
    place = place_of(key, files)
    return f"{place}, and the command line" if place and any(one.startswith(dotted) for one in given) else place


def _unknown(key: str, where: str) -> ConfigError:
    keys = known_keys()
    if any(known.startswith(f"{key}.") for known in keys):
        return _no_table(key, key, where)
    table, dot, _ = key.partition(".")
    name = key.rsplit(".", maxsplit=1)[-1]
    leaves = {known.split(".")[-1]: known for known in keys}
    tables = {known.partition(".")[0] for known in keys if "." in known}
    close = (
        [SAYS_THE_SAME[name]] if name in SAYS_THE_SAME else difflib.get_close_matches(key, [*keys, *tables], 1, 0.6)
    )
    close = close or [leaves[leaf] for leaf in difflib.get_close_matches(name, list(leaves), 1, 0.6)]
    beside = [known for known in keys if dot and known.startswith(f"{table}.")]
    return ConfigError(
        "unknown key",
        where=where,
        found=key,
        allowed=", ".join(beside or keys) if beside or not close else None,
        remedy=f"did you mean {close[0]}?" if close else None,
    )


def _no_table(found: str, key: str, where: str) -> ConfigError:
    keys = [known.replace("mixture.NAME", key) if "." in key else known for known in known_keys()]
    inside = ", ".join(known for known in keys if known.startswith(f"{key}."))
    return ConfigError("a table, not a value", where=where, found=found, allowed=inside)


def _explained(errors: list[dict[str, Any]], where: str, files: Sequence[Path], given: Sequence[str]) -> ConfigError:
    """The first of what pydantic found, and how many others there are."""
    errors = sorted(errors, key=lambda one: one["type"] != "extra_forbidden")  # a typo is why another key is missing
    error, keys = errors[0], [_key(error["loc"]) for error in errors]
    key, others = keys[0], len(set(keys)) - 1
    where = _place(error["loc"], files, given) or where
    if error["type"] == "extra_forbidden":
        return _unknown(key, where)
    if error["type"] in ("model_type", "dict_type"):
        return _no_table(f"{key} = {error['input']!r}", key, where)
    more = f"there are {others + 1} such errors; this is the first" if others else None
    if error["type"] == "missing":
        return ConfigError(f"{key} is missing", where=where, remedy=more)
    if error["type"] == "value_error":  # of a check of ours: it says what was found and what may be
        what = error["msg"].removeprefix("Value error, ")
        return ConfigError(f"bad value of {key or 'the config'}: {what}", where=where, remedy=more)
    kinds = [
        "a path" if one["type"] == "path_type" else one["msg"]
        for one, its in zip(errors, keys, strict=True)
        if its == key
    ]  # of a union, each
    return ConfigError(
        f"bad value of {key or 'the config'}",
        where=where,
        found=None if isinstance(error["input"], dict) else error["input"],
        allowed=" or ".join(kind.removeprefix("Input should be ") for kind in kinds),
        remedy=more,
    )


def _key(place: tuple[str | int, ...]) -> str:
    """The dotted key of a place that pydantic names, without the member of a union that it tried."""
    depth = 3 if place[:1] == ("mixture",) else 2
    return ".".join(str(part) for i, part in enumerate(place) if i < depth or isinstance(part, int))
