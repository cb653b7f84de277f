"""Run units: in this process, in local processes, or on a Ray cluster. Whoever runs one, its bytes are the same.

A unit's task is idempotent: it may run twice, be killed in between and run again. Only a unit's `UnitResult`, a few
hundred bytes, comes back to whoever asked.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from pipeline.documents import Unit
from pipeline.errors import ConfigError, StoreError
from pipeline.place import is_local
from pipeline.unit import Task, UnitOptions, UnitResult, build_units

REACH_S = 5.0
"""How long a Ray cluster may take to accept a connection."""
RETRIES = 3
"""How often Ray repeats a task whose process or machine was lost."""
RAY_IN_FLIGHT = 1000


@dataclass(frozen=True, kw_only=True)
class Crew:
    """Who runs the units."""

    workers: int = 1
    """Processes; for a Ray of our own the cores it may use."""
    ray_address: str | None = None
    """A running Ray cluster, such as "auto" or "ray://head:10001"; None starts one on this machine."""


def run_units(engine: str, tasks: list[Task], options: UnitOptions, crew: Crew) -> Iterator[UnitResult]:
    """Results in any order. `engine` is a key of `ENGINES`. Raises what a unit raises; StoreError for a lost one."""
    if engine not in ENGINES:
        raise ConfigError("unknown engine", found=engine, allowed=", ".join(ENGINES))
    return ENGINES[engine](tasks, options, crew) if tasks else iter(())


def build_one(task: Task, options: UnitOptions) -> UnitResult:
    """One unit: what a worker does."""
    return next(build_units([task], options))


def _inline(tasks: list[Task], options: UnitOptions, crew: Crew) -> Iterator[UnitResult]:
    return build_units(tasks, options)


def _processes(tasks: list[Task], options: UnitOptions, crew: Crew) -> Iterator[UnitResult]:
    with ProcessPoolExecutor(min(crew.workers, len(tasks)), get_context("spawn"), _end_with_parent) as pool:
        futures = [pool.submit(build_one, task, options) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise StoreError(
                "a worker process was lost: killed, or out of memory",
                where=options.out,
                found=error,
                remedy="the same command goes on where it stopped; with fewer --workers it needs less memory",
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """A build that is killed takes its workers along: nobody writes to a store whose lock is free."""

    def wait() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _ray(tasks: list[Task], options: UnitOptions, crew: Crew) -> Iterator[UnitResult]:
    try:
        import ray
    except ImportError as error:
        raise ConfigError("Ray is not installed", found=error, remedy='pip install "slw[ray]"') from error
    ours = not ray.is_initialized()
    if ours:
        _start_ray(ray, crew)
    try:
        build_remotely: Any = ray.remote(max_retries=RETRIES, num_cpus=1)(build_one)
        shared = ray.put(_seen_from_anywhere(options))
        waiting = iter([(index, _absolute(unit)) for index, unit in tasks])
        running: list[Any] = []
        while True:
            running += [
                build_remotely.remote(task, shared)
                for task, _ in zip(waiting, range(RAY_IN_FLIGHT - len(running)), strict=False)
            ]
            if not running:
                return
            ready, running = ray.wait(running)
            yield ray.get(ready[0])
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise StoreError(
            f"a task was lost {RETRIES + 1} times",
            where=options.out,
            found=str(error).splitlines()[0],
            remedy="the same command goes on where it stopped; see the logs of the cluster",
        ) from error
    finally:
        if ours:
            ray.shutdown()


def _start_ray(ray: Any, crew: Crew) -> None:
    """A cluster has our code from here (`py_modules`), the libraries it needs must be installed there."""
    common = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if crew.ray_address is None:
            ray.init(address="local", num_cpus=crew.workers, include_dashboard=False, **common)
        else:
            _reachable(crew.ray_address)
            package = str(Path(__file__).parent)
            ray.init(address=crew.ray_address, runtime_env={"py_modules": [package]}, **common)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            "Ray cannot be reached",
            where=crew.ray_address,
            found=error,
            allowed='HOST:PORT of a running cluster, or "auto" on one of its machines',
            remedy="start one with `ray start --head`, which prints its address; or leave --ray-address out",
        ) from error


def _reachable(address: str) -> None:
    """Raise OSError at once where nobody listens at HOST:PORT: Ray itself tries for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=REACH_S).close()


def _seen_from_anywhere(options: UnitOptions) -> UnitOptions:
    """A worker has a folder of its own: paths must not depend on it."""
    if not is_local(options.out):
        return options
    return dataclasses.replace(options, out=options.out.absolute(), sidecars=options.sidecars.absolute())


def _absolute(unit: Unit) -> Unit:
    def absolute(path: str) -> str:
        chain, mark, last = path.rpartition("::") if "://" in path else ("", "", path)  # zip://member::archive.zip
        return chain + mark + (last if "://" in last else str(Path(last).absolute()))

    return dataclasses.replace(unit, paths=tuple(map(absolute, unit.paths)))


Run = Callable[[list[Task], UnitOptions, Crew], Iterator[UnitResult]]
ENGINES: dict[str, Run] = {"inline": _inline, "processes": _processes, "ray": _ray}
