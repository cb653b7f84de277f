"""A config file laid over another: `base = "base.toml"` at its top, relative to its own folder.

Keys replace the base's one by one, tables are gone into; a base may have a base. So what an arm of an experiment
changes is all that its file says.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError

ONE_OF = (
    {"run.total_tokens", "run.epochs"},
    {"batch.global_batch_sequences", "batch.global_batch_tokens"},
    {"curriculum.duration_steps", "curriculum.duration_tokens", "curriculum.attention_window_rate"},
    {"curriculum.boundaries", "curriculum.boundaries_tokens"},
)
"""Groups of which one key is given: an override, or a file laid over another, replaces whichever is there."""

EXAMPLE = """\
store = "shards/books"
[curriculum]
pacing = "linear"
seqlen_start = 8
seqlen_end = 1024
duration_steps = 10_000
[batch]
global_batch_sequences = 512
[run]
dir = "runs/slw"
epochs = 1
"""
"""The fewest keys of a run, for whoever has no config yet."""


def read_layers(path: Path, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], list[Path]]:
    """The tables of a TOML file laid over those of its base; and the files, this one first.

    `above`: the files that led here. Raises ConfigError: no such file, no TOML, a file that is its own base.
    """
    if not path.is_file():
        remedy = f"`base` is relative to the folder of {above[-1]}" if above else f"a small one:\n\n{EXAMPLE}"
        raise ConfigError("no config file here", where=path, remedy=remedy)
    if any(path.samefile(file) for file in above):
        raise ConfigError("a config is its own base", where=path, found=" -> ".join(map(str, (*above, path))))
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        deepspeed = "if it is a DeepSpeed config: slw-train plan --deepspeed FILE" if path.suffix == ".json" else None
        raise ConfigError("not TOML", where=path, found=error, remedy=deepspeed) from error
    base = data.pop("base", None)
    if base is None:
        return data, [path]
    if not isinstance(base, str):
        raise ConfigError("base names a TOML file", where=path, found=base, allowed='such as base = "base.toml"')
    below, files = read_layers(path.parent / base, (*above, path))
    return lay_over(below, data), [path, *files]


def lay_over(below: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """The tables of `data` over those `below`, from which goes what they replace."""
    make_room(below, {f"{name}.{key}" for name, table in data.items() if isinstance(table, dict) for key in table})
    return _laid_over(below, data)


def make_room(data: dict[str, Any], given: set[str]) -> None:
    """Take out of `data` the keys in whose place another of ONE_OF is given."""
    for group in ONE_OF:
        for key in group - given if group & given else ():
            section, _, leaf = key.partition(".")
            if isinstance(table := data.get(section), dict):
                table.pop(leaf, None)


def place_of(key: Iterable[str | int], files: Iterable[Path]) -> str | None:
    """FILE, line N: where `key` is, or as much of its beginning as is anywhere; None: nowhere.

    Of several files the first that has most of it.
    """
    asked = tuple(map(str, key))
    most, place = 0, None
    for file in files:
        table: tuple[str, ...] = ()
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
            header = line.lstrip().startswith("[")
            names = _names(line) if header else table + _names(line.partition("=")[0] + "= 0")
            if len(names) > most and names == asked[: len(names)]:
                most, place = len(names), f"{file}, line {number}"
            table = names if header and names else table
    return place


def _names(toml: str) -> tuple[str, ...]:
    """("a", "b") of "[a.b]" and of "a.b = 0"; none of what is not TOML by itself."""
    names: tuple[str, ...] = ()
    try:
        found: Any = tomllib.loads(toml)
    except tomllib.TOMLDecodeError:
        return names
    while isinstance(found, dict) and len(found) == 1:
        ((name, found),) = found.items()
        names += (name,)
    return names


def _laid_over(below: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    merged = {**below, **data}
    for key in below.keys() & data.keys():
        if isinstance(below[key], dict) and isinstance(data[key], dict):
            merged[key] = _laid_over(below[key], data[key])
    return merged
