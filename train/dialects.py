"""GPT-2 and GPT-NeoX of Hugging Face, which compute what our model does: their names of parts, sizes, switches.

Learned positions: GPT-2, whose Conv1D layers hold matrices transposed. Rotary positions: GPT-NeoX without its
parallel residual and with all of a head turned, whose queries, keys and values lie head by head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from train.config import ModelConfig

Turn = Callable[[str, Tensor, int], Tensor]
"""(their name, tensor, heads) -> the tensor in the other's layout, contiguous."""


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """One of their models."""

    model_type: str
    architecture: str
    prefix: str
    """What every name begins with but the output layer's; GPT-2 files of the first release lack it."""
    tokens: str
    positions: str | None
    blocks: str
    parts: dict[str, str]
    """Modules of a block: ours, theirs."""
    norm: str
    output: str
    ignored: tuple[str, ...] = ()
    """Ends of names of buffers in old files."""
    sizes: dict[str, tuple[str, int]]
    """Our name of a size -> its key in config.json, and the default where that is missing."""
    inner: str
    """The width of the feed-forward layer: missing or 4 times that of the model."""
    switches: dict[str, tuple[Any, ...]]
    """Key in config.json -> allowed values; the first is what we write."""
    to_theirs: Turn
    to_ours: Turn
    defaults: dict[str, Any] = field(default_factory=dict)
    """What holds where a switch is missing there, if it is not the first of those allowed."""

    def names(self, layers: int) -> dict[str, str]:
        """Our name of every tensor -> theirs."""
        found = {"tokens.weight": f"{self.tokens}.weight"}
        if self.positions:
            found["positions.weight"] = f"{self.positions}.weight"
        modules = {
            f"blocks.{i}.{ours}": f"{self.blocks}.{i}.{theirs}"
            for i in range(layers)
            for ours, theirs in self.parts.items()
        }
        for ours, theirs in {**modules, "norm": self.norm}.items():
            found |= {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}
        return {ours: self.prefix + theirs for ours, theirs in found.items()}


def _transposed(theirs: str, value: Tensor, heads: int) -> Tensor:
    """Matrices of their Conv1D layers are [in, out], ours [out, in]; anything else stays."""
    conv1d = theirs.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    return (value.T if conv1d else value).contiguous()


def _by_head(theirs: str, value: Tensor, heads: int) -> Tensor:
    """Rows of ours [3, H, D] -> theirs [H, 3, D], for queries, keys and values; anything else stays."""
    if ".query_key_value." not in theirs:
        return value.contiguous()
    return value.reshape(3, heads, -1, *value.shape[1:]).transpose(0, 1).flatten(0, 2)


def _by_kind(theirs: str, value: Tensor, heads: int) -> Tensor:
    """`_by_head` undone."""
    if ".query_key_value." not in theirs:
        return value.contiguous()
    return value.reshape(heads, 3, -1, *value.shape[1:]).transpose(0, 1).flatten(0, 2)


GPT2_DIALECT = Dialect(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    tokens="wte",
    positions="wpe",
    blocks="h",
    parts={
        "norm_1": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "norm_2": "ln_2",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    },
    norm="ln_f",
    output="lm_head.weight",
    ignored=(".attn.bias", ".attn.masked_bias"),
    sizes={
        "layers": ("n_layer", 12),
        "width": ("n_embd", 768),
        "heads": ("n_head", 12),
        "positions": ("n_positions", 1024),
        "vocab_size": ("vocab_size", 50257),
    },
    inner="n_inner",
    switches={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    },
    to_theirs=_transposed,
    to_ours=_transposed,
)
NEOX_DIALECT = Dialect(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    tokens="embed_in",
    positions=None,
    blocks="layers",
    parts={
        "norm_1": "input_layernorm",
        "attention.qkv": "attention.query_key_value",
        "attention.out": "attention.dense",
        "norm_2": "post_attention_layernorm",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    },
    norm="final_layer_norm",
    output="embed_out.weight",
    ignored=(".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
    sizes={
        "layers": ("num_hidden_layers", 44),
        "width": ("hidden_size", 6144),
        "heads": ("num_attention_heads", 64),
        "positions": ("max_position_embeddings", 2048),
        "vocab_size": ("vocab_size", 50432),
    },
    inner="intermediate_size",
    switches={
        "hidden_act": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_eps": (1e-5,),
        "use_parallel_residual": (False,),
        "attention_bias": (True,),
        "rotary_pct": (1.0,),
        "tie_word_embeddings": (True,),
    },
    defaults={"hidden_act": "gelu", "use_parallel_residual": True, "rotary_pct": 0.25, "tie_word_embeddings": False},
    to_theirs=_by_head,
    to_ours=_by_kind,
)
DIALECTS = {"learned": GPT2_DIALECT, "rope": NEOX_DIALECT}
"""Our `model.positions` -> dialect."""


def dialect_of(model: ModelConfig) -> Dialect:
    """Which of their models ours is."""
    return DIALECTS[model.positions]
