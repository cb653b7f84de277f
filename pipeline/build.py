"""Units -> shards -> manifest. A killed build goes on at the unit; the manifest, written last, is the commit.

    STORE/.slw-build/plan.json     what is being built: parameters and units; another build cannot go on with it
    STORE/.slw-build/00007.json    the shards that unit 7 became: written after them, so the unit is done
    STORE/.slw-build/lock          held while a build runs

Shards are numbered by their unit and depend on it alone: the bytes are the same for any number of workers.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pipeline.corpus import Reading, Unit, documents, find_files, split_units
from pipeline.encoding import Vocabulary, choose_encoder, load_vocabulary
from pipeline.errors import ConfigError, CorpusError, StoreError
from pipeline.format import FORMAT_VERSION, MANIFEST_NAME, SPLIT_FOLDERS, TOKENIZER_NAME, Manifest, ShardInfo
from pipeline.unit import BAD_KEPT, UnitOptions, UnitResult, build_units, load_result, write_json
from pipeline.writer import write_atomically

BUILD_FOLDER = ".slw-build"
SAMPLE_DOCUMENTS = 200

Report = Callable[[UnitResult, int], None]
"""Called after each unit with its result and the number of all units."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What a build is asked for."""

    inputs: tuple[str, ...]
    tokenizer: Path
    out: Path
    reading: Reading = field(default_factory=Reading)
    suffixes: tuple[str, ...] = ()
    eod: str | None = None
    bos: str | None = None
    validation_fraction: float = 0.0
    unit_bytes: int = 64 << 20
    workers: int = 1
    skip_bad: bool = False
    encoder: str = "auto"


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """What `build` did."""

    manifest: Manifest
    already_built: bool
    encoder: str
    encoder_reason: str
    text_bytes: int
    """Bytes of text encoded by this call, not by an earlier one that it went on with."""
    tokens: int
    seconds: float
    bad: int
    bad_examples: list[str]


def build(options: BuildOptions, report: Report = lambda result, units: None) -> BuildResult:
    """Build or go on building the store `options.out`.

    Raises CorpusError, TokenizerError, ConfigError for what it was given, StoreError where `out` is something else.
    """
    started = time.monotonic()
    _check(options)
    vocabulary = load_vocabulary(options.tokenizer, eod=options.eod, bos=options.bos)
    files = find_files(options.inputs, options.suffixes)
    parameters = _parameters(options, vocabulary, files)
    if (options.out / MANIFEST_NAME).exists():
        manifest = Manifest.load(options.out)
        _same_parameters(manifest.parameters, parameters, options.out)
        return _result(manifest, [], started, already_built=True)
    folder = options.out / BUILD_FOLDER
    if not folder.exists() and options.out.exists() and any(options.out.iterdir()):
        raise StoreError(
            "the output exists and is no store", where=options.out, remedy="choose another --out, or empty the folder"
        )
    units = split_units(files, options.unit_bytes, options.reading)
    with _lock(folder):
        _begin(folder, parameters)
        name, reason = choose_encoder(vocabulary, _sample(units, options), options.encoder)
        unit_options = _unit_options(options, vocabulary, name)
        done = {int(path.stem): load_result(path) for path in folder.glob("[0-9]*.json")}
        fresh = []
        for result in _run(
            [(i, unit) for i, unit in enumerate(units) if i not in done], unit_options, options.workers
        ):
            fresh.append(result)
            done[result.unit] = result
            report(result, len(units))
        manifest = _finish(options, vocabulary, parameters, [done[i] for i in range(len(units))])
        shutil.rmtree(folder)
    return _result(manifest, fresh, started, encoder=name, reason=reason)


def remove(store: Path) -> None:
    """Delete a store or an unfinished build. Raises StoreError for a folder that is neither."""
    if not store.exists():
        return
    if not (store / MANIFEST_NAME).exists() and not (store / BUILD_FOLDER).exists() and any(store.iterdir()):
        raise StoreError("not a store: --force leaves it alone", where=store, remedy="choose another --out")
    shutil.rmtree(store)


def _check(options: BuildOptions) -> None:
    if not 0 <= options.validation_fraction < 1:
        raise ConfigError(
            "odd validation fraction", found=options.validation_fraction, allowed="0 up to, not with, 1"
        )
    if options.unit_bytes < 1 or options.workers < 1:
        found = f"--unit-bytes {options.unit_bytes} --workers {options.workers}"
        raise ConfigError("unit size and workers must be positive", found=found, allowed="1 or more")
    if options.reading.separator == "":
        raise ConfigError("the separator is empty", allowed="any text, such as '<|endoftext|>'")


def _unit_options(options: BuildOptions, vocabulary: Vocabulary, encoder: str) -> UnitOptions:
    return UnitOptions(
        out=options.out,
        sidecars=options.out / BUILD_FOLDER,
        reading=options.reading,
        vocabulary=vocabulary,
        encoder=encoder,
        validation_fraction=options.validation_fraction,
        unit_bytes=options.unit_bytes,
        skip_bad=options.skip_bad,
    )


