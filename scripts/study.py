#!/usr/bin/env python
"""Arms x learning rates x seeds from one store: which arm ends with the lower loss, and up to which rate it trains.

    python scripts/study.py --store study/store --out study/grid --arms constant,slw,batch-warmup \
        --lrs 1e-3,3e-3,1e-2,3e-2,1e-1 --seeds 1,2
    python scripts/study.py --store study/store --out study/grid --arms constant,slw --lrs 1e-2 --seeds 3,4,5
    python scripts/study.py --out study/grid --report        # the tables again, nothing run

An arm is a TOML file, or the name of one in experiments/; with +KEY=VALUE behind it, what it changes of that:
constant+optimizer.warmup_steps=16. Each run is that of `slw-train run ARM.toml store=STORE optimizer.lr=LR
run.seed=SEED run.dir=OUT/runs/...`, one thread each, `--workers` of them side by side, each worker a process that
lives as long as the study. Seeds go round slowest: a study cut off has all arms with fewer seeds.

OUT/results.jsonl gets a line as each run ends; a rerun, with more rates or seeds if so wished, skips what is there
and goes on with what was killed. A run whose loss is no longer finite is a result like others. At the end
OUT/table.md, OUT/table.json and OUT/study.png are made of all results, those of earlier calls too (study_report.py).
"""

import argparse
import fcntl
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import study_report

from pipeline.errors import ConfigError, RunError, SlwError

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
RESULTS_NAME = "results.jsonl"


def main() -> int:
    options = _options().parse_args()
    try:
        if not options.report:
            ended = run_study(options)
            if not ended:
                return 130
        summary = study_report.report(read_results(options.out), options.out, options.bar)
    except SlwError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if options.json:
        print(json.dumps(summary))
    else:
        print((options.out / study_report.TABLE_NAME).read_text())
    return 0


def run_study(options: argparse.Namespace) -> bool:
    """Run what is asked and not done yet; False where it was interrupted."""
    jobs = [
        {"arm": arm, "lr": lr, "seed": seed, "store": str(options.store), "out": str(options.out), "set": options.set}
        for seed, arm, lr in itertools.product(options.seeds, options.arms, options.lrs)
    ]
    if options.store is None:
        raise ConfigError("give --store", remedy="slw-prep build ... --out STORE; docs/compare.md has the commands")
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(
                "another study runs here", where=options.out, remedy="wait for it, or other --out"
            ) from None
        kept = read_results(options.out)
        (options.out / RESULTS_NAME).write_text("".join(json.dumps(result) + "\n" for result in kept))
        done = {key_of(result): result for result in kept}
        todo = []
        for job in jobs:
            asked = settings_of(job)
            if key_of(job) not in done:
                todo.append(job)
            elif differs := differences(done[key_of(job)]["settings"], asked):
                raise ConfigError(
                    "a run of the study was made with other settings",
                    where=f"{options.out / RESULTS_NAME}, {name_of(job)}",
                    found="; ".join(f"{key}: {old} there, {new} asked" for key, old, new in differs),
                    remedy="choose another --out, or delete its line and its run",
                )
        return not todo or run_jobs(todo, options.out, options.workers, len(jobs) - len(todo))


