"""What the instruments of stability cost, as a share of a training step: one JSON line.

    python scripts/bench_stability.py --preset gpt2-micro --seqlen 256 --sequences 8

Random tokens; each part is timed on its own, in turn with whole steps, and the fastest of all rounds counts. Beside
the always-on instruments: their floor, a sum of the moments that they read; the optimizer's step; clipping by norm
against `torch.nn.utils.clip_grad_norm_`, AdaGC, and one look at the attention logits, which is off by default.

`always_on_share` is of the instruments alone. `net_share` is what a step costs more than one of a plain loop that
clips with torch, at a step where nothing is clipped: there our clipping leaves the gradients alone.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from train.attention import Sight
from train.clipping import Clipping
from train.config import ModelConfig, OptimizerConfig
from train.model import GPT2
from train.optimizer import make_optimizer
from train.stability import AdamVariance, LossRatio, largest_attention_logit
from train.watch import Watch


def timed(part: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    part()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2-micro")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = parser.parse_args()
    device = torch.device(asked.device)
    torch.manual_seed(1)
    model = GPT2(ModelConfig(preset=asked.preset), asked.vocabulary, asked.seqlen).to(device)
    config = OptimizerConfig()
    optimizer = make_optimizer(model, config)
    ids = torch.randint(0, asked.vocabulary, (asked.sequences, asked.seqlen), device=device)
    positions = torch.arange(asked.seqlen, device=device).expand_as(ids)
    use = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def loss_of() -> Tensor:
        with use:
            return model(ids, positions, Sight(), ids) / ids.numel()

    def plain() -> None:
        loss_of().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    variance, ratio, watch = AdamVariance(model, optimizer), LossRatio(), Watch()
    by_norm, adagc = Clipping(config), Clipping(OptimizerConfig(clipping="adagc", clipping_warmup_steps=1))
    step = 0

    def host() -> None:
        nonlocal step
        step += 1
        loss = 5 + math.sin(step)
        watch.update(asked.seqlen, {"loss_ratio": ratio.update(loss, asked.seqlen).own, "variance_max": loss})

    def logits() -> None:
        with use:
            largest_attention_logit(model, lambda: model(ids[:1], positions[:1], Sight()))

    plain()
    loss_of().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    moments = [optimizer.state[parameter]["exp_avg_sq"] for parameter in model.parameters()]
    parts: dict[str, Callable[[], object]] = {
        "adam_variance": variance.measure,
        "sum_of_moments": lambda: [moment.sum() for moment in moments],
        "optimizer_step": optimizer.step,
        "loss_ratio_and_watch": host,
        "clip_grad_norm_of_torch": lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0),
        "clipping_by_norm": lambda: by_norm.apply(gradients, 1),
        "clipping_adagc": lambda: adagc.apply(gradients, 1),
        "attention_logit_once": logits,
    }
    best = dict.fromkeys(["step", *parts], math.inf)
    for _ in range(asked.rounds):
        for name, part in parts.items():
            for _ in range(3):
                best[name] = min(best[name], timed(part, device))
        kept = [gradient.clone() for gradient in gradients]
        optimizer.zero_grad(set_to_none=True)
        best["step"] = min(best["step"], timed(plain, device))
        for parameter, gradient in zip(model.parameters(), kept, strict=True):
            parameter.grad = gradient
        gradients[:] = kept
    instruments = best["adam_variance"] + best["loss_ratio_and_watch"]
    clipping = best["clipping_by_norm"] - best["clip_grad_norm_of_torch"]
    print(
        json.dumps(
            {
                "bench": "stability",
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                **{key: getattr(asked, key) for key in ("preset", "vocabulary", "seqlen", "sequences", "rounds")},
                "parameters": sum(p.numel() for p in model.parameters()),
                "step_ms": round(1000 * best["step"], 3),
                "always_on_share": round((instruments + max(0.0, clipping)) / best["step"], 5),
                "net_share": round((instruments + clipping) / best["step"], 5),
                **{f"{name}_ms": round(1000 * value, 4) for name, value in best.items() if name != "step"},
                "attention_logit_once_share": round(best["attention_logit_once"] / best["step"], 4),
            }
        )
    )


if __name__ == "__main__":
    main()