def _parameters(options: BuildOptions, vocabulary: Vocabulary, files: list[Path]) -> dict[str, Any]:
    """All that decides the bytes of the store. Not `skip_bad`: a finished unit is the same with and without."""
    return {
        "files": [[str(path), path.stat().st_size] for path in files],
        "tokenizer": vocabulary.digest,
        "eod_id": vocabulary.eod_id,
        "bos_id": vocabulary.bos_id,
        "text_field": options.reading.text_field,
        "separator": options.reading.separator,
        "validation_fraction": options.validation_fraction,
        "unit_bytes": options.unit_bytes,
    }


def _same_parameters(there: dict[str, Any], asked: dict[str, Any], where: Path) -> None:
    names = [name for name in asked if there.get(name) != asked[name]]
    if names:
        raise StoreError(
            "the output exists and was built from something else",
            where=where,
            found="; ".join(_difference(name, there.get(name), asked[name]) for name in names),
            remedy="choose another --out, or build it anew: --force",
        )


def _difference(name: str, there: Any, asked: Any) -> str:
    if name == "files" and isinstance(there, list):
        extra = [f"{path} ({size} bytes)" for path, size in asked if [path, size] not in there]
        gone = [f"{path} ({size} bytes)" for path, size in there if [path, size] not in asked]
        sides = ((gone, "there"), (extra, "asked"))
        return f"{name}: " + ", ".join(
            f"{len(side)} only {where}, such as {side[0]}" for side, where in sides if side
        )
    return f"{name}: {there} there, {asked} asked"


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / "lock").open("w")
    except OSError as error:
        raise StoreError(
            "cannot write here", where=folder.parent, found=error, remedy="choose another --out"
        ) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError("another build of this store is running", where=folder.parent, remedy="wait") from None
        yield


def _begin(folder: Path, parameters: dict[str, Any]) -> None:
    """Go on with the plan that is there, or make it. One of which no unit is done is replaced: nothing is lost."""
    plan = folder / "plan.json"
    if plan.exists() and any(folder.glob("[0-9]*.json")):
        _same_parameters(json.loads(plan.read_bytes()), parameters, folder.parent)
    else:
        write_atomically(plan, lambda path: write_json(path, parameters))


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _sample(units: list[Unit], options: BuildOptions) -> list[str]:
    """Documents from the first, middle and last unit."""
    chosen = [units[i] for i in sorted({0, len(units) // 2, len(units) - 1})]
    each = SAMPLE_DOCUMENTS // len(chosen)
    found = (documents(unit, options.reading, lambda error: None) for unit in chosen)
    texts = (islice((text for batch in part for text in batch.texts), each) for part in found)
    return [text[:100_000] for part in texts for text in part]


def _run(tasks: list[tuple[int, Unit]], options: UnitOptions, workers: int) -> Iterator[UnitResult]:
    if workers == 1 or len(tasks) <= 1:
        yield from build_units(tasks, options)
        return
    with ProcessPoolExecutor(min(workers, len(tasks)), get_context("spawn")) as pool:
        futures = [pool.submit(_one, task, options) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _one(task: tuple[int, Unit], options: UnitOptions) -> UnitResult:
    return next(build_units([task], options))


def _finish(
    options: BuildOptions, vocabulary: Vocabulary, parameters: dict[str, Any], results: list[UnitResult]
) -> Manifest:
    shards = [shard for result in results for shard in result.shards]
    if not any(shard.split == "train" for shard in shards):
        _discard(options.out, shards)
        raise CorpusError(
            "no document to train on: the corpus is empty",
            where=", ".join(options.inputs[:3]),
            found=f"{sum(r.bad for r in results)} bad and {sum(r.empty for r in results)} empty records",
            remedy="check the input, --text-field and --validation-fraction",
        )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        tokenizer_digest=vocabulary.digest,
        vocab_size=vocabulary.size,
        token_dtype=str(vocabulary.dtype),
        eod_id=vocabulary.eod_id,
        bos_id=vocabulary.bos_id,
        shards=shards,
        parameters=parameters,
        skipped=sum(result.bad + result.empty for result in results),
    )
    write_atomically(options.out / TOKENIZER_NAME, lambda path: _write_bytes(path, vocabulary.data))
    write_atomically(options.out / MANIFEST_NAME, lambda path: write_json(path, manifest.to_json()))
    return manifest


def _discard(store: Path, shards: list[ShardInfo]) -> None:
    """Take back a build that made nothing to train on, and nothing else that may be there."""
    for shard in shards:
        (store / shard.file).unlink()
    shutil.rmtree(store / BUILD_FOLDER)
    for folder in (*(store / name for name in SPLIT_FOLDERS.values()), store):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _result(
    manifest: Manifest,
    results: list[UnitResult],
    started: float,
    *,
    already_built: bool = False,
    encoder: str = "",
    reason: str = "",
) -> BuildResult:
    return BuildResult(
        manifest=manifest,
        already_built=already_built,
        encoder=encoder,
        encoder_reason=reason,
        text_bytes=sum(result.text_bytes for result in results),
        tokens=sum(shard.tokens for result in results for shard in result.shards),
        seconds=time.monotonic() - started,
        bad=sum(result.bad for result in results),
        bad_examples=[example for result in results for example in result.bad_examples][:BAD_KEPT],
    )
