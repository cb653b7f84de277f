"""Runs the checks of gpu_checks.py for scripts/gpu_check.sh: each in a process of its own, in its share of the time.

A result is {check, case, ok, ...}; ok is None where there is only a figure, or where the time was over. Each is
printed as it comes, one JSON line, and all of them as a table at the end. Exit 1 where one is False.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection

from gpu_checks import CHECKS, Result, note_of

CONTEXT = multiprocessing.get_context("forkserver")
SECONDS = {"machine": 20, "parity": 70, "bench": 165, "modes": 85, "resume": 75, "short": 60, "large": 60}
"""Of each check; what one leaves is there for the next. Less than 9 minutes together."""


def main() -> int:
    parser = argparse.ArgumentParser(description="see scripts/gpu_check.sh")
    parser.add_argument("--cpu", action="store_true", help="tiny sizes, no GPU")
    parser.add_argument("--only", nargs="+", choices=CHECKS, help="of the checks")
    parser.add_argument("--seconds", type=float, default=sum(SECONDS.values()), help="for all of it")
    args = parser.parse_args()
    names = args.only or list(CHECKS)
    end, scale = time.monotonic() + args.seconds, args.seconds / sum(SECONDS[name] for name in names)
    results = []
    for index, name in enumerate(names):
        kept = scale * sum(SECONDS[later] for later in names[index + 1 :])
        for result in in_own_process(name, args.cpu, end - kept - time.monotonic()):
            tell(result)
            results.append(result)
        if name == "machine" and results[-1]["ok"] is False:
            break
    print(table(results))
    return int(any(result["ok"] is False for result in results))


def in_own_process(name: str, cpu: bool, seconds: float) -> Iterator[Result]:
    """Its results as they come; one more where the process dies, or is killed because its time is over."""
    if seconds <= 5:
        yield {"check": name, "case": "", "ok": None, "note": "no time left"}
        return
    end = time.monotonic() + seconds
    results, end_of_process = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=work, args=(CHECKS[name], cpu, end_of_process))
    process.start()
    end_of_process.close()
    try:
        while results.poll(max(end - time.monotonic(), 0.0)):
            yield {"check": name, **results.recv()}
        yield {"check": name, "case": "", "ok": None, "note": f"its {seconds:.0f} s were over"}
    except EOFError:
        process.join()
        if process.exitcode:
            yield {"check": name, "case": "", "ok": False, "note": f"exit {process.exitcode}"}
    finally:
        if process.is_alive():
            with suppress(ProcessLookupError):  # not a group yet
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.kill()


def work(check: Callable[[bool], Iterator[Result]], cpu: bool, results: Connection) -> None:
    """In its process: send the results of a check, the last of them that it broke off and why, where it did."""
    os.setsid()  # what it starts ends with it
    try:
        for result in check(cpu):
            results.send(result)
    except Exception as error:
        traceback.print_exc()
        results.send({"case": "broke off", "ok": False, "note": note_of(error)})


def tell(result: Result) -> None:
    print(json.dumps(result), flush=True)


def table(results: list[Result]) -> str:
    rows = [["check", "case", "ok", "result"]]
    for result in results:
        shown = {
            key: value for key, value in result.items() if key not in ("check", "case", "ok") and value is not None
        }
        ok = {True: "yes", False: "NO", None: "-"}[result["ok"]]
        rows.append([result["check"], result["case"], ok, "  ".join(f"{k} {v}" for k, v in shown.items())])
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]) for row in rows)


if __name__ == "__main__":
    CONTEXT.set_forkserver_preload(["train.loop", "torch._dynamo"])  # seconds that no check has to take by itself
    sys.exit(main())
