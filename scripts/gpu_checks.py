"""What scripts/gpu_check.sh checks: each check yields {case, ok, ...} by case, and one that fails leaves the others.

Sizes are small but for the benches: what is wrong on a GPU is wrong at any size, and minutes are few.
"""

import functools
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpu_parity import worst_error

Result = dict[str, Any]
HERE = Path(__file__).resolve().parent
RELATIVE_ERROR = {"float32": 1e-4, "bfloat16": 3e-2}
"""Of the norm of all gradients, against float32 on the CPU."""


def note_of(error: BaseException) -> str:
    """One short line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def attempted(case: str, make: Callable[[], Result]) -> Result:
    """The result of a case, also where it fails."""
    try:
        return {"case": case, **make()}
    except Exception as error:
        traceback.print_exc()
        return {"case": case, "ok": False, "note": note_of(error)}


# the machine


def machine(cpu: bool) -> Iterator[Result]:
    """What it is, before anything else: without a GPU nothing else is worth the time."""
    import torch

    versions = {name: importlib.metadata.version(name) for name in ("numba", "numpy", "pyarrow")}
    known = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version(), **versions}
    if cpu or not torch.cuda.is_available():
        yield {"case": "cpu", "ok": cpu, "cores": os.cpu_count(), **known}
        return
    device = torch.cuda.get_device_properties(0)
    capability, memory = f"{device.major}.{device.minor}", f"{device.total_memory / 2**30:.0f} GiB"
    yield {
        "case": device.name,
        "ok": True,
        "memory": memory,
        "capability": capability,
        "cores": os.cpu_count(),
        **known,
    }


# parity


def parity(cpu: bool) -> Iterator[Result]:
    """Loss and gradients against rows with a mask, float32, on the CPU: the worst over lengths and windows.

    In half precision rows with a mask, plain SDPA, tell what that precision costs: the flat form may not cost more,
    and no more compiled, with symbolic sizes and with fixed ones.
    """
    import torch

    from train.data import Flat

    torch.set_float32_matmul_precision("highest")
    half = torch.float32 if cpu else torch.bfloat16
    usual = 0.0
    for mask in ("document", "causal"):
        for form, dtype, flat in (
            ("rows", torch.float32, None),
            *((("rows", half, None),) if not cpu else ()),
            ("flat", half, Flat(40.0)),
            ("compiled flat", half, Flat(40.0)),
        ):
            name = str(dtype).removeprefix("torch.")
            allowed = max(RELATIVE_ERROR[name], 1.5 * usual if form != "rows" else 0.0)
            compare = functools.partial(worst_error, cpu, mask, dtype, flat, form.startswith("compiled"), allowed)
            result = attempted(f"{form} {name} {mask}", compare)
            usual = result.get("error", 0.0) if form == "rows" else usual
            yield result


# runs


RAMP = {"pacing": "linear", "seqlen_start": 8, "seqlen_end": 0, "duration_steps": 20}
MODES: dict[str, dict[str, Any]] = {
    "constant": {"pacing": "constant", "seqlen": 0},
    "slw": RAMP,
    "truncation": {**RAMP, "dealing": "truncate"},
    "skyladder": {"pacing": "skyladder", "seqlen": 0, "attention_window_start": 8, "duration_steps": 20},
    "buckets": {"pacing": "buckets", "seqlen_start": 8, "seqlen_end": 0},
}
"""0 stands for the full length."""


def settings(folder: Path, mode: str, cpu: bool, **run: Any) -> dict[str, Any]:
    full, tokens, steps = (32, 256, 30) if cpu else (512, 32_768, 40)
    pacing = {key: full if value == 0 else value for key, value in MODES[mode].items()}
    sequences = mode in ("slw", "truncation")
    served = tokens * steps * 2 // 3 if sequences else tokens * steps
    return {
        "store": str(folder / "store"),
        "model": {"layers": 2, "width": 32, "heads": 2} if cpu else {"layers": 4, "width": 256, "heads": 4},
        "curriculum": pacing,
        "batch": {"global_batch_sequences": tokens // full} if sequences else {"global_batch_tokens": tokens},
        "optimizer": {"lr": 1e-3, "warmup_steps": 5},
        "run": {
            "dir": str(folder / mode),
            "total_tokens": served,
            "max_epochs": 100,
            "validate_every_steps": 1000,
            "validation_tokens": 4096,
            "device": "cpu" if cpu else "cuda",
            "compile": not cpu,
            **run,
        },
    }


def store_in(folder: Path, cpu: bool) -> None:
    from synthetic import write_synthetic_store

    write_synthetic_store(folder / "store", 60_000 if cpu else 4_000_000, 512 if cpu else 50_257)


def modes(cpu: bool) -> Iterator[Result]:
    """A short run of each: the loss falls, nothing is compiled after the warm-up."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store_in(folder, cpu)
        for mode in MODES:
            yield attempted(mode, functools.partial(short_run, folder, mode, cpu))


