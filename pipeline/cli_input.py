"""The options that say what is read, the same for every command that reads a corpus."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import click

from pipeline.command import Bytes, Option

HEADING = "What is read"
_option = partial(click.option, cls=Option, section=HEADING)

OPTIONS = (
    click.argument("inputs", nargs=-1, metavar="[INPUT]..."),
    _option(
        "--source", "sources", multiple=True, metavar="NAME=PATH",
        help="In place of INPUT: a named source, again for more paths or names; kept as a column, for mixing.",
    ),
    _option("--format", "input_format", type=click.Choice(["jsonl", "text", "parquet", "arrow"]),
            help="What every input is, where suffixes do not say."),
    _option("--text-field", "text_fields", multiple=True, metavar="FIELD", default=["text"], show_default=True,
            help="Field or column with the text; NAME=FIELD is that of one --source."),
    _option("--id-field", help="Field or column to keep as the column `id`: a string or an integer."),
    _option("--separator", help="Split text files here; without it a file is a document."),
    _option("--suffix", "suffixes", multiple=True, help="Take such text files from folders too: .py"),
    _option("--max-record-bytes", type=Bytes(), default="256M", show_default=True,
            help="A longer line, or document of a text file, is bad: it is held in memory several times over."),
)  # fmt: skip


def input_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` the options, as `inputs`, `sources` and `reading`: see `inputs.find_files`."""

    @wraps(command)
    def call(
        *,
        sources: tuple[str, ...],
        input_format: str | None,
        text_fields: tuple[str, ...],
        id_field: str | None,
        separator: str | None,
        suffixes: tuple[str, ...],
        max_record_bytes: int,
        **more: Any,
    ) -> None:
        from pipeline.documents import Reading
        from pipeline.inputs import parse_source

        named = tuple(parse_source(text) for text in sources)
        reading = Reading(
            **_text_fields(text_fields, {name for name, _ in named}),
            id_field=id_field,
            separator=separator,
            format=input_format,
            suffixes=suffixes,
            max_record_bytes=max_record_bytes,
        )
        command(sources=named, reading=reading, **more)

    for option in reversed(OPTIONS):
        call = option(call)
    return call


def _text_fields(given: tuple[str, ...], sources: set[str]) -> dict[str, Any]:
    """`text_field` and `text_fields` of a Reading. Raises ConfigError where a source would have two."""
    from pipeline.errors import ConfigError

    pairs = [text.partition("=") for text in given]
    named = [(name, field) for name, _, field in pairs if field and name in sources]
    plain = [text for text, (name, _, field) in zip(given, pairs, strict=True) if not (field and name in sources)]
    if len(plain) > 1 or len(dict(named)) < len(named):
        raise ConfigError(
            "more than one field with the text",
            found=", ".join(given),
            allowed="one FIELD, and one NAME=FIELD for each source"
            + (f": {', '.join(sorted(sources))}" if sources else ""),
            remedy=None if sources else "name the inputs: --source NAME=PATH --text-field NAME=FIELD",
        )
    return {"text_field": plain[0] if plain else "text", "text_fields": tuple(sorted(named))}
