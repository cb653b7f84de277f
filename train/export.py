"""A run as a Hugging Face folder: weights, config, generation config, tokenizer; `from_pretrained` takes it as it is.

    DIR/config.json  generation_config.json  model.safetensors  tokenizer.json  tokenizer_config.json

Made beside its place and renamed: whole or not at all. Weights are float32, whatever the run computed in.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer

from pipeline.errors import StoreError
from pipeline.place import sync
from pipeline.staging import new_folder
from train import huggingface
from train.huggingface import Shape
from train.trained import TOKENIZER_NAME, load_run

MARKER = "generation_config.json"
"""What makes a folder an export, that may be replaced: config.json is in a run, too."""


def export_hf(run: Path, out: Path, *, step: int | None = None, force: bool = False) -> dict[str, Any]:
    """Write `run` to the folder `out`; returns what was written.

    Raises RunError where there is no such checkpoint; StoreError where `out` is in the way (an earlier export is
    replaced with `force`) or the disk is full.
    """
    trained = load_run(run, step)
    shape = trained.shape
    weights = huggingface.to_hf(trained.model.state_dict(), shape)
    documents = {
        huggingface.CONFIG_NAME: huggingface.hf_config(shape),
        MARKER: {"bos_token_id": shape.bos_id, "eos_token_id": shape.eos_id},
        "tokenizer_config.json": _tokenizer_config(trained.tokenizer(), shape),
    }
    with new_folder(out, marker=MARKER, force=force) as folder:
        try:
            save_file(weights, folder / huggingface.WEIGHTS_NAME, metadata={"format": "pt"})
        except SafetensorError as error:
            remedy = "make room or choose another place, then the same command again"
            raise StoreError("cannot write", where=out, found=error, remedy=remedy) from error
        (folder / TOKENIZER_NAME).write_bytes(trained.tokenizer_path.read_bytes())
        for name, document in documents.items():
            (folder / name).write_text(json.dumps(document, indent=2) + "\n")
        for path in folder.iterdir():
            sync(path)
    return {
        "dir": str(out),
        "run": str(run),
        "step": trained.step,
        "parameters": sum(value.numel() for value in weights.values()),
        "vocab_size": shape.vocab_size,
        "positions": shape.positions,
    }


def _tokenizer_config(tokenizer: Tokenizer, shape: Shape) -> dict[str, Any]:
    """So that `AutoTokenizer` takes tokenizer.json as it is and knows both special tokens."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.id_to_token(shape.bos_id),
        "eos_token": tokenizer.id_to_token(shape.eos_id),
        "model_max_length": shape.positions,
        "clean_up_tokenization_spaces": False,
    }
