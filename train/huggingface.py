"""Our weights under Hugging Face's names, and back: the same numbers, no arithmetic, so the logits stay equal.

Learned positions make a `GPT2LMHeadModel`. Its Conv1D layers hold matrices transposed, and the rows that pad our
vocabulary are cut off or added as zeros. Weights of others are read from safetensors only, never from a pickle.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import RunError
from train.config import ModelConfig

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
IGNORED = (".attn.bias", ".attn.masked_bias", "lm_head.weight")
"""Of GPT-2 files on the hub: causal masks kept as buffers, and the tied output layer."""
SAME = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
"""What makes a GPT-2 ours: allowed values, the first being Hugging Face's default."""


PARTS = (
    ("norm_1", "ln_1"),
    ("attention.qkv", "attn.c_attn"),
    ("attention.out", "attn.c_proj"),
    ("norm_2", "ln_2"),
    ("up", "mlp.c_fc"),
    ("down", "mlp.c_proj"),
)
"""Modules of a block: ours, theirs."""
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


@dataclass(frozen=True)
class Shape:
    """What a model was made with."""

    model: ModelConfig
    vocab_size: int
    """Without padding."""
    positions: int
    """Longest sequence."""
    bos_id: int
    eos_id: int


def hf_config(shape: Shape) -> dict[str, Any]:
    """config.json of a `GPT2LMHeadModel`."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": shape.vocab_size,
        "n_positions": shape.positions,
        "n_embd": shape.model.width,
        "n_layer": shape.model.layers,
        "n_head": shape.model.heads,
        "n_inner": None,
        **{key: allowed[0] for key, allowed in SAME.items()},
        "tie_word_embeddings": shape.model.embedding_scale == 1,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": shape.bos_id,
        "eos_token_id": shape.eos_id,
        "dtype": "float32",
        "torch_dtype": "float32",  # its name before transformers 5
    }


def to_hf(weights: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """`GPT2.state_dict()` as that of a `GPT2LMHeadModel`: float32, without padding.

    A scale of the embeddings is multiplied in, and the output layer then has weights of its own.
    """
    renamed = {theirs: weights[ours].to(torch.float32) for ours, theirs in names(shape.model.layers).items()}
    renamed["transformer.wte.weight"] = renamed["transformer.wte.weight"][: shape.vocab_size]
    if shape.model.embedding_scale != 1:
        renamed["lm_head.weight"] = renamed["transformer.wte.weight"]
        for name in ("transformer.wte.weight", "transformer.wpe.weight"):
            renamed[name] = renamed[name] * shape.model.embedding_scale
    return {name: _turned(name, value) for name, value in renamed.items()}


def from_hf(weights: dict[str, Tensor], shape: Shape, padded_vocab_size: int, *, where: Path) -> dict[str, Tensor]:
    """A `GPT2LMHeadModel`'s weights as `GPT2.state_dict()`, the vocabulary padded with zeros.

    Raises RunError where a tensor is missing, unknown or of another shape than `shape` says.
    """
    given = {f"transformer.{name.removeprefix('transformer.')}": value for name, value in weights.items()}
    given = {name: value for name, value in given.items() if not name.endswith(IGNORED)}
    known = names(shape.model.layers)
    if odd := sorted(given.keys() ^ set(known.values())):
        raise RunError(
            "not the weights of this GPT-2", where=where, found=f"missing or unknown: {', '.join(odd[:3])}"
        )
    tokens = given["transformer.wte.weight"]
    if len(tokens) != shape.vocab_size:
        raise RunError("weights and config.json disagree", where=where, found=f"{len(tokens)} rows of the vocabulary")
    padding = tokens.new_zeros(padded_vocab_size - len(tokens), tokens.shape[1])
    given["transformer.wte.weight"] = torch.cat([tokens, padding])
    return {ours: _turned(theirs, given[theirs]) for ours, theirs in known.items()}


def read_shape(folder: Path) -> Shape:
    """What config.json of a GPT-2 says. Raises RunError where there is none, or it is of a kind that is not ours."""
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_bytes())
        kind = config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise RunError("not a Hugging Face model folder", where=path, found=error) from error
    if kind != "gpt2":
        raise RunError("not a GPT-2", where=path, found=f"model_type {kind!r}", allowed="gpt2")
    odd = {key: config[key] for key, allowed in SAME.items() if config.get(key, allowed[0]) not in allowed}
    width = config.get("n_embd", 768)
    if config.get("n_inner") not in (None, 4 * width):
        odd["n_inner"] = config["n_inner"]
    if odd:
        allowed = ", ".join(f"{key} {SAME[key][0] if key in SAME else 4 * width}" for key in odd)
        raise RunError("a GPT-2 of another make", where=path, found=odd, allowed=allowed)
    model = ModelConfig(layers=config.get("n_layer", 12), width=width, heads=config.get("n_head", 12))
    eos = config.get("eos_token_id", 50256)
    return Shape(
        model,
        vocab_size=config.get("vocab_size", 50257),
        positions=config.get("n_positions", 1024),
        bos_id=config.get("bos_token_id", eos),
        eos_id=eos,
    )


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors, as float32. Raises RunError where there are none or damaged ones."""
    if (index := folder / INDEX_NAME).is_file():
        files = sorted({folder / Path(name).name for name in json.loads(index.read_bytes())["weight_map"].values()})
    else:
        files = [folder / WEIGHTS_NAME]
    if not files[0].is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        raise RunError(
            "no safetensors here" + (": weights are not read from a pickle, which can run code" if pickles else ""),
            where=folder,
            found=", ".join(pickles) or None,
            allowed=f"{WEIGHTS_NAME}, or {INDEX_NAME} and its files",
            remedy="convert it where you trust it: GPT2LMHeadModel.from_pretrained(DIR).save_pretrained(NEW)",
        )
    weights: dict[str, Tensor] = {}
    for path in files:
        try:
            weights |= load_file(path)
        except (OSError, SafetensorError) as error:
            raise RunError("cannot read weights", where=path, found=error) from error
    return {name: value.to(torch.float32) for name, value in weights.items()}


def names(layers: int) -> dict[str, str]:
    """Our name of every tensor -> theirs."""
    found = {"tokens.weight": "transformer.wte.weight", "positions.weight": "transformer.wpe.weight"}
    modules = {f"blocks.{i}.{ours}": f"transformer.h.{i}.{theirs}" for i in range(layers) for ours, theirs in PARTS}
    for ours, theirs in {**modules, "norm": "transformer.ln_f"}.items():
        found |= {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}
    return found


def _turned(theirs: str, value: Tensor) -> Tensor:
    """Matrices of their Conv1D layers are [in, out], ours [out, in]; anything else stays."""
    return (value.T if theirs.endswith(CONV1D) else value).contiguous()
