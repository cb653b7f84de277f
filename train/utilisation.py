"""What a run computes: FLOPs of a token; and model FLOPs utilisation (MFU), these over what its devices could.

FLOPs of one token, forward and backward: 6 N + 12 * layers * width * L (Chowdhery et al. 2022, PaLM, arXiv
2204.02311, appendix B), N the parameters that take part in matrix products: all but positions, embeddings once since
they are tied. Attention counts as if every token saw all L positions, by convention, whatever a mask or a
kernel leaves out.
"""

from __future__ import annotations

import torch

from train.config import ModelConfig
from train.model import VOCAB_MULTIPLE

PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H200 NVL": 835.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "GH200": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A10": 125.0,
    "A40": 150.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}
"""Dense bfloat16 of a device, as its vendor states, by a part of its name; the longest part that fits counts."""


def parameters(model: ModelConfig, vocab_size: int) -> int:
    """Parameters that take part in matrix products: all but positions.

    Added up by hand: to make the model, even without values, torch imports its compiler, half of what a plan takes.
    """
    tokens = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE * model.width
    block = 12 * model.width**2 + 13 * model.width  # attention 4, the rest 8; biases 9, two norms of 2
    return tokens + model.layers * block + 2 * model.width


def flops_per_token(model: ModelConfig, parameters: int, seqlen: int) -> int:
    """Forward and backward of one token in sequences of `seqlen`."""
    return 6 * parameters + attention_flops(model) * seqlen


def attention_flops(model: ModelConfig) -> int:
    """The part of them that one position costs which a token sees."""
    return 12 * model.layers * model.width


def peak_tflops(device: torch.device) -> float | None:
    """Peak TFLOP/s of one device; None for a CPU and for a GPU that is not in the table (see `run.peak_tflops`)."""
    if device.type != "cuda":
        return None
    return peak_of_name(torch.cuda.get_device_name(device))


def peak_of_name(name: str) -> float | None:
    """Peak TFLOP/s of a GPU by the name that torch gives it, such as "NVIDIA H100 80GB HBM3"."""
    words = name.replace("-", " ").split()
    found = [part for part in PEAK_TFLOPS if set(part.split()) <= set(words)]
    return PEAK_TFLOPS[max(found, key=len)] if found else None


def utilisation(tokens_per_s: float, flops: int, peak: float | None, devices: int = 1) -> float | None:
    """Share of `peak` (TFLOP/s of each device) that `flops` a token at that rate use; None where no peak is known."""
    return tokens_per_s * flops / (peak * 1e12 * devices) if peak else None
