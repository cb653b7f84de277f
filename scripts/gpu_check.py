"""Runs the checks of gpu_checks.py for scripts/gpu_check.sh: each in a process of its own, in its share of the time.

A result is {check, case, ok, ...}; ok is None where there is only a figure, or where the time was over. Each is
printed as it comes, one JSON line, and all of them as a table at the end. Exit 1 where one is False.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator

from gpu_checks import CHECKS, Result, note_of, train

SECONDS = {"machine": 20, "parity": 60, "bench": 165, "modes": 85, "resume": 75, "short": 60, "large": 60}
"""Of each check; what one leaves is there for the next. Less than 9 minutes together."""


def main() -> int:
    parser = argparse.ArgumentParser(description="see scripts/gpu_check.sh")
    parser.add_argument("--cpu", action="store_true", help="tiny sizes, no GPU")
    parser.add_argument("--only", nargs="+", choices=CHECKS, help="of the checks")
    parser.add_argument("--seconds", type=float, default=sum(SECONDS.values()), help="for all of it")
    parser.add_argument("--one", choices=CHECKS, help=argparse.SUPPRESS)
    parser.add_argument("--train", nargs=2, metavar=("CONFIG", "STOP"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        train(json.loads(args.train[0]), int(args.train[1]))
        return 0
    if args.one:
        for result in safely(args.one, args.cpu):
            tell({"check": args.one, **result})
        return 0
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


def safely(name: str, cpu: bool) -> Iterator[Result]:
    """The results of a check, the last of them that it broke off and why, where it did."""
    try:
        yield from CHECKS[name](cpu)
    except Exception as error:
        traceback.print_exc()
        yield {"case": "broke off", "ok": False, "note": note_of(error)}


def in_own_process(name: str, cpu: bool, seconds: float) -> Iterator[Result]:
    """Its results as they come; one more where the process dies, or is killed because its time is over."""
    if seconds <= 5:
        yield {"check": name, "case": "", "ok": None, "note": "no time left"}
        return
    command = [sys.executable, __file__, "--one", name, *(["--cpu"] if cpu else [])]
    over = threading.Event()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:

        def stop() -> None:
            over.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
            code = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if over.is_set():
        yield {"check": name, "case": "", "ok": None, "note": f"its {seconds:.0f} s were over"}
    elif code:
        yield {"check": name, "case": "", "ok": False, "note": f"exit {code}"}


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
    sys.exit(main())
