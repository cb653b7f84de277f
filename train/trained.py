"""A trained model ready for use: from a run of ours, or from a Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from pipeline.errors import RunError
from pipeline.reader import Store
from pipeline.vocabulary import writing_remedy
from train import checkpoint, huggingface
from train.folder import CONFIG_NAME, config_of_run
from train.huggingface import Shape
from train.model import GPT2

TOKENIZER_NAME = "tokenizer.json"
WEIGHTS = (checkpoint.MODEL_NAME,)
"""All that is read of a checkpoint."""


@dataclass(frozen=True)
class Trained:
    """Weights in memory, on the CPU, in float32, and the tokenizer that their ids are of."""

    model: GPT2
    shape: Shape
    tokenizer_path: Path
    step: int | None
    """Updates done; None for a model of others."""

    def tokenizer(self) -> Tokenizer:
        """Text to ids and back."""
        return Tokenizer.from_file(str(self.tokenizer_path))


def load_run(run: Path, step: int | None = None) -> Trained:
    """A run as of its newest sound checkpoint, or of that after `step` updates.

    Raises RunError where there is no run, no such checkpoint or a damaged one; StoreError where its store is gone.
    """
    config = config_of_run(run)
    folder, state = _newest(run) if step is None else _at(run, step)
    store = Store.open(config.store)
    manifest = store.manifest
    shape = Shape(config.model, manifest.vocab_size, state["positions"], manifest.bos_id, manifest.eod_id)
    model = GPT2(config.model, shape.vocab_size, shape.positions)
    try:
        model.load_state_dict(checkpoint.read_model(folder))
    except RuntimeError as error:
        raise RunError(
            "the weights are not those of the run's config.json",
            where=folder,
            found=str(error).partition("\n\t")[2][:80],
            remedy=f"take back what was changed in {run / CONFIG_NAME}",
        ) from error
    return Trained(model.eval(), shape, store.tokenizer_path, state["step"])


def load_hf(folder: Path) -> Trained:
    """A GPT-2 of a Hugging Face folder. Raises RunError where it is none, or has no tokenizer.json."""
    shape = huggingface.read_shape(folder)
    if not (folder / TOKENIZER_NAME).is_file():
        raise RunError(
            "no tokenizer here",
            where=folder / TOKENIZER_NAME,
            remedy=writing_remedy(folder),
        )
    model = GPT2(shape.model, shape.vocab_size, shape.positions)
    load_hf_weights(folder, shape, model)
    return Trained(model.eval(), shape, folder / TOKENIZER_NAME, None)


def load_hf_weights(folder: Path, shape: Shape, model: GPT2) -> None:
    """Put the weights of a Hugging Face folder into `model`, which was made with `shape`."""
    padded = model.tokens.num_embeddings
    weights = huggingface.from_hf(huggingface.read_weights(folder), shape, padded, where=folder)
    wrong = [name for name, value in model.state_dict().items() if weights[name].shape != value.shape]
    if wrong:
        raise RunError("weights and config.json disagree", where=folder, found=f"another shape: {wrong[0]}")
    model.load_state_dict(weights)


def _newest(run: Path) -> checkpoint.Saved:
    found = checkpoint.load_latest(run, lambda text: None, WEIGHTS)
    if found is None:
        raise RunError("the run has no checkpoint yet", where=run, remedy="go on with it: slw-train run CONFIG.toml")
    return found


def _at(run: Path, step: int) -> checkpoint.Saved:
    steps = {checkpoint.step_of(folder): folder for folder in checkpoint.find(run)}
    if step not in steps:
        raise RunError(
            "no checkpoint of this step",
            where=run,
            found=f"{step:,}",
            allowed=", ".join(str(known) for known in steps) or "none yet",
            remedy="run.keep_checkpoints and run.keep_every_steps keep more of them",
        )
    if what := checkpoint.damage(steps[step], WEIGHTS):
        raise RunError("the checkpoint is damaged", where=steps[step], found=what, remedy="take another one")
    return steps[step], checkpoint.read_state(steps[step])
