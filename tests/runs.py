"""Tiny runs for tests of the trainer."""

import numpy as np
from stores import documents_of, write_store
from tokenizers import Tokenizer, models, pre_tokenizers

from train.config_file import parse_config


def tiny_tokenizer():
    vocabulary = {f"w{i}": i for i in range(1, 50)} | {"<|endoftext|>": 0}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def tiny_store(path):
    """50 ids, small ones more often (something to learn), 60 + 6 documents."""
    data = tiny_tokenizer().to_str().encode()
    write_store(path, skewed(documents_of([1 + (i * 37) % 90 for i in range(60)])), shards=2, tokenizer=data)
    write_store(path, skewed(documents_of([30, 50, 9, 70, 12, 44], seed=5)), split="validation", tokenizer=data)
    return path


def skewed(documents):
    return [np.where(ids > 0, 1 + (ids.astype(np.int64) - 1) ** 2 // 50, 0).astype(ids.dtype) for ids in documents]


def settings_of(store, folder, **changes):
    """A run of some 40 steps; `changes` as section__key=value."""
    data = {
        "store": str(store),
        "model": {"layers": 2, "width": 32, "heads": 2},
        "curriculum": {"pacing": "linear", "seqlen_start": 8, "seqlen_end": 32, "duration_steps": 20},
        "batch": {"global_batch_sequences": 3, "micro_batch_tokens": 64},
        "optimizer": {"lr": 1e-2, "warmup_steps": 5},
        "run": {"dir": str(folder), "epochs": 1, "checkpoint_every_steps": 7, "validate_every_steps": 10},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        data[section][name] = value
    return data


def config_of(store, folder, **changes):
    return parse_config(settings_of(store, folder, **changes), where="test")


def as_toml(settings):
    """TOML of such settings: strings, numbers and tables of them."""
    lines = [f"store = {settings['store']!r}"]
    for section, table in settings.items():
        if isinstance(table, dict):
            lines += [f"[{section}]"] + [f"{key} = {value!r}" for key, value in table.items() if value is not None]
    return "\n".join(lines).replace("True", "true")
