"""Sampling: from the prompt on, seeded, by what the model says; what is no run, or was changed by hand, is told."""

import json
import shutil

import pytest
import torch
from runs import config_of, tiny_store

from pipeline.errors import ConfigError, RunError
from train import loop
from train.sample import sample
from train.trained import load_run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A short run."""
    place = tmp_path_factory.mktemp("whole")
    changes = {"run__epochs": None, "run__total_tokens": 400}
    loop.run(config_of(tiny_store(place / "store"), place / "run", **changes), warn=print)
    return place / "run"


def test_sampling_goes_on_from_the_prompt_and_is_seeded(whole):
    texts = [sample(whole, "w3 w4", tokens=12, temperature=1.0, top_k=0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("w3 w4") for text in texts)
    with pytest.raises(RunError, match="not a run"):
        sample(whole / "nowhere", "", tokens=1, temperature=1.0, top_k=0, seed=1)
    with pytest.raises(ConfigError, match="not text"):
        sample(whole, "caf\udce9", tokens=1, temperature=1.0, top_k=0, seed=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.layers": 1}, "the weights are not those of the run's config.json"),
        ([], "cannot be read[\\s\\S]*an object"),
        (None, "cannot be read[\\s\\S]*Expecting value"),
    ],
)
def test_settings_of_a_run_that_were_changed_by_hand_are_told(whole, tmp_path, changes, message):
    run = shutil.copytree(whole, tmp_path / "run")
    there = json.loads((run / "config.json").read_text())
    text = "" if changes is None else json.dumps({**there, **changes} if changes else changes)
    (run / "config.json").write_text(text)
    with pytest.raises(RunError, match=message):
        sample(run, "w3", tokens=1, temperature=1.0, top_k=0, seed=1)


def test_sampling_takes_what_the_model_says_of_all_that_is_written_so_far(whole, monkeypatch):
    """Also where that is more than the model has positions: then of the last ones. Weights that say much."""
    trained, prompt = load_run(whole), " ".join(f"w{1 + i % 40}" for i in range(28))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained.model.parameters():
            parameter.normal_(generator=generator)
    monkeypatch.setattr("train.sample.load_run", lambda run: trained)
    tokenizer, positions = trained.tokenizer(), trained.shape.positions
    ids = [trained.shape.bos_id, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    with torch.no_grad():
        for _ in range(24):
            seen = torch.tensor([ids[-positions:]])
            ids.append(int(trained.model(seen, torch.arange(seen.shape[1])[None])[0, -1].argmax()))
    assert len(ids) > positions
    assert len(set(ids[positions:])) > 1
    assert trained.shape.eos_id not in ids[1:]
    assert sample(whole, prompt, tokens=24, temperature=0.0, top_k=0, seed=1) == tokenizer.decode(ids[1:])