def short_run(folder: Path, mode: str, cpu: bool) -> Result:
    from train import loop
    from train.config_file import parse_config
    from train.metrics import read_metrics

    made: list[Any] = []
    run = loop.Run

    def kept(*arguments: Any) -> Any:
        made.append(run(*arguments))
        return made[-1]

    loop.Run = kept  # type: ignore[assignment, misc]
    started = time.perf_counter()
    try:
        outcome = loop.run(parse_config(settings(folder, mode, cpu), where=mode), warn=complain)
    finally:
        loop.Run = run  # type: ignore[misc]
    losses = [line["loss"] for line in read_metrics(folder / mode) if "loss" in line]
    compiler = made[-1].compiler
    recompiles = compiler.recompiles if compiler else 0
    return {
        "ok": outcome.finished and losses[-1] < losses[0] and recompiles == 0,
        "loss": f"{losses[0]:.2f} to {losses[-1]:.2f}",
        "micro_batch_tokens": made[-1].micro_batch_tokens,
        "graphs": compiler and compiler.graphs,
        "recompiles": recompiles,
        "seconds": round(time.perf_counter() - started, 1),
    }


def resume(cpu: bool) -> Iterator[Result]:
    """Killed and run again with deterministic kernels: the same weights to the bit."""
    kill = 7 if cpu else 13
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store_in(folder, cpu)
        digests = []
        for case, stops in (("whole", [10**9]), ("killed", [kill, 10**9])):
            config = settings(folder, "slw", cpu, checkpoint_every_steps=5, deterministic=True)
            config["run"]["dir"] = str(folder / case)
            for stop in stops:
                process = multiprocessing.get_context("fork").Process(target=train, args=(config, stop))
                process.start()
                process.join()
                code = process.exitcode
                if code != (0 if stop == 10**9 else -signal.SIGKILL):
                    yield {"case": f"{case}, stop at {stop}", "ok": False, "note": f"exit {code}"}
                    return
            weights = sorted((folder / case).glob("checkpoints/step-*/model.safetensors"))[-1]
            digests.append(hashlib.sha256(weights.read_bytes()).hexdigest()[:16])
        yield {"case": f"killed at {kill}", "ok": digests[0] == digests[1], "digests": " ".join(digests)}


def train(config: dict[str, Any], stop: int) -> None:
    """A run that kills itself before the update at step `stop`."""
    from train import loop
    from train.config_file import parse_config

    update = loop.Run.update

    def updated(self: Any, batch: Any) -> Any:
        if batch.step == stop:
            self.saver.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return update(self, batch)

    loop.Run.update = updated  # type: ignore[method-assign]
    loop.run(parse_config(config, where="resume"), warn=complain)


def complain(text: str) -> None:
    print(text, file=sys.stderr)


# benches


TINY = "--layers 2 --width 32 --heads 2 --vocab-size 512 --batch-tokens 128 --steps 2 --rounds 1".split()  # noqa: SIM905
SMALL = ("--preset", "gpt2-124m", "--batch-tokens", "131072")


def bench(cpu: bool) -> Iterator[Result]:
    """GPT-2 124M, the full length first and beside the plain one, with document masks and without."""
    if cpu:
        yield from benched("tiny", *TINY, "--lengths", "32", "16", "--nanogpt", "32")
        return
    yield from benched("124M", *SMALL, "--lengths", "1024", "512", "256", "128", "--nanogpt", "1024")
    yield from benched("124M causal", *SMALL, "--mask", "causal", "--lengths", "1024")


def short(cpu: bool) -> Iterator[Result]:
    """The same at the lengths a warm-up begins with."""
    shape, lengths = (TINY, ["8"]) if cpu else (SMALL, ["64", "32", "16", "8"])
    yield from benched("tiny" if cpu else "124M", *shape, "--lengths", *lengths)


def large(cpu: bool) -> Iterator[Result]:
    """GPT-2 1.5B, where there is the memory."""
    import torch

    if cpu:
        yield {"case": "1.5B", "ok": None, "note": "not on a CPU"}
        return
    memory = torch.cuda.get_device_properties(0).total_memory
    if memory < 60e9:
        yield {"case": "1.5B", "ok": None, "note": f"{memory / 1e9:.0f} GB are too few"}
        return
    once = ("--steps", "2", "--rounds", "2", "--batch-tokens", "65536")
    yield from benched("1.5B", "--preset", "gpt2-1.5b", "--lengths", "1024", *once)


def benched(case: str, *arguments: str) -> Iterator[Result]:
    """What bench_train.py says: each length as it is known, then what holds for all."""
    command = [sys.executable, str(HERE / "bench_train.py"), *arguments]
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = line.strip() or last
            found = json.loads(line) if line.startswith("{") else {}
            if "seqlen" in found:
                yield {"case": f"{case} L={found.pop('seqlen')}", "ok": None, **found}
            elif "recompiles" in found:
                shared = {key: found[key] for key in ("micro_batch_tokens", "start_s", "graphs", "recompiles")}
                yield {"case": case, "ok": found["recompiles"] == 0, **shared}
            else:
                print(line, end="", file=sys.stderr)
    if process.returncode:
        yield {"case": case, "ok": False, "note": f"exit {process.returncode}: {last[:200]}"}


CHECKS: dict[str, Callable[[bool], Iterator[Result]]] = {
    "machine": machine,
    "parity": parity,
    "bench": bench,
    "modes": modes,
    "resume": resume,
    "short": short,
    "large": large,
}
