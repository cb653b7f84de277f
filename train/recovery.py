"""After a step that is not finite: its update is left out, the run rolls back, or it ends and says why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.amount import amount
from pipeline.shell import pasted
from train import checkpoint
from train.faults import WATCHED, NotFinite
from train.state import load_weights

if TYPE_CHECKING:
    from train.run import Run

SHOWN_DOCUMENTS = 5


def bad_step(run: Run, facts: dict[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
    """The line of metrics of a step that is not finite; sets `run.bad` where the run must stop or roll back."""
    wrong = {name: str(figures[name]) for name in WATCHED}  # JSON has no number for them
    line = {**facts, "elapsed_s": round(run.at.elapsed_s, 4), "nonfinite": wrong}
    settings, faults = run.config.run, run.faults
    if settings.on_nonfinite != "skip":
        run.bad = {**figures, **facts}
        return line
    faults.skip(line["step"] - 1)
    run.warn(f"step {line['step']:,} is not finite, its update is left out: loss {wrong['loss']}")
    if faults.in_a_row > settings.max_skips:
        run.bad = {**figures, **facts}
    return {**line, "skipped": faults.skipped}


def recover(run: Run, line: dict[str, Any]) -> NotFinite | None:
    """Roll back if asked for and possible, noting it in the bad step's `line`; else the error that the run ends with.

    After a rollback the run is after the bad step, with the weights and moments of a checkpoint.
    """
    assert run.bad is not None, "nothing is wrong"
    bad, run.bad, settings, faults = run.bad, None, run.config.run, run.faults
    batch = bad["step"] - 1
    if settings.on_nonfinite == "skip":
        return _report(run, bad, f", {faults.in_a_row:,} times in a row")
    if settings.on_nonfinite == "stop":
        return _report(run, bad, "")
    if faults.rollbacks == settings.max_rollbacks:
        return _report(run, bad, f", after {faults.rollbacks} rollbacks")
    run.saver.wait()
    found = run.ranks.from_first(lambda: _checkpoint_before(run, batch - settings.rollback_steps))
    if found is None:
        return _report(
            run, bad, f", and there is no checkpoint {settings.rollback_steps:,} steps before to go back to"
        )
    folder, state = Path(found[0]), found[1]
    load_weights(run, folder, state)
    run.guard.release()
    faults.roll_back(state["step"], batch)
    run.at.step, run.at.tokens_seen = bad["step"], bad["tokens_seen"]
    if run.loader.step != run.at.step:
        run.loader.load_state_dict({**run.loader.state_dict(), "step": run.at.step})
    line |= {"rolled_back_to": state["step"], "rollbacks": faults.rollbacks}
    run.warn(f"step {bad['step']:,} is not finite: on with the next batch and the weights of {folder.name}")
    return None


def _checkpoint_before(run: Run, step: int) -> tuple[str, dict[str, Any]] | None:
    """Folder and state of the newest sound checkpoint at `step` or before whose weights were not given up."""
    for folder in reversed(checkpoint.find(run.config.run.dir)):
        at = checkpoint.step_of(folder)
        if at <= step and not run.faults.is_undone(at) and not checkpoint.damage(folder):
            return str(folder), checkpoint.read_state(folder)
    return None


def _report(run: Run, bad: Mapping[str, Any], why: str) -> NotFinite:
    """The error that the run ends with; `bad`: facts and figures of the step."""
    settings, batch = run.config.run, bad["step"] - 1
    documents = np.unique(run.dealt(batch).document)
    shown = ", ".join(f"{number:,}" for number in documents[:SHOWN_DOCUMENTS].tolist())
    trace = f"slw-train trace {pasted(settings.dir)} --step {batch} --text"
    more = ", ..." if len(documents) > SHOWN_DOCUMENTS else ""
    return NotFinite(
        f"the loss or its gradient is not finite{why}",
        where=f"{settings.dir}, step {bad['step']:,}",
        found=f"loss {bad['loss']}, gradient norm {bad['grad_norm']}, learning rate {bad['lr']:.3g}; "
        f"largest root of an Adam variance {bad['variance_max']:.3g}, in {bad['variance_argmax']}; "
        f"{amount(len(documents), 'document')}: {shown}{more} ({trace})",
        remedy="lower optimizer.lr, or lengthen the warmup (optimizer.warmup_steps, curriculum.duration_steps); or "
        "the same command goes on from the last checkpoint without such updates: run.on_nonfinite=skip, or =rollback",
    )
