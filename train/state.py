"""A run's state in checkpoints, as plain mappings: what is saved, how it resumes. All keys: docs/checkpoints.md."""

from __future__ import annotations

import base64
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from curriculum.adaptive import Calm
from pipeline.errors import RunError
from train import checkpoint
from train.checkpoint import Saved, Tensors
from train.faults import Faults
from train.parallel import whole
from train.stability import LossRatio
from train.watch import Watch

if TYPE_CHECKING:
    from train.run import Run

KINDS = ("exp_avg", "exp_avg_sq", "step")
"""Parts of AdamW's state, for each parameter that has had a gradient."""


@dataclass
class Progressed:
    """Where a run is."""

    step: int = 0
    """Updates done."""
    tokens_seen: int = 0
    elapsed_s: float = 0.0
    """Training alone, without validation and checkpoints; as of the last fetch."""
    clipped: int = 0
    """Steps whose gradients were scaled down; as of the last fetch."""


def save(run: Run) -> None:
    """Write a checkpoint of this moment, in the background: see `Saver`. All ranks call it, right after a fetch."""
    state = {
        "progressed": asdict(run.at),
        "loss_ratio": run.ratio.state_dict(),
        "clipping": run.clipping.state_dict(),
        "watch": run.watch.state_dict(),
        "calm": asdict(run.calm),
        "faults": asdict(run.faults),
        "positions": run.model.max_seqlen,
        "micro_batch_tokens": run.micro_batch_tokens,
        "loader": {**run.loader.state_dict(), "step": run.at.step},  # not that of a step that was given up
        "random": random_state(),
    }
    weights, moments = run.model.state_dict(), optimizer_tensors(run.model, run.optimizer)
    if run.ranks.first:
        run.saver.save(run.at.step, model=weights, optimizer=moments, state=state)
    else:
        for tensor in (*weights.values(), *moments.values()):
            whole(tensor)


def resume(run: Run, saved: Saved, change_schedule: bool) -> None:
    """Go on from a checkpoint; rank 0 alone reads it."""
    folder, state = saved
    try:
        run.loader.load_state_dict(state["loader"], change_schedule=change_schedule)
    except RunError as error:
        raise error.within(folder) from error
    load_weights(run, folder, state)
    load_random_state(state["random"])
    if run.config.batch.micro_batch_tokens == "auto":
        run.micro_batch_tokens = state["micro_batch_tokens"]
    run.at = Progressed(**state["progressed"])
    run.ratio = LossRatio.from_state(state["loss_ratio"], run.config.run.spike_ratios)
    run.watch = Watch.from_state(state["watch"])
    run.calm = Calm(**state["calm"])
    run.faults = Faults(**state["faults"])


def load_weights(run: Run, folder: Path, state: dict[str, Any]) -> None:
    """Weights, and what the optimizer and the clipping know of them."""
    first = run.ranks.first
    weights = checkpoint.read_model(folder) if first else {}
    run.model.load_state_dict(run.parallel.distributed(weights))
    moments = checkpoint.read_optimizer(folder) if first else {}
    load_optimizer(run.parallel.distributed(moments), run.model, run.optimizer)
    run.clipping.load_state_dict(state["clipping"], run.device)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state by KIND:NAME, in the order of `KINDS` (AdamW's own is another after a resume); no copies."""
    return {
        f"{kind}:{name}": optimizer.state[parameter][kind]
        for name, parameter in model.named_parameters()
        for kind in KINDS
        if kind in optimizer.state.get(parameter, {})
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
