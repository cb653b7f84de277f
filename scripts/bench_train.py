"""Tokens a second of training, at several lengths in one run, and beside a plain GPT-2 in the same process.

    python scripts/bench_train.py --preset gpt2-124m --lengths 128 256 512 1024 --batch-tokens 524288 --nanogpt
    python scripts/bench_train.py --layers 4 --width 256 --heads 4 --lengths 128 256 --batch-tokens 8192 --nanogpt

Prints one JSON line. Ours is what `slw-train run` does: the loader over a store, made up by scripts/synthetic.py, the
lengths as stages of one schedule, warm-up, metrics. `--nanogpt` is scripts/nanogpt.py with the same shape, the same
micro-batches, halved where they do not fit it, and rows of the same tokens; both take turns, and the fastest of
`--rounds` turns of `--steps` steps counts. `ratio` is ours to it. `start_s` is the warm-up: compiling, and a first
pass over every shape.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nanogpt import NanoTrainer
from synthetic import write_synthetic_store

from pipeline.reader import Store
from train.config import Config
from train.config_file import parse_config
from train.run import Run
from train.utilisation import flops_per_token, parameters, peak_tflops, utilisation
from train.warmup import warm_up

SETTLING_STEPS = 2
"""At each length before the clock starts."""


def main() -> None:
    print(json.dumps(bench(arguments())))


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", help="of the model; or its --layers, --width and --heads")
    add("--layers", type=int)
    add("--width", type=int)
    add("--heads", type=int)
    add("--vocab-size", type=int, default=50_257)
    add("--mask", choices=["document", "causal"], default="document")
    add("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024])
    add("--batch-tokens", type=int, help="constant tokens a batch")
    add("--batch-sequences", type=int, help="constant sequences a batch")
    add("--micro-batch-tokens", default="auto")
    add("--steps", type=int, default=5)
    add("--rounds", type=int, default=3)
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--compile", choices=["auto", "true", "false"], default="auto")
    add(
        "--nanogpt",
        type=int,
        nargs="*",
        metavar="LENGTH",
        help="take turns with a plain GPT-2; at these lengths or all",
    )
    add("--peak-tflops", type=float, help="of the device, where it is not known by name")
    chosen = parser.parse_args(given)
    if not (chosen.batch_tokens or chosen.batch_sequences):
        chosen.batch_tokens = 524_288 if torch.cuda.is_available() else 8192
    chosen.nanogpt = chosen.lengths if chosen.nanogpt == [] else chosen.nanogpt or []
    return chosen


def bench(args: argparse.Namespace) -> dict[str, Any]:
    if args.nanogpt:
        # As nanogpt.py sets it, and before ours is compiled: graphs made under another precision are made anew.
        torch.set_float32_matmul_precision("high")
    with without_default_weights(), tempfile.TemporaryDirectory(prefix="slw-bench-") as name:
        folder = Path(name)
        write_synthetic_store(folder / "store", 4_000_000, args.vocab_size)
        config = config_of(args, folder)
        with closing(Lent(config)) as ours:
            return {
                "bench": "train",
                "device": device_name(ours.run.device),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "preset": args.preset,
                "layers": config.model.layers,
                "width": config.model.width,
                "vocab_size": args.vocab_size,
                "mask": args.mask,
                "half": ours.run.parallel.half,
                "compiled": ours.run.compiler is not None,
                "micro_batch_tokens": ours.run.micro_batch_tokens,
                "start_s": round(ours.start_s, 2),
                "graphs": ours.graphs,
                "lengths": list(measured(args, config, ours, folder)),
                "recompiles": ours.recompiles,
            }


@contextmanager
def without_default_weights() -> Iterator[None]:
    """Both models draw weights of their own after torch's, in one thread: 1.5 billions once, not twice."""
    layers = torch.nn.Linear, torch.nn.Embedding
    before = [layer.reset_parameters for layer in layers]
    try:
        for layer in layers:
            layer.reset_parameters = lambda self: None  # type: ignore[method-assign]
        yield
    finally:
        for layer, reset in zip(layers, before, strict=True):
            layer.reset_parameters = reset  # type: ignore[method-assign]


