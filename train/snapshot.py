"""What a checkpoint holds of a model, its optimizer and the random generators, as plain mappings; and back."""

from __future__ import annotations

import base64

import torch
from torch import Tensor, nn

from train.checkpoint import Tensors

KINDS = ("exp_avg", "exp_avg_sq", "step")
"""Parts of AdamW's state, for each parameter that has had a gradient."""


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Weights by name; no copies."""
    return {name: value.detach() for name, value in model.state_dict().items()}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state by KIND:NAME; no copies."""
    return {
        f"{kind}:{name}": value
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(tensors: Tensors, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The reverse of `optimizer_tensors`: state not in `tensors` is dropped."""
    optimizer.state.clear()
    for name, parameter in model.named_parameters():
        kept = {kind: tensors[f"{kind}:{name}"] for kind in KINDS if f"{kind}:{name}" in tensors}
        if kept:
            optimizer.state[parameter] = {kind: value.to(parameter.device) for kind, value in kept.items()}


def random_state() -> dict[str, str]:
    """States of torch's generators as base64, by device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call] # a run on a CPU leaves a GPU alone
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def load_random_state(states: dict[str, str]) -> None:
    """The reverse of `random_state`, for the devices in use."""
    torch.set_rng_state(_decoded(states["cpu"]))
    if "cuda" in states and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.set_rng_state(_decoded(states["cuda"]))


def _decoded(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