def run_jobs(jobs: list[dict[str, Any]], out: Path, workers: int, already: int) -> bool:
    """Run jobs side by side and append their results; False where it was interrupted."""
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}  # workers inherit it
    started, total = time.monotonic(), already + len(jobs)
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=begin_worker)
    try:
        futures = [pool.submit(train_one, job) for job in jobs]
        for count, future in enumerate(as_completed(futures), 1):
            result = future.result()
            if result is None:
                raise KeyboardInterrupt
            with (out / RESULTS_NAME).open("a") as stream:
                stream.write(json.dumps(result) + "\n")
            left = (time.monotonic() - started) / count * (len(jobs) - count)
            loss = result["validation_loss"]
            shown = result["status"] if loss is None else f"{result['status']}, {loss:.4f}"
            print(f"{already + count}/{total} {name_of(result)}: {shown}; {left / 60:.0f} min left", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return False
    except BrokenProcessPool as error:
        raise RunError(
            "a worker was killed", where=out, remedy="the same command goes on; too little memory?"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return True


def begin_worker() -> None:
    """A worker ends with its parent, however that ends; Ctrl-C is heard by the run alone, which then saves itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None, "a worker has a parent"
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def train_one(job: dict[str, Any]) -> dict[str, Any] | None:
    """In a worker: one run, to the end. None where a signal stopped it."""
    import torch

    from train.faults import NotFinite
    from train.figures import figures, read_curves
    from train.loop import run

    torch.set_num_threads(1)
    config = load(job)
    folder = config.run.dir
    status, error = "finished", None
    try:
        outcome = run(config, warn=lambda text: print(f"{name_of(job)}: {text}", file=sys.stderr))
        if not outcome.finished:
            return None
    except NotFinite as failure:
        status, error = "not finite", str(failure)
    try:
        curves = read_curves(folder)
        measured = asdict(figures(curves))
        measured["validation_loss_first"] = curves.validations[0]["validation_loss"] if curves.validations else None
    except RunError:  # not finite at its first step: there is no line
        measured = dict.fromkeys(("validation_loss", "steps", "tokens", "seconds", "loss_ratio_max", "variance_max"))
    if status != "finished":
        measured["validation_loss"] = None
    return {
        "arm": arm_of(job),
        "lr": job["lr"],
        "seed": job["seed"],
        "status": status,
        **measured,
        "error": error,
        "run": str(folder),
        "settings": settings_of(job),
    }


def load(job: dict[str, Any]) -> Any:
    """The config of a run. Raises ConfigError as `load_config` does."""
    from train.config_file import load_config

    file, *changes = parts_of(job["arm"])
    path = Path(file) if file.endswith(".toml") else EXPERIMENTS / f"{file}.toml"
    if not path.is_file():
        known = sorted(file.stem for file in EXPERIMENTS.glob("*.toml") if file.stem != "base")
        raise ConfigError("no such arm", found=file, allowed=f"a TOML file, or {', '.join(known)}")
    folder = Path(job["out"]) / "runs" / arm_of(job) / f"lr-{job['lr']:g}" / f"seed-{job['seed']}"
    own = [f"store={job['store']}", f"optimizer.lr={job['lr']!r}", f"run.seed={job['seed']}", f"run.dir={folder}"]
    return load_config(path, [*job["set"], *changes, *own])


def settings_of(job: dict[str, Any]) -> dict[str, Any]:
    """All settings of a run, flat."""
    from train.folder import FREE_KEYS, flat

    free = FREE_KEYS - {"run.validate_every_steps"}
    return {key: value for key, value in flat(load(job)).items() if key not in free}


def differences(there: dict[str, Any], asked: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, there, asked) where both have the key: a newer version may know more."""
    return [(key, there[key], asked[key]) for key in asked if key in there and there[key] != asked[key]]


def read_results(out: Path) -> list[dict[str, Any]]:
    """All results of a study; a last line cut off by a kill is left out, its run is run again."""
    path = out / RESULTS_NAME
    results = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            results.append(json.loads(text))
        except ValueError:
            continue
    return results


def parts_of(arm: str) -> list[str]:
    """`slw+clip=1e+3` is `slw` and `clip=1e+3`."""
    return re.split(r"\+(?=[^+=]+=)", arm)


def arm_of(job: dict[str, Any]) -> str:
    """The arm's name, of a job or of its result: without the folder and suffix of its file."""
    file, *changes = parts_of(job["arm"])
    return "+".join([Path(file).stem, *changes])


def key_of(job: dict[str, Any]) -> tuple[str, float, int]:
    return arm_of(job), job["lr"], job["seed"]


def name_of(job: dict[str, Any]) -> str:
    return f"{arm_of(job)}, lr {job['lr']:g}, seed {job['seed']}"


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="what all arms are trained on; with held-out documents")
    parser.add_argument("--out", type=Path, required=True, help="folder of the study")
    parser.add_argument(
        "--arms",
        type=_list_of(str),
        default=["constant", "slw", "batch-warmup"],
        help="A,B,...; each with +KEY=VALUE if wished",
    )
    parser.add_argument("--lrs", type=_list_of(float), default=[1e-3, 3e-3, 1e-2, 3e-2, 1e-1])
    parser.add_argument("--seeds", type=_list_of(int), default=[1, 2])
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="for every run, again for more"
    )
    parser.add_argument("--bar", type=float, default=study_report.BAR, help="nats: see the table's caption")
    parser.add_argument("--report", action="store_true", help="write the tables of what is there; run nothing")
    parser.add_argument("--json", action="store_true", help="the table as one JSON object on standard output")
    return parser


def _list_of(kind: Any) -> Any:
    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    return parse


if __name__ == "__main__":
    sys.exit(main())
