"""A store in the making: who may write to it, what is planned, which units are done, and the commit.

    STORE/.slw-build/plan.json     what is being built: parameters and units; another build cannot go on with it
    STORE/.slw-build/00007.json    the shards that unit 7 became: written after them, so the unit is done
    STORE/.slw-build/lock          held alone by a build, shared by the tasks of an array job
    STORE/manifest.json            written last: its presence is the commit

A store on object storage cannot be locked. There two builds of the same thing write the same bytes twice, and one of
something else is refused by the plan.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.errors import CorpusError, StoreError
from pipeline.format import BUILD_FOLDER, MANIFEST_NAME, SPLIT_FOLDERS, TOKENIZER_NAME, Manifest
from pipeline.place import is_local, is_there, read_all, remove_tree, sizes
from pipeline.unit import UnitResult, parse_result
from pipeline.writer import write_bytes, write_json


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """What is being built."""

    manifest: Manifest
    """All of it but the shards."""
    units: int


class Draft:
    """The unfinished store in the folder or at the URL `store`."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.folder = store / BUILD_FOLDER
        self._handle: IO[str] | None = None

    @contextlib.contextmanager
    def lock(self, *, shared: bool = False) -> Iterator[None]:
        """Keep other builds out; with `shared` let other tasks in. Raises StoreError where somebody is at work."""
        if not is_local(self.store):
            yield
            return
        with _flock(self.folder / "lock", (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB) as handle:
            self._handle = handle
            yield

    def begin(self, plan: BuildPlan, tokenizer: bytes) -> None:
        """Go on with the plan that is there, or make it. One of which no unit is done is replaced: nothing is lost.

        Raises StoreError where units of another plan are done, or its tasks are at work.
        """
        with _flock(self.folder / "plan.lock", fcntl.LOCK_EX) if is_local(self.store) else contextlib.nullcontext():
            there = self.plan()
            if there is not None and (self.done() or not self._alone()):
                same_parameters(
                    {**there.manifest.parameters, "units": there.units},
                    {**plan.manifest.parameters, "units": plan.units},
                    self.store,
                )
            elif there != plan:
                write_bytes(self.store / TOKENIZER_NAME, tokenizer)
                data = {"units": plan.units, "manifest": plan.manifest.to_json()}
                write_json(self.folder / "plan.json", data)

    def plan(self) -> BuildPlan | None:
        """What is being built, if a plan was made. Raises StoreError where it cannot be read."""
        path = self.folder / "plan.json"
        if not is_there(path):
            return None
        try:
            data = json.loads(path.read_bytes())
            return BuildPlan(manifest=Manifest.from_json(data["manifest"]), units=data["units"])
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError("the plan of a build cannot be read", where=path, found=repr(error)) from error

    def done(self) -> dict[int, UnitResult]:
        """The units whose sidecar is there, and every shard it names in its full size."""
        there = sizes(self.store)
        found = {}
        for data in read_all(self.folder, "[0-9]*.json").values():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged: the unit is built again
                result = parse_result(data)
                if all(there.get(shard.file) == shard.bytes for shard in result.shards):
                    found[result.unit] = result
        return found

    def commit(self, plan: BuildPlan, done: dict[int, UnitResult]) -> Manifest:
        """Write the manifest and clear up. Raises StoreError where units are missing, CorpusError for no document."""
        results = [done[unit] for unit in range(plan.units) if unit in done]
        if len(results) < plan.units:
            raise StoreError(
                "units are missing",
                where=self.store,
                found=f"{plan.units - len(results)} of {plan.units} are not done: "
                + _ranges([unit for unit in range(plan.units) if unit not in done]),
                remedy="run the same `slw-prep build` again: with `--task i/n` each task builds what it lacks (unit "
                "u is of task u mod n), without it this machine builds what is missing and commits",
            )
        shards = [shard for result in results for shard in result.shards]
        if not any(shard.split == "train" for shard in shards):
            self._discard()
            held_out = sum(shard.documents for shard in shards)
            raise CorpusError(
                f"no document to train on: {'all are held out' if held_out else 'the corpus is empty'}",
                where=", ".join(f"{path} ({size} bytes)" for path, size, _ in plan.manifest.parameters["files"][:3]),
                found=f"{sum(r.bad for r in results)} bad, {sum(r.empty for r in results)} empty "
                f"and {held_out} held-out records",
                remedy="check the input, --text-field and --validation-fraction",
            )
        skipped = sum(result.bad + result.empty for result in results)
        manifest = dataclasses.replace(plan.manifest, shards=shards, skipped=skipped)
        self._sweep({shard.file for shard in shards})
        write_json(self.store / MANIFEST_NAME, manifest.to_json())
        self.clear()
        return manifest

    def clear(self) -> None:
        """Remove what only an unfinished build or a repair needs."""
        remove_tree(self.folder)

    def _alone(self) -> bool:
        """Whether no other task is at work."""
        if self._handle is None:
            return True
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _sweep(self, shards: set[str]) -> None:
        """Remove what killed builds left: half-written files, and shards of a plan that was replaced."""
        for file in sizes(self.store):
            half_written = file.endswith(".partial") and Path(file).name.startswith(".")
            if half_written or (file.split("/")[0] in SPLIT_FOLDERS.values() and file not in shards):
                (self.store / file).unlink()

    def _discard(self) -> None:
        """Take back a build that made nothing to train on, and nothing else that may be there."""
        self._sweep(set())
        (self.store / TOKENIZER_NAME).unlink(missing_ok=True)
        remove_tree(self.folder)
        for folder in (*(self.store / name for name in SPLIT_FOLDERS.values()), self.store):
            with contextlib.suppress(OSError):
                if is_local(folder):  # object storage has no empty folders, and its rmdir might mean the bucket
                    folder.rmdir()


def same_parameters(there: dict[str, Any], asked: dict[str, Any], where: Path) -> None:
    """Raise StoreError where a build is asked for that is not the one that is there; says what differs."""
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
        sizes_there, sizes_asked = ({path: size for path, size, *_ in files} for files in (there, asked))
        extra = [f"{path} ({size} bytes)" for path, size in sizes_asked.items() if sizes_there.get(path) != size]
        gone = [f"{path} ({size} bytes)" for path, size in sizes_there.items() if sizes_asked.get(path) != size]
        if not extra and not gone:
            before = {path: look for path, _, *look in there}
            changed = [path for path, _, *look in asked if before[path] != look]
            return f"{name}: {len(changed) or 'none'} rewritten since, in the same size" + (
                f", such as {changed[0]}" if changed else ", but in another order"
            )
        sides = ((gone, "there"), (extra, "asked"))
        return f"{name}: " + ", ".join(
            f"{len(side)} only {where}, such as {side[0]}" for side, where in sides if side
        )
    return f"{name}: {there} there, {asked} asked"


@contextlib.contextmanager
def _flock(path: Path, how: int) -> Iterator[IO[str]]:
    """Hold `path` locked. A lock whose file was meanwhile removed, with the build that it guarded, is taken anew."""
    while True:
        try:
            Path(os.path.realpath(path.parent)).mkdir(parents=True, exist_ok=True)  # a link may lead to nothing yet
            handle = path.open("a")
        except OSError as error:
            raise StoreError(
                "cannot write here", where=path.parent.parent, found=error, remedy="choose another --out"
            ) from error
        with handle:
            try:
                fcntl.flock(handle, how)
            except BlockingIOError:
                raise StoreError(
                    "another build of this store is running", where=path.parent.parent, remedy="wait"
                ) from None
            if path.exists() and os.path.samestat(os.fstat(handle.fileno()), path.stat()):
                yield handle
                return


def holds_else(folder: Path) -> bool:
    """Whether there is something in `folder` that is no store, finished or in the making.

    Its contents are looked at first: a build that begins meanwhile makes them a store.
    """
    there = folder.exists() and any(folder.iterdir())
    return there and not (folder / BUILD_FOLDER).exists() and not (folder / MANIFEST_NAME).exists()


def _ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 7] -> "1-3, 7"; long lists are cut."""
    known = set(numbers)
    starts = [n for n in numbers if n - 1 not in known]
    ends = [n for n in numbers if n + 1 not in known]
    parts = [f"{a}-{b}" if b > a else str(a) for a, b in zip(starts, ends, strict=True)]
    return ", ".join(parts[:20]) + (", ..." if len(parts) > 20 else "")