def config_of(args: argparse.Namespace, folder: Path) -> Config:
    """A run with a stage for each length, just long enough."""
    each = SETTLING_STEPS + args.rounds * args.steps
    sizes = [args.batch_tokens // n * n if args.batch_tokens else args.batch_sequences * n for n in args.lengths]
    pacing: dict[str, Any] = {"pacing": "constant", "seqlen": args.lengths[0]}
    if len(args.lengths) > 1:
        boundaries = [each * (i + 1) for i in range(len(args.lengths) - 1)]
        pacing = {"pacing": "staged", "seqlens": args.lengths, "boundaries": boundaries}
    shape = {name: getattr(args, name) for name in ("preset", "layers", "width", "heads") if getattr(args, name)}
    rule = {"global_batch_tokens": args.batch_tokens, "global_batch_sequences": args.batch_sequences}
    micro = args.micro_batch_tokens
    data = {
        "store": str(folder / "store"),
        "model": {**shape, "mask": args.mask},
        "curriculum": pacing,
        "batch": {
            **{name: value for name, value in rule.items() if value},
            "micro_batch_tokens": micro if micro == "auto" else int(micro),
        },
        "optimizer": {"lr": 6e-4, "warmup_steps": 100},
        "run": {
            "dir": str(folder / "run"),
            "total_tokens": each * sum(sizes),
            "max_epochs": 10_000,
            "device": args.device,
            "dtype": args.dtype,
            "compile": {"auto": "auto", "true": True, "false": False}[args.compile],
        },
    }
    return parse_config(data, where="bench")


class Lent:
    """A run whose steps are taken a few at a time."""

    def __init__(self, config: Config) -> None:
        self.run = Run(config, lambda text: print(text, file=sys.stderr))
        started = time.perf_counter()
        warm_up(self.run)
        self.start_s = time.perf_counter() - started
        self.graphs = self.run.compiler.graphs if self.run.compiler else 0

    @property
    def recompiles(self) -> int:
        return self.run.compiler.recompiles if self.run.compiler else 0

    def steps(self, count: int) -> int:
        """Take so many; the tokens of one."""
        for _ in range(count):
            batch = next(self.run.loader)
            self.run.step(batch)
        self.run.fetch()
        return batch.targets

    def close(self) -> None:
        self.run.loader.close()


class Plain:
    """The plain trainer over the same tokens, one flat file."""

    def __init__(self, args: argparse.Namespace, config: Config, ours: Lent, folder: Path) -> None:
        store, flat, model = Store.open(config.store), folder / "tokens.bin", config.model
        np.concatenate([store.document(i) for i in range(store.documents)]).astype(np.uint16).tofile(flat)
        self.trainer = NanoTrainer(
            layers=model.layers,
            width=model.width,
            heads=model.heads,
            length=max(args.lengths),
            vocab_size=-(-args.vocab_size // 128) * 128,
            device=ours.run.device,
            compiled=ours.run.compiler is not None,
            tokens=flat,
        )

    def settle(self, seqlen: int, sequences: int, most_tokens: int) -> None:
        """Its first steps at a length: the same micro-batches, rows halved until its logits, all at once, fit."""
        self.micro_steps = -(-sequences // max(1, most_tokens // seqlen))
        self.rows, self.seqlen = sequences // self.micro_steps, seqlen
        while True:
            try:
                self.steps(SETTLING_STEPS)
                return
            except torch.OutOfMemoryError:
                if self.rows == 1:
                    raise
            self.trainer.optimizer.zero_grad(set_to_none=True)
            self.rows, self.micro_steps = self.rows // 2, self.micro_steps * 2

    def steps(self, count: int) -> int:
        """Take so many; the tokens of one."""
        for _ in range(count):
            loss = self.trainer.step(self.rows, self.seqlen, self.micro_steps)
        float(loss)  # waits for the device
        return self.rows * self.micro_steps * self.seqlen


def measured(args: argparse.Namespace, config: Config, ours: Lent, folder: Path) -> Iterator[dict[str, Any]]:
    device = ours.run.device
    cuda = device.type == "cuda"
    count, peak = parameters(config.model, args.vocab_size), args.peak_tflops or peak_tflops(device)
    before = torch.cuda.memory_allocated() if cuda else 0
    plain = Plain(args, config, ours, folder) if args.nanogpt else None
    for seqlen in args.lengths:
        tokens = ours.steps(SETTLING_STEPS)
        beside = plain if seqlen in args.nanogpt else None
        if beside:
            beside.settle(seqlen, tokens // seqlen, ours.run.micro_batch_tokens)
        others = torch.cuda.memory_allocated() - before if cuda else 0
        rates, plain_rates, memory = [], [], 0
        for _ in range(args.rounds):
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            rates.append(rate(ours, args.steps))
            memory = max(memory, torch.cuda.max_memory_allocated() - others if cuda else 0)
            if beside:
                plain_rates.append(rate(beside, args.steps))
        mfu = utilisation(max(rates), flops_per_token(config.model, count, seqlen), peak)
        line = {
            "seqlen": seqlen,
            "batch_tokens": tokens,
            "tokens_per_s": round(max(rates), 1),
            "mfu": mfu and round(mfu, 4),
            "memory_bytes": memory or None,
        }
        if beside:
            line |= {
                "nanogpt_tokens_per_s": round(max(plain_rates), 1),
                "nanogpt_micro_batch_tokens": beside.rows * seqlen,
                "ratio": round(max(rates) / max(plain_rates), 3),
            }
        print(json.dumps(line), file=sys.stderr, flush=True)
        yield line


def rate(trainer: Lent | Plain, steps: int) -> float:
    """Tokens a second."""
    started = time.perf_counter()
    tokens = steps * trainer.steps(steps)
    return tokens / (time.perf_counter() - started)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


if __name__ == "__main__":
    main()
