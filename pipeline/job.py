"""A build's options, and what follows from them: input files, tokenizer, units, encoder and the draft store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.ahead import in_thread
from pipeline.corpus import documents, split_units
from pipeline.documents import Reading, Unit
from pipeline.draft import BuildPlan, Draft, holds_else, same_parameters
from pipeline.engine import Crew, run_units
from pipeline.errors import ConfigError, StoreError
from pipeline.files import STDIN, looking_ahead
from pipeline.fingerprint import fingerprints
from pipeline.format import BUILD_FOLDER, Manifest
from pipeline.held_out import check_fraction
from pipeline.inputs import InputFile, find_files
from pipeline.place import reaching
from pipeline.proof import Choice, choose_encoder
from pipeline.unit import Task, UnitOptions, UnitResult
from pipeline.vocabulary import Vocabulary, load_vocabulary, manifest_of

SAMPLE_DOCUMENTS = 120
SAMPLE_CHARACTERS = 600
SAMPLE_BYTES = 1 << 17


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What a build is asked for."""

    inputs: tuple[str, ...]
    sources: tuple[tuple[str, str], ...] = ()
    """Name and path of each input of a store of named sources; then there are no `inputs`."""
    tokenizer: Path
    out: Path
    reading: Reading = field(default_factory=Reading)
    eod: str | None = None
    bos: str | None = None
    validation_fraction: float = 0.0
    unit_bytes: int = 64 << 20
    engine: str | None = None
    """A key of `pipeline.engine.ENGINES`; None: this process for one worker, else local processes."""
    workers: int = 1
    ray_address: str | None = None
    skip_bad: bool = False
    encoder: str = "auto"


class Job:
    """One build: what goes in, and the draft it goes into."""

    def __init__(self, options: BuildOptions) -> None:
        _check(options)
        self.options = options
        self.draft = Draft(options.out)
        tokens = {"eod": options.eod, "bos": options.bos}
        self._vocabulary = in_thread(partial(load_vocabulary, options.tokenizer, encoder=options.encoder, **tokens))
        self.files = find_files(options.inputs, options.reading, options.sources)
        self.units: list[Unit] = []
        self.sample: list[str] = []
        self.choice: Choice | None = None
        with reaching(options.out):
            _check_output(options.out)

    @property
    def vocabulary(self) -> Vocabulary:
        """Loaded while the input is looked at; waits for it. Raises TokenizerError."""
        return self._vocabulary.result()

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """All that decides the bytes of the store."""
        return _parameters(self.options, self.vocabulary, self.files)

    def finished(self) -> Manifest:
        """The manifest of the finished store, if it is this job's."""
        if STDIN in self.options.inputs:
            raise StoreError(
                "the output exists, and standard input cannot be compared with what it was built from",
                where=self.options.out,
                remedy="choose another --out, or build it anew: --force",
            )
        manifest = Manifest.load(self.options.out)
        same_parameters(manifest.parameters, self.parameters, self.options.out)
        return manifest

    def prepare(self) -> None:
        """Split the input, begin to choose the encoder and plan: all that may be refused before there is a folder.

        Waits for the encoder only where it may be refused.
        """
        self.units = split_units(self.files, self.options.unit_bytes, self.options.reading)
        self.sample, wanted = _sample(self.units, self.options), self.options.encoder
        self.choice = Choice(lambda: choose_encoder(self.vocabulary, self.sample, wanted))
        if wanted == "fastokens":
            self.choice.name  # noqa: B018
        self.plan = BuildPlan(manifest=manifest_of(self.vocabulary, self.parameters), units=len(self.units))

    def begin(self) -> dict[int, UnitResult]:
        """Write the plan that was prepared, or join it; returns the units that are done."""
        self.draft.begin(self.plan, self.vocabulary.data)
        return {} if STDIN in self.options.inputs else self.draft.done()

    def run(self, tasks: list[Task], unit_options: UnitOptions | None = None) -> Iterator[UnitResult]:
        """Build units by the engine that was asked for, into the store where `unit_options` do not say otherwise."""
        options = self.options
        engine = options.engine or ("processes" if options.workers > 1 and len(tasks) > 1 else "inline")
        crew = Crew(workers=options.workers, ray_address=options.ray_address)
        return run_units(engine, tasks, unit_options or self.unit_options(), crew)

    def unit_options(self) -> UnitOptions:
        """What its units have in common; the encoder may still be chosen."""
        assert self.choice is not None, "not prepared"
        options = self.options
        return UnitOptions(
            out=options.out,
            sidecars=options.out / BUILD_FOLDER,
            reading=options.reading,
            vocabulary=self.vocabulary,
            encoder=self.choice,
            validation_fraction=options.validation_fraction,
            unit_bytes=options.unit_bytes,
            skip_bad=options.skip_bad,
        )


def _check(options: BuildOptions) -> None:
    check_fraction(options.validation_fraction)
    if options.unit_bytes < 1 or options.workers < 1:
        found = f"--unit-bytes {options.unit_bytes} --workers {options.workers}"
        raise ConfigError("unit size and workers must be positive", found=found, allowed="1 or more")
    if STDIN in options.inputs and options.engine not in (None, "inline"):
        raise ConfigError("standard input is read in this process", found=f"--engine {options.engine}")
    if options.reading.max_record_bytes < 1:
        found = f"--max-record-bytes {options.reading.max_record_bytes}"
        raise ConfigError("no record is that short", found=found, allowed="1 or more, such as 256M")
    if options.reading.separator == "":
        raise ConfigError("the separator is empty", allowed="any text, such as '<|endoftext|>'")


def _check_output(out: Path) -> None:
    """Raise StoreError where `out` is there, and neither a store nor one in the making."""
    if out.is_file():
        raise StoreError("the output is a file", where=out, allowed="a folder", remedy="choose another --out")
    if holds_else(out):
        raise StoreError(
            "the output exists and is no store", where=out, remedy="choose another --out, or empty the folder"
        )


def _parameters(options: BuildOptions, vocabulary: Vocabulary, files: list[InputFile]) -> dict[str, Any]:
    """All that decides the bytes of the store. Not `skip_bad`: a finished unit is the same with and without."""
    fields = dict(options.reading.text_fields)
    return {
        "files": [[file.path, file.size, look] for file, look in zip(files, fingerprints(files), strict=True)],
        "sources": [list(pair) for pair in Counter(file.source for file in files).items()],
        "tokenizer": vocabulary.digest,
        "eod_id": vocabulary.eod_id,
        "bos_id": vocabulary.bos_id,
        "text_field": {"": options.reading.text_field, **fields} if fields else options.reading.text_field,
        "id_field": options.reading.id_field,
        "format": options.reading.format,
        "max_record_bytes": options.reading.max_record_bytes,
        "separator": options.reading.separator,
        "validation_fraction": options.validation_fraction,
        "unit_bytes": options.unit_bytes,
    }


def _sample(units: list[Unit], options: BuildOptions) -> list[str]:
    """The beginnings of documents from the first, middle and last unit."""
    chosen = [units[i] for i in sorted({0, len(units) // 2, len(units) - 1})]
    each = SAMPLE_DOCUMENTS // len(chosen)
    found = (documents(unit, options.reading, lambda error: None, SAMPLE_BYTES) for unit in chosen)
    texts = (islice((text for batch in part for text in batch.texts), each) for part in found)
    with looking_ahead():
        return [text[:SAMPLE_CHARACTERS] for part in texts for text in part]
