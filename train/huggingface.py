"""Our weights under Hugging Face's names, and back: the same numbers, so the logits stay equal.

Learned positions make a `GPT2LMHeadModel`, rotary ones a `GPTNeoXForCausalLM` (train/dialects.py). The rows that pad
our vocabulary are cut off or added as zeros. Weights of others are read from safetensors only, never from a pickle.
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
from train.dialects import DIALECTS, Dialect, dialect_of

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


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
    """config.json of a model of theirs."""
    theirs, model = dialect_of(shape.model), shape.model
    values = {**model.model_dump(), "positions": shape.positions, "vocab_size": shape.vocab_size}
    config = {
        "architectures": [theirs.architecture],
        "model_type": theirs.model_type,
        **{name: values[ours] for ours, (name, _) in theirs.sizes.items()},
        theirs.inner: 4 * model.width,
        **{key: allowed[0] for key, allowed in theirs.switches.items()},
        "tie_word_embeddings": model.embedding_scale == 1,
        "bos_token_id": shape.bos_id,
        "eos_token_id": shape.eos_id,
        "dtype": "float32",
        "torch_dtype": "float32",  # its name before transformers 5
    }
    if model.positions == "rope":
        rope = {"rope_type": "default", "rope_theta": model.rope_theta, "partial_rotary_factor": 1.0}
        return {**config, "rope_parameters": rope, "rotary_emb_base": model.rope_theta}  # and before transformers 5
    return {**config, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def to_hf(weights: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """`GPT2.state_dict()` as that of a model of theirs: float32, without padding.

    A scale of the embeddings is multiplied in, and the output layer then has weights of its own.
    """
    theirs, scale = dialect_of(shape.model), shape.model.embedding_scale
    given = {name: value.to(torch.float32) for name, value in weights.items()}
    given["tokens.weight"] = given["tokens.weight"][: shape.vocab_size]
    output = {}
    if scale != 1:
        output[theirs.output] = given["tokens.weight"].contiguous()
        given |= {name: given[name] * scale for name in ("tokens.weight", "positions.weight") if name in given}
    names = theirs.names(shape.model.layers)
    heads = shape.model.heads
    return {**{name: theirs.to_theirs(name, given[ours], heads) for ours, name in names.items()}, **output}


def from_hf(weights: dict[str, Tensor], shape: Shape, padded_vocab_size: int, *, where: Path) -> dict[str, Tensor]:
    """Weights of theirs as `GPT2.state_dict()`, the vocabulary padded with zeros.

    Raises RunError where a tensor is missing or unknown, or the vocabulary is not of the size that `shape` says.
    """
    theirs = dialect_of(shape.model)
    given = {name: value for name, value in weights.items() if name not in (theirs.output, "lm_head.weight")}
    given = {theirs.prefix + name.removeprefix(theirs.prefix): value for name, value in given.items()}
    given = {name: value for name, value in given.items() if not name.endswith(theirs.ignored)}
    names = theirs.names(shape.model.layers)
    if odd := sorted(given.keys() ^ set(names.values())):
        what = f"missing or unknown: {', '.join(odd[:3])}"
        raise RunError(f"not the weights of this {theirs.architecture}", where=where, found=what)
    tokens = given[names["tokens.weight"]]
    if len(tokens) != shape.vocab_size:
        raise RunError("weights and config.json disagree", where=where, found=f"{len(tokens)} rows of the vocabulary")
    padding = tokens.new_zeros(padded_vocab_size - len(tokens), tokens.shape[1])
    given[names["tokens.weight"]] = torch.cat([tokens, padding])
    return {ours: theirs.to_ours(name, given[name], shape.model.heads) for ours, name in names.items()}


def read_shape(folder: Path) -> Shape:
    """What a folder's config.json says. Raises RunError where there is none, or it is of a kind that is not ours."""
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_bytes())
        kind = config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise RunError("not a Hugging Face model folder", where=path, found=error) from error
    known = {theirs.model_type: positions for positions, theirs in DIALECTS.items()}
    if kind not in known:
        allowed = " or ".join(known)
        raise RunError("not a model that ours can be", where=path, found=f"model_type {kind!r}", allowed=allowed)
    theirs = DIALECTS[known[kind]]
    sizes = {ours: config.get(name, default) for ours, (name, default) in theirs.sizes.items()}
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    _check_switches(config, rope, theirs, 4 * sizes["width"], path)
    positions, vocab_size = sizes.pop("positions"), sizes.pop("vocab_size")
    if kind == "gpt_neox":
        sizes["rope_theta"] = rope.get("rope_theta", config.get("rotary_emb_base", 10_000.0))
    model = ModelConfig.model_validate({"positions": known[kind], **sizes})
    eos = config.get("eos_token_id", vocab_size - 1)
    return Shape(model, vocab_size, positions, bos_id=config.get("bos_token_id", eos), eos_id=eos)


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
            remedy="convert it where you trust it: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)",
        )
    weights: dict[str, Tensor] = {}
    for path in files:
        try:
            weights |= load_file(path)
        except (OSError, SafetensorError) as error:
            raise RunError("cannot read weights", where=path, found=error) from error
    return {name: value.to(torch.float32) for name, value in weights.items()}


def _check_switches(config: dict[str, Any], rope: dict[str, Any], theirs: Dialect, inner: int, path: Path) -> None:
    allowed = {**theirs.switches, theirs.inner: (inner, None), "rope_type": ("default",)}
    given = {key: values[0] for key, values in allowed.items()} | theirs.defaults | config
    given["rope_type"] = rope.get("rope_type", "default")
    if "partial_rotary_factor" in rope:
        given["rotary_pct"] = rope["partial_rotary_factor"]
    odd = {key: given[key] for key, values in allowed.items() if given[key] not in values}
    if odd:
        raise RunError(
            f"a {theirs.architecture} of another make than ours",
            where=path,
            found=", ".join(f"{key} {value}" for key, value in odd.items()),
            allowed=", ".join(f"{key} {allowed[key][0]}" for key in odd),
        )
