"""The model that a run begins with: drawn anew, or with the weights of a Hugging Face folder, if they fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pipeline.errors import ConfigError, RunError
from pipeline.reader import Store
from pipeline.shell import pasted
from pipeline.vocabulary import OLDER_NAME, writing_remedy
from train import huggingface
from train.config import Config, ModelConfig
from train.huggingface import Shape
from train.model import GPT2
from train.trained import TOKENIZER_NAME, load_hf_weights


def model_to_begin_with(
    config: Config, store: Store, seqlen: int, positions: int | None, warn: Callable[[str], None]
) -> GPT2:
    """A model for sequences of `seqlen`; `positions`: those of the checkpoint that is read into it, None without one.

    Raises RunError where these are too few; ConfigError, RunError where `run.init_from_hf` does not fit.
    """
    source = config.run.init_from_hf if positions is None else None
    given = _fitting_shape(source, config.model, store, seqlen, warn) if source else None
    if positions is None:
        positions = given.positions if given else seqlen
    if config.model.positions == "rope":
        positions = max(positions, seqlen)
    elif seqlen > positions:
        raise RunError(
            "the schedule is longer than the model that was begun",
            where=config.run.dir,
            found=f"sequences of {seqlen} tokens",
            allowed=f"{positions} tokens: so many positions it has",
            remedy="keep the longest length, or begin another run",
        )
    model = GPT2(config.model, store.manifest.vocab_size, positions)
    if source and given:
        load_hf_weights(source, given, model)
    return model


def _fitting_shape(folder: Path, model: ModelConfig, store: Store, seqlen: int, warn: Callable[[str], None]) -> Shape:
    """The shape of the weights in `folder`, which a run of `model` on `store` can go on from.

    Raises ConfigError where the model that is configured has another shape or longer sequences than they have
    positions; RunError where ids mean other tokens there than in the store, or the folder holds no GPT-2.
    """
    shape = huggingface.read_shape(folder)
    keys = ("layers", "width", "heads", "positions", *(("rope_theta",) if model.positions == "rope" else ()), "init")
    wanted, found = ({key: getattr(one, key) for key in keys} for one in (model, shape.model))
    if model.embedding_scale == 1:
        found["init"] = model.init  # how weights are drawn is nothing to those that are there
    if odd := [key for key in keys if found[key] != wanted[key]]:
        raise ConfigError(
            "the model is not of the shape of the weights it begins with",
            where=folder,
            found=", ".join(f"{key} {found[key]}" for key in odd),
            allowed=", ".join(f"{key} {wanted[key]}" for key in odd) + ": what [model] says",
            remedy=" ".join(f"model.{key}={found[key]}" for key in odd),
        )
    if model.positions == "learned" and seqlen > shape.positions:
        raise ConfigError(
            "the schedule is longer than the model it begins with",
            where=folder,
            found=f"sequences of {seqlen} tokens",
            allowed=f"{shape.positions} tokens: so many positions it has",
        )
    _same_vocabulary(folder, shape, store, warn)
    return shape


def _same_vocabulary(folder: Path, shape: Shape, store: Store, warn: Callable[[str], None]) -> None:
    """Raise RunError unless an id is the same token in both."""
    ours = Tokenizer.from_file(str(store.tokenizer_path)).get_vocab(with_added_tokens=True)
    theirs = _vocabulary(folder)
    said: str | None = None
    if shape.vocab_size != store.manifest.vocab_size:
        said = f"{shape.vocab_size:,} tokens there, {store.manifest.vocab_size:,} in the store"
    elif theirs is None:
        warn(f"{folder} has no {TOKENIZER_NAME}: taken to have the tokens of the store")
    elif theirs != ours:
        odd = min(theirs.items() ^ ours.items(), key=lambda pair: pair[1])[0]
        said = f"{odd!r} is {theirs.get(odd, 'no token')} there, {ours.get(odd, 'no token')} in the store"
    if said:
        tokenizer = folder / TOKENIZER_NAME
        missing = "" if tokenizer.is_file() else f"{writing_remedy(folder)}; then "
        raise RunError(
            "the weights are for other tokens than the store's",
            where=folder,
            found=said,
            remedy=f"{missing}build the store with its tokenizer: slw-prep build ... --tokenizer {pasted(tokenizer)}",
        )


def _vocabulary(folder: Path) -> dict[str, Any] | None:
    if (path := folder / TOKENIZER_NAME).is_file():
        return dict(Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True))
    if (path := folder / OLDER_NAME).is_file():
        return dict(json.loads(path.read_bytes()))
    return None
