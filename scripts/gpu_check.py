"""The checks of scripts/gpu_check.sh, which says what they are. Each runs in a process of its own, in the time left.

A result is {check, case, ok, ...}; ok is None where there is only a figure, or no time was left. Exit 1 where one is
False.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Result = dict[str, Any]
HERE = Path(__file__).resolve().parent
SECONDS = 525
"""For all of it."""
RELATIVE_ERROR = {"float32": 1e-4, "bfloat16": 3e-2}
"""Of the norm of all gradients, against float32 on the CPU."""


def main() -> int:
    parser = argparse.ArgumentParser(description="see scripts/gpu_check.sh")
    parser.add_argument("--cpu", action="store_true", help="tiny sizes, no GPU")
    parser.add_argument("--only", nargs="+", choices=CHECKS, help="of the checks")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it")
    parser.add_argument("--one", choices=CHECKS, help=argparse.SUPPRESS)
    parser.add_argument("--train", nargs=2, metavar=("CONFIG", "STOP"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        train(json.loads(args.train[0]), int(args.train[1]))
        return 0
    if args.one:
        for result in CHECKS[args.one](args.cpu):
            print(json.dumps({"check": args.one, **result}), flush=True)
        return 0
    end = time.monotonic() + args.seconds
    results = [result for name in args.only or CHECKS for result in in_own_process(name, args.cpu, end)]
    print(table(results))
    return int(any(result["ok"] is False for result in results))


def in_own_process(name: str, cpu: bool, end: float) -> Iterator[Result]:
    """Its results, printed as they come; one more where it fails or the time is over."""
    command = [sys.executable, __file__, "--one", name, *(["--cpu"] if cpu else [])]
    left = end - time.monotonic()
    if left <= 5:
        yield told({"check": name, "case": "", "ok": None, "note": "no time left"})
        return
    process = subprocess.Popen(["timeout", f"{left:.0f}", *command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            yield told(json.loads(line))
    code = process.wait()
    if code == 124:
        yield told({"check": name, "case": "", "ok": None, "note": "no time left"})
    elif code:
        yield told({"check": name, "case": "", "ok": False, "note": f"exit {code}"})


def told(result: Result) -> Result:
    print(json.dumps(result), flush=True)
    return result


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


# parity


def parity(cpu: bool) -> Iterator[Result]:
    """Loss and gradients against rows with a mask, float32, on the CPU: per form, mask and length."""
    import torch

    from train.attention import Sight, has_varlen, span_mask
    from train.config import ModelConfig
    from train.data import Flat, document_mask, micro_batches
    from train.model import GPT2

    torch.set_float32_matmul_precision("highest")
    device = torch.device("cpu" if cpu else "cuda")
    shape = {"layers": 2, "width": 32, "heads": 2} if cpu else {"layers": 4, "width": 256, "heads": 4}
    forms = [("rows", torch.float32, None), ("flat", torch.float32 if cpu else torch.bfloat16, Flat(40.0))]
    for seqlen in (8, 40) if cpu else (8, 24, 128, 1024):
        for mask in ("document", "causal"):
            for window in (None, seqlen // 2 + 1):
                batch = spans_batch(seqlen, rows=4 if cpu else 8, window=window)
                torch.manual_seed(1)
                reference = GPT2(ModelConfig(**shape, mask=mask), 500, seqlen)
                (part,) = micro_batches(batch, 10**9, torch.device("cpu"), mask)
                seen = document_mask(batch) if mask == "document" else columns_mask(batch, span_mask)
                expected = gradients(reference, part._replace(sight=Sight(seen)), None)
                model = GPT2(ModelConfig(**shape, mask=mask), 500, seqlen)
                model.load_state_dict(reference.state_dict())
                model.to(device)
                for form, dtype, flat in forms:
                    if form == "flat" and not cpu:
                        assert has_varlen(device, dtype, shape["width"] // shape["heads"]), (
                            "no variable-length kernels"
                        )
                    (part,) = micro_batches(batch, 10**9, device, mask, flat)
                    found = gradients(model, part, dtype if dtype == torch.bfloat16 else None)
                    error = max(float((a.cpu() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
                    name = str(dtype).removeprefix("torch.")
                    case = f"{form} {name} {mask} L={seqlen}" + (f" window {window}" if window else "")
                    yield {"case": case, "ok": error < RELATIVE_ERROR[name], "relative_error": f"{error:.1e}"}


def spans_batch(seqlen: int, rows: int, window: int | None) -> Any:
    """Rows of random spans."""
    import numpy as np

    from curriculum.batch import windowed
    from train.warmup import Shape, sample_batches

    random = np.random.default_rng(seqlen)
    (batch,) = sample_batches(Shape(rows * seqlen, seqlen), False)
    begins = random.random((rows, seqlen)) < 3 / seqlen
    begins[:, 0] = True
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=begins.size)
    batch = type(batch)(
        **{
            **batch.__dict__,
            "input_ids": random.integers(0, 500, begins.shape),
            "labels": random.integers(0, 500, begins.shape),
            "position_ids": (np.arange(begins.size) - np.repeat(starts, lengths)).reshape(begins.shape),
            "cu_seqlens": np.append(starts, begins.size).astype(np.int32),
            "max_seqlen": int(lengths.max()),
        }
    )
    return windowed(batch, window, "kept")


def columns_mask(batch: Any, span_mask: Callable[..., Any]) -> Any:
    """Of plain causal rows, cut at windows."""
    import torch

    blocks = torch.arange(batch.seqlen) // (batch.window or batch.seqlen)
    return span_mask(blocks.expand(batch.labels.shape))


def gradients(model: Any, part: Any, half: Any) -> list[Any]:
    """The loss and all gradients, flat."""
    import torch

    model.zero_grad()
    with torch.autocast(part.labels.device.type, half, enabled=half is not None):
        loss = model.loss(*part) / part.labels.numel()
    loss.backward()
    return [loss.detach().float(), torch.cat([p.grad.flatten().float() for p in model.parameters()])]


# runs


MODES: dict[str, dict[str, Any]] = {
    "constant": {"pacing": "constant", "seqlen": 0},
    "slw": {"pacing": "linear", "seqlen_start": 8, "seqlen_end": 0, "duration_steps": 20},
    "truncation": {
        "pacing": "linear",
        "seqlen_start": 8,
        "seqlen_end": 0,
        "duration_steps": 20,
        "dealing": "truncate",
    },
    "skyladder": {"pacing": "skyladder", "seqlen": 0, "window_start": 8, "duration_steps": 20},
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


def modes(cpu: bool) -> Iterator[Result]:
    """A short run of each: the loss falls, nothing is compiled after the warm-up."""
    from synthetic import write_synthetic_store

    from train import loop
    from train.config import parse_config
    from train.metrics import read_metrics

    made: list[Any] = []
    run = loop.Run

    def kept(*arguments: Any) -> Any:
        made.append(run(*arguments))
        return made[-1]

    loop.Run = kept  # type: ignore[assignment, misc]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_synthetic_store(folder / "store", 60_000 if cpu else 4_000_000, 512 if cpu else 50_257)
        for mode in MODES:
            started = time.perf_counter()
            outcome = loop.run(parse_config(settings(folder, mode, cpu), where=mode), warn=complain)
            losses = [line["loss"] for line in read_metrics(folder / mode) if "loss" in line]
            compiler = made[-1].compiler
            recompiles = compiler.recompiles if compiler else 0
            yield {
                "case": mode,
                "ok": outcome.finished and losses[-1] < losses[0] and recompiles == 0,
                "loss": f"{losses[0]:.2f} to {losses[-1]:.2f}",
                "micro_batch_tokens": made[-1].micro_batch_tokens,
                "graphs": compiler and compiler.graphs,
                "recompiles": recompiles,
                "seconds": round(time.perf_counter() - started, 1),
            }


def resume(cpu: bool) -> Iterator[Result]:
    """Killed and run again with deterministic kernels: the same weights to the bit."""
    from synthetic import write_synthetic_store

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_synthetic_store(folder / "store", 60_000 if cpu else 4_000_000, 512 if cpu else 50_257)
        digests, kills = [], [7] if cpu else [7, 19]
        for case, stops in (("whole", [10**9]), ("killed", [*kills, 10**9])):
            config = settings(folder, "slw", cpu, checkpoint_every_steps=5)
            config["run"]["dir"] = str(folder / case)
            for stop in stops:
                command = [sys.executable, __file__, "--train", json.dumps(config), str(stop)]
                code = subprocess.run(command, check=False, stdout=sys.stderr).returncode
                if code != (0 if stop == 10**9 else -signal.SIGKILL):
                    yield {"case": f"{case}, stop at {stop}", "ok": False, "note": f"exit {code}"}
                    return
            weights = sorted((folder / case).glob("checkpoints/step-*/model.safetensors"))[-1]
            digests.append(hashlib.sha256(weights.read_bytes()).hexdigest()[:16])
        yield {"case": f"killed at {kills}", "ok": digests[0] == digests[1], "digests": " ".join(digests)}


def train(config: dict[str, Any], stop: int) -> None:
    """A run that kills itself before the update at step `stop`."""
    import torch

    from train import loop
    from train.config import parse_config

    torch.use_deterministic_algorithms(True)
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


def bench(cpu: bool) -> Iterator[Result]:
    """GPT-2 124M beside the plain one, with and without document masks."""
    if cpu:
        yield from benched("tiny", *TINY, "--lengths", "16", "32", "--nanogpt")
        return
    shape = ("--preset", "gpt2-124m", "--batch-tokens", "131072")
    yield from benched("124M", *shape, "--lengths", "128", "256", "512", "1024", "--nanogpt", "256", "1024")
    yield from benched("124M causal", *shape, "--mask", "causal", "--lengths", "1024")


def short(cpu: bool) -> Iterator[Result]:
    """The same at the lengths a warm-up begins with."""
    shape = TINY if cpu else ["--preset", "gpt2-124m", "--batch-tokens", "131072"]
    yield from benched("tiny" if cpu else "124M", *shape, "--lengths", *(("8",) if cpu else ("8", "16", "32", "64")))


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


TINY = "--layers 2 --width 32 --heads 2 --vocab-size 512 --batch-tokens 128 --steps 2 --rounds 1".split()  # noqa: SIM905


def benched(case: str, *arguments: str) -> Iterator[Result]:
    done = subprocess.run(
        [sys.executable, str(HERE / "bench_train.py"), *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        yield {"case": case, "ok": False, "note": f"exit {done.returncode}"}
        return
    found = json.loads(done.stdout)
    shared = {key: found[key] for key in ("micro_batch_tokens", "start_s", "graphs", "recompiles")}
    yield {"case": case, "ok": found["recompiles"] == 0, **shared, "device": found["device"], "torch": found["torch"]}
    for line in found["lengths"]:
        yield {"case": f"{case} L={line.pop('seqlen')}", "ok": None, **line}


CHECKS: dict[str, Callable[[bool], Iterator[Result]]] = {
    "parity": parity,
    "bench": bench,
    "modes": modes,
    "resume": resume,
    "short": short,
    "large": large,
}

if __name__ == "__main__":
    assert shutil.which("timeout"), "coreutils' timeout is needed"
    sys.exit(main())
