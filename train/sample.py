"""Text from a trained run."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.errors import ConfigError
from train.trained import load_run


@torch.no_grad()
def sample(run: Path, prompt: str, *, tokens: int, temperature: float, top_k: int, seed: int) -> str:
    """`prompt` and up to `tokens` tokens after it; ends early at the end of the document.

    `temperature` 0 takes the likeliest token. Raises ConfigError for odd numbers, RunError where there is no run.
    """
    if tokens < 1 or temperature < 0 or top_k < 0:
        raise ConfigError("tokens must be positive, temperature and top-k not negative")
    trained = load_run(run)
    model, shape, tokenizer = trained.model, trained.shape, trained.tokenizer()
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise ConfigError("the prompt is not text in this terminal's encoding", found=ascii(prompt), allowed="UTF-8")
    ids = [shape.bos_id, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    given = len(ids)
    generator = torch.Generator().manual_seed(seed)
    while len(ids) < given + tokens:
        window = torch.tensor([ids[-shape.positions :]])
        logits = model(window, torch.arange(window.shape[1])[None])[0, -1, : shape.vocab_size]
        chosen = _choose(logits, temperature, top_k, generator)
        if chosen == shape.eos_id:
            break
        ids.append(chosen)
    return str(tokenizer.decode(ids[1:], skip_special_tokens=True))


def _choose(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    return int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator))
