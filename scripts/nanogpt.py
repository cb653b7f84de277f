"""The plain way to pretrain a GPT-2, to measure beside: what the usual public recipe does, written again in short.

Learned positions, pre-norm blocks, tied embeddings, SDPA with is_causal over whole rows, logits of all positions,
mean cross entropy, bfloat16 autocast on CUDA, fused AdamW there, gradient accumulation over fixed micro-batches,
random offsets into one flat file of tokens. Documents, positions within them and the order of data are
nobody's concern.
"""

import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.c_fc, self.c_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).split(width, dim=2)
        q, k, v = (t.view(rows, length, self.heads, width // self.heads).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(rows, length, width))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class NanoGPT(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, length: int, vocab_size: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.wte.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                scaled = name.endswith(("c_proj.weight", "c_out.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if scaled else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


class NanoTrainer:
    """A model of such a shape, and one optimizer step at a time."""

    def __init__(
        self,
        *,
        layers: int,
        width: int,
        heads: int,
        length: int,
        vocab_size: int,
        device: torch.device,
        compiled: bool,
        tokens: Path,
    ) -> None:
        torch.manual_seed(1337)
        self.device = device
        cuda = device.type == "cuda"
        torch.set_float32_matmul_precision("high")
        self.model = NanoGPT(layers, width, heads, length, vocab_size).to(device)
        groups = [
            {"params": [p for p in self.model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in self.model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), **({"fused": True} if cuda else {}))
        self.forward = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.autocast = torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext()
        self.data = tokens
        self.step_number = 0

    def batch(self, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        data = np.memmap(self.data, dtype=np.uint16, mode="r")  # anew each time, against a leak, as is usual
        at = torch.randint(len(data) - length, (rows,))
        x = torch.stack([torch.from_numpy(data[i : i + length].astype(np.int64)) for i in at])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + length].astype(np.int64)) for i in at])
        if self.device.type == "cuda":
            return tuple(t.pin_memory().to(self.device, non_blocking=True) for t in (x, y))
        return x, y

    def step(self, rows: int, length: int, micro_steps: int) -> torch.Tensor:
        """One update over `micro_steps` micro-batches of `rows` rows; the last loss."""
        self.step_number += 1
        for group in self.optimizer.param_groups:
            group["lr"] = 6e-4 * min(1.0, self.step_number / 100)
        x, y = self.batch(rows, length)
        for _ in range(micro_steps):
            with self.autocast:
                loss = self.forward(x, y) / micro_steps
            x, y = self.batch(rows, length)  # the next one, while the device computes
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()
