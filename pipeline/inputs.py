"""Finding the files of a corpus: paths, folders, patterns and URLs, in named sources or not.

Files come in the order they are named, those of a folder or pattern sorted by name, so that the same command finds
the same corpus everywhere. A file that is named twice is read once.
"""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from pipeline.documents import Reading
from pipeline.errors import ConfigError, CorpusError
from pipeline.files import STDIN, open_input
from pipeline.shell import pasted
from pipeline.urls import fetching, filesystem, has_ranges, is_remote, local_path, suffixes_of

FORMATS = {
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "text": (".txt", ".md"),
    "parquet": (".parquet",),
    "arrow": (".arrow", ".ipc", ".feather"),
}
"""What can be read, and by which suffixes it is known."""
TABLES = ("parquet", "arrow")
_NAME = re.compile(r"[\w.-]+")
_OTHER_COMPRESSIONS = {
    ".bz2": "bzip2 -dc",
    ".xz": "xz -dc",
    ".lz4": "lz4 -dc",
    ".zip": "unzip -p",
    ".tar": "tar -xOf",
}
_WRITTEN_TABLES = (".csv", ".tsv")


@dataclass(frozen=True)
class InputFile:
    """One file of the corpus."""

    path: str
    """Local path, URL, or `-` for standard input."""
    size: int
    """Bytes as stored; -1 where it cannot be read by ranges: standard input, some web servers."""
    format: str
    """A key of `FORMATS`."""
    source: str = ""


def parse_source(text: str) -> tuple[str, str]:
    """Name and path of `NAME=PATH`. Raises ConfigError."""
    name, equals, path = text.partition("=")
    if not equals or not path or not _NAME.fullmatch(name):
        raise ConfigError(
            "not a source",
            found=text,
            allowed="NAME=PATH, the name of letters, digits and _ . -",
            remedy="such as --source books=data/books.jsonl",
        )
    return name, path


