"""Text from a trained run."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer

from pipeline.errors import ConfigError, RunError
from pipeline.reader import Store
from train import checkpoint
from train.config import Config
from train.model import GPT2
from train.replay import config_of_run


def load_run(run: Path) -> tuple[Config, GPT2, Store]:
    """Config, model with the newest sound weights, and store of a run. Raises RunError where there are none."""
    config = config_of_run(run)
    found = checkpoint.load_latest(run, lambda text: None)
    if found is None:
        raise RunError("the run has no checkpoint yet", where=run, remedy="go on with it: slw-train run CONFIG.toml")
    folder, state = found
    store = Store.open(config.store)
    model = GPT2(config.model, store.manifest.vocab_size, state["positions"])
    checkpoint.load_model(folder, model)
    return config, model.eval(), store


@torch.no_grad()
def sample(run: Path, prompt: str, *, tokens: int, temperature: float, top_k: int, seed: int) -> str:
    """`prompt` and up to `tokens` tokens after it; ends early at the end of the document.

    `temperature` 0 takes the likeliest token. Raises ConfigError for odd numbers, RunError where there is no run.
    """
    if tokens < 1 or temperature < 0 or top_k < 0:
        raise ConfigError("tokens must be positive, temperature and top-k not negative")
    _, model, store = load_run(run)
    tokenizer = Tokenizer.from_file(str(store.tokenizer_path))
    ids = [store.manifest.bos_id, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    given = len(ids)
    generator = torch.Generator().manual_seed(seed)
    context = model.positions.num_embeddings
    while len(ids) < given + tokens:
        window = torch.tensor([ids[-context:]])
        logits = model(window, torch.arange(window.shape[1])[None])[0, -1, : store.manifest.vocab_size]
        chosen = _choose(logits, temperature, top_k, generator)
        if chosen == store.manifest.eod_id:
            break
        ids.append(chosen)
    return str(tokenizer.decode(ids[1:], skip_special_tokens=True))


def _choose(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    return int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator))
