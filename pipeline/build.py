"""Units -> shards -> manifest. A killed build resumes by unit; the manifest, written last, is the commit.

Shards are numbered by their unit and depend on it alone: the bytes are the same whoever builds it, and in any order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.draft import Draft, holds_else
from pipeline.errors import ConfigError, StoreError
from pipeline.files import STDIN
from pipeline.format import MANIFEST_NAME, Manifest
from pipeline.job import BuildOptions, Job
from pipeline.place import is_there, remove_tree
from pipeline.repair import repair
from pipeline.unit import BAD_KEPT, UnitResult
from pipeline.verify import verify
from pipeline.vocabulary import unknown_share

Report = Callable[[UnitResult, int], None]
"""Called after each unit with its result and the number of all units."""


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """What `build` did."""

    manifest: Manifest
    already_built: bool
    repaired: int
    """Damaged files of a finished store that were built again."""
    encoder: str
    encoder_reason: str
    unknown_share: float
    """Share of a sample's tokens that stand for text the tokenizer does not know; 0 where nothing was built."""
    text_bytes: int
    """Bytes of text encoded by this call, not by an earlier one that it went on with."""
    tokens: int
    seconds: float
    bad: int
    bad_examples: list[str]


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What `build_task` did."""

    units: int
    """Units of this task."""
    built: int
    """Those that this call built; the others were done before."""
    text_bytes: int
    tokens: int
    seconds: float
    bad: int
    bad_examples: list[str]


def build(options: BuildOptions, report: Report = lambda result, units: None, *, force: bool = False) -> BuildResult:
    """Build or go on building the store `options.out`; read and, where it is damaged, mend a finished one.

    With `force` what is there is deleted first, once the inputs and the tokenizer can be read.
    Raises CorpusError, TokenizerError, ConfigError for what it was given, StoreError where `out` is something else.
    """
    started = time.monotonic()
    job = Job(options)
    if not force and is_there(options.out / MANIFEST_NAME):
        return _mend(job, report, started)
    job.prepare()  # what is refused here has made and deleted nothing
    if force:
        remove(options.out)
    with job.draft.lock():
        if not is_there(options.out / MANIFEST_NAME):
            done = job.begin()
            fresh = []
            for result in job.run([(i, unit) for i, unit in enumerate(job.units) if i not in done]):
                fresh.append(result)
                done[result.unit] = result
                report(result, len(job.units))
            manifest = job.draft.commit(job.plan, done)
            return _result(job, manifest, fresh, started)
    return _mend(job, report, started)  # another build was quicker


def build_task(
    options: BuildOptions, task: int, tasks: int, report: Report = lambda result, units: None
) -> TaskResult:
    """Build the units u of the store with u % tasks == task % tasks; `finalize` commits once all are done.

    So `task` may count from 0 or from 1, and tasks may run anywhere, in any order, at the same time and twice.
    Raises as `build` does.
    """
    started = time.monotonic()
    if not 0 <= task <= tasks or tasks < 1:
        raise ConfigError(
            "no such task", found=f"{task}/{tasks}", allowed="i/n with i from 0 to n - 1 or from 1 to n"
        )
    if STDIN in options.inputs:
        raise ConfigError("a task cannot read standard input", allowed="files: every task splits the same ones")
    job = Job(options)
    units, fresh = 0, []
    if is_there(options.out / MANIFEST_NAME):
        job.finished()
    else:
        job.prepare()
        with job.draft.lock(shared=True):
            done = job.begin()
            mine = [(i, unit) for i, unit in enumerate(job.units) if i % tasks == task % tasks]
            units = len(mine)
            for result in job.run([(i, unit) for i, unit in mine if i not in done]):
                fresh.append(result)
                report(result, units)
    return TaskResult(units=units, built=len(fresh), **_work(fresh, started))


def finalize(out: Path) -> Manifest:
    """Commit the store whose units the tasks of an array job built; once that is done, it does nothing.

    Raises StoreError where units are missing, and says which; CorpusError where there is no document to train on.
    """
    if is_there(out / MANIFEST_NAME):
        return Manifest.load(out)
    draft = Draft(out)
    if (plan := draft.plan()) is None:
        raise StoreError(
            "no build here to finalize",
            where=out,
            remedy="first its tasks: slw-prep build ... --task i/n --out STORE",
        )
    with draft.lock():
        if is_there(out / MANIFEST_NAME):  # another was quicker
            draft.clear()
            return Manifest.load(out)
        return draft.commit(plan, draft.done())


def remove(store: Path) -> None:
    """Delete a store or an unfinished build. Raises StoreError for a folder that is neither."""
    if not store.exists():
        return
    if store.is_file():
        raise StoreError(
            "not a store but a file: --force leaves it alone", where=store, remedy="choose another --out"
        )
    if holds_else(store):
        raise StoreError("not a store: --force leaves it alone", where=store, remedy="choose another --out")
    remove_tree(store)


def _mend(job: Job, report: Report, started: float) -> BuildResult:
    manifest = job.finished()
    out = job.options.out
    damaged = {damage.file for damage in verify(out)}
    fresh = []
    if damaged or is_there(job.draft.folder):  # the folder: a build was killed after its commit, or a repair
        with job.draft.lock():
            if damaged:
                job.prepare()
                count = len({shard.unit for shard in manifest.shards if shard.file in damaged})
                for result in repair(manifest, damaged, job.units, job.unit_options(), job.run):
                    fresh.append(result)
                    report(result, count)
            job.draft.clear()
    return _result(job, manifest, fresh, started, already_built=True, repaired=len(damaged))


def _result(
    job: Job,
    manifest: Manifest,
    results: list[UnitResult],
    started: float,
    *,
    already_built: bool = False,
    repaired: int = 0,
) -> BuildResult:
    choice = job.choice
    return BuildResult(
        manifest=manifest,
        already_built=already_built,
        repaired=repaired,
        encoder=choice.name if choice else "",
        encoder_reason=choice.reason if choice else "",
        unknown_share=unknown_share(job.vocabulary, job.sample),
        **_work(results, started),
    )


def _work(results: list[UnitResult], started: float) -> dict[str, Any]:
    return {
        "text_bytes": sum(result.text_bytes for result in results),
        "tokens": sum(shard.tokens for result in results for shard in result.shards),
        "seconds": time.monotonic() - started,
        "bad": sum(result.bad for result in results),
        "bad_examples": [example for result in results for example in result.bad_examples][:BAD_KEPT],
    }