def in_order(inputs: tuple[str, ...], sources: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    """(source, path) of `sources`, each name's together, in the order names come first; or of `inputs`, with no name.

    Raises ConfigError where both or neither are given.
    """
    if inputs and sources:
        raise ConfigError(
            "inputs with and without a source",
            found=f"{inputs[0]} and --source {'='.join(sources[0])}",
            allowed="INPUT... or --source NAME=PATH, not both: a store has named sources or one without a name",
            remedy=f"name it too: --source {pasted(f'NAME={inputs[0]}')}",
        )
    if not inputs and not sources:
        raise ConfigError("nothing to read", allowed="INPUT..., or --source NAME=PATH once or more")
    names = dict.fromkeys(name for name, _ in sources)
    return [pair for name in names for pair in sources if pair[0] == name] or [("", path) for path in inputs]


def find_files(
    inputs: tuple[str, ...],
    reading: Reading,
    sources: tuple[tuple[str, str], ...] = (),
    *,
    allowed: str | None = None,
) -> list[InputFile]:
    """The files of `inputs`, or of `sources` (name, path), in the order of `in_order`.

    `allowed`: what an error names as readable, where that is less than what is found here.

    Raises ConfigError as that does, and where a file is in two sources or standard input is not alone; CorpusError
    where an input does not exist, matches nothing, or cannot be read.
    """
    ordered = in_order(inputs, sources)
    if STDIN in [path for _, path in ordered] and len(ordered) > 1:
        raise ConfigError(
            "standard input beside other inputs",
            allowed="- alone: it can be read only once, from its start to its end",
        )
    sources_of = dict[str, str]()
    return [
        replace(file, source=source)
        for source, path in ordered
        for file in _expand(local_path(path), reading, allowed)
        if is_new(file.path, source, sources_of)
    ]


def is_new(path: str, source: str, sources_of: dict[str, str]) -> bool:
    """Whether no name has led to the file `path` yet; notes in `sources_of` that it is of `source`.

    Raises ConfigError where it is of another source already.
    """
    file = path if is_remote(path) else os.path.realpath(path)
    if file not in sources_of:
        sources_of[file] = source
        return True
    if sources_of[file] != source:
        raise ConfigError(
            "a file in two sources",
            where=path,
            found=f"{sources_of[file]} and {source}",
            remedy="leave it out of one; the share of a source is for the mixture to say",
        )
    return False


def _expand(name: str, reading: Reading, allowed: str | None) -> list[InputFile]:
    if name == STDIN:
        if reading.format not in ("jsonl", "text"):
            raise ConfigError(
                "standard input has no suffix",
                found=f"--format {reading.format}" if reading.format else "no --format",
                allowed="--format jsonl or text: what can be read from its start to its end",
                remedy="say what it is: --format jsonl",
            )
        return [InputFile(STDIN, -1, reading.format)]
    try:
        sizes, folder = _remote_sizes(name) if is_remote(name) else _local_sizes(name)
        if folder:
            sizes = _chosen(sizes, reading)
    except OSError as error:
        remedy = "check the URL, the credentials and the network" if is_remote(name) else "check the path"
        raise CorpusError("an input that cannot be read", where=name, found=error, remedy=remedy) from error
    if not sizes:
        known = [suffix for suffixes in FORMATS.values() for suffix in suffixes]
        raise CorpusError(
            "no input file here",
            where=name,
            found=_nothing(name, folder),
            allowed=allowed
            or f"a file, a pattern, or a folder with {', '.join((*known, *reading.suffixes))} (also .gz, .zst)",
            remedy="check the path; --suffix .py adds a kind of text file, --format FORMAT takes all files"
            if folder and not allowed
            else "check the URL, and whether it can be reached and read from here"
            if is_remote(name)
            else "check the path",
        )
    return [InputFile(path, size, _format_of(path, reading)) for path, size in sizes.items()]


def _nothing(name: str, folder: bool) -> str:
    if folder:
        return "a folder without such files"
    if not is_remote(name) and Path(name).exists():
        return "a pipe or a device: give it to the command's standard input, and - as INPUT"
    return "nothing of that name"


def _format_of(path: str, reading: Reading) -> str:
    suffix, compression = suffixes_of(path)
    by_suffix = next((name for name, suffixes in FORMATS.items() if suffix in suffixes), "text")
    found = reading.format or by_suffix
    if found in TABLES and compression:
        raise CorpusError(
            f"a compressed {found} file",
            where=path,
            allowed=f"{found} as it is: it has compression of its own",
            remedy="decompress the file first",
        )
    if suffix in _OTHER_COMPRESSIONS and not reading.format:
        raise CorpusError(
            f"a file of a kind that is not read: {suffix}",
            where=path,
            allowed="plain files, .gz and .zst",
            remedy=f"{_OTHER_COMPRESSIONS[suffix]} {pasted(path)} | slw-prep build - --format jsonl ...",
        )
    index = f"{path.removesuffix(suffix)}.idx"
    if suffix in (".bin", ".idx") and not reading.format and suffix not in reading.suffixes and Path(index).is_file():
        raise CorpusError(
            f"a file of a kind that is not read: {suffix}",
            where=path,
            found="an index beside it: token ids, as Megatron writes them",
            allowed="text",
            remedy=f"slw-prep import {pasted(index)}",
        )
    if suffix in _WRITTEN_TABLES and not reading.format and suffix not in reading.suffixes:
        copy = 'copy "{}" to "table.parquet"'.format(path.replace('"', '""'))
        raise CorpusError(
            f"a file of a kind that is not read: {suffix}",
            where=path,
            allowed="tables as .parquet or .arrow, records as .jsonl",
            remedy=f"duckdb -c {pasted(copy)}; --format text takes all of it for one text",
        )
    return found


def _local_sizes(name: str) -> tuple[dict[str, int], bool]:
    """Files and their sizes, and whether they are the contents of a folder."""
    path = Path(name)
    if path.is_dir():
        inside = [Path(root) / file for root, _, files in os.walk(path) for file in files]
        files = (p for p in inside if p.is_file() and not _hidden(p.relative_to(path).as_posix()))
        return {str(file): file.stat().st_size for file in files}, True
    matching = [name] if path.is_file() else glob.glob(name, recursive=True)  # noqa: PTH207  # patterns may be absolute
    found = [Path(match) for match in sorted(map(str, matching), key=_by_parts)]
    return {str(p): p.stat().st_size for p in found if p.is_file()}, False


def _remote_sizes(url: str) -> tuple[dict[str, int], bool]:
    files, path = filesystem(url)
    web = url.startswith(("http://", "https://"))
    folder = False
    try:
        with fetching():
            if re.search(r"\*" if web else r"[*?\[]", path):
                found = files.glob(path, detail=True)
            else:
                info = files.info(path)
                folder = info["type"] == "directory"
                found = files.find(path, detail=True) if folder else {path: info}
    except FileNotFoundError:
        return {}, False
    sizes = {}
    fixed = path if folder else re.split(r"[*?\[]", path)[0].rpartition("/")[0]
    for name in sorted(found, key=_by_parts):
        if found[name]["type"] == "file" and not (_hidden(name.removeprefix(fixed)) and name != path):
            full, size = _as_url(url, name), found[name].get("size")
            sizes[full] = int(size) if size is not None and has_ranges(full) else -1
    return sizes, folder


def _as_url(url: str, name: str) -> str:
    """`name`, a path in the filesystem of `url`, as a URL like it, with what follows in a chain."""
    parts = url.split("::")
    at = next(i for i, part in enumerate(parts) if "://" in part)
    scheme = parts[at].split("://")[0]
    parts[at] = name if name.startswith(f"{scheme}://") else f"{scheme}://{name.lstrip('/')}"
    return "::".join(parts)


def _by_parts(name: str) -> list[str]:
    return name.split("/")


def _hidden(name: str) -> bool:
    """Whether a path, relative to a folder, is a hidden file or in a hidden folder."""
    return any(part.startswith(".") for part in name.split("/"))


def _chosen(sizes: dict[str, int], reading: Reading) -> dict[str, int]:
    """The files of a folder that are read: those of Hugging Face datasets as they say, others by suffix."""
    place: dict[str, str] = {}
    dropped: set[str] = set()
    for name in sizes:
        parent, slash, base = name.rpartition("/")
        if base == "dataset_dict.json":
            dropped.add(name)
            splits = _load(name)["splits"]
            if len(splits) > 1:
                raise CorpusError(
                    "a Hugging Face dataset of several splits",
                    where=parent,
                    found=f"splits {', '.join(splits)}",
                    allowed="one of them",
                    remedy=f"name it: {pasted(f'{parent}/{splits[0]}')}",
                )
        elif base == "state.json" and f"{parent}{slash}dataset_info.json" in sizes:
            state = _load(name)
            if state.get("_indices_data_files"):
                raise CorpusError(
                    "a Hugging Face dataset that keeps an order of rows beside its rows, as old versions saved it",
                    where=name,
                    found="_indices_data_files",
                    allowed="rows in the order they are stored",
                    remedy="with `datasets` of that time: load_from_disk(), flatten_indices(), save_to_disk()",
                )
            members = [f"{parent}{slash}{file['filename']}" for file in state["_data_files"]]
            if lost := [member for member in members if member not in sizes]:
                raise CorpusError("a file of a Hugging Face dataset is missing", where=lost[0])
            place |= {member: f"{parent}{slash}{at:09d}" for at, member in enumerate(members)}
            dropped |= {other for other in sizes if other.rpartition("/")[0] == parent and other not in members}
    taken = [name for name in sizes if name not in dropped and (name in place or _wanted(name, reading))]
    return {name: sizes[name] for name in sorted(taken, key=lambda path: _by_parts(place.get(path) or path))}


def _load(path: str) -> Any:
    with open_input(path) as stream:
        try:
            return orjson.loads(stream.read())
        except orjson.JSONDecodeError as error:
            raise CorpusError("not the description of a Hugging Face dataset", where=path, found=error) from error


def _wanted(name: str, reading: Reading) -> bool:
    if reading.format:
        return True
    known = {suffix for suffixes in FORMATS.values() for suffix in suffixes} | set(reading.suffixes)
    return suffixes_of(name)[0] in known
