"""A run that begins with the weights of others: the same logits at step 0, the same tokens, then its own."""

import json
import re

import pytest
import torch
from runs import as_toml, config_of, settings_of, tiny_store, tiny_tokenizer
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from pipeline.errors import ConfigError, RunError, TokenizerError
from pipeline.vocabulary import load_vocabulary
from train import loop
from train.config_file import load_config
from train.metrics import read_metrics
from train.run import Run
from train.trained import load_hf, load_run

IDS = torch.randint(0, 50, (3, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def folder(tmp_path):
    """A random GPT-2 that transformers made, with more positions than the schedule has."""
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=50, n_positions=48, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text(tiny_tokenizer().to_str())
    return tmp_path / "hf"


def started(store, folder, **changes):
    heard = []
    this = Run(config_of(store, folder.parent / "run", run__init_from_hf=str(folder), **changes), heard.append)
    this.loader.close()
    return this, heard


@torch.no_grad()
def test_a_run_begins_with_the_logits_that_hugging_face_gives(store, folder):
    this, heard = started(store, folder)
    assert heard == []
    ours = this.model(IDS, torch.arange(32).expand_as(IDS))[..., :50]
    torch.testing.assert_close(ours, GPT2LMHeadModel.from_pretrained(folder).eval()(IDS).logits, atol=1e-4, rtol=0)


def test_it_trains_from_there_and_a_resume_goes_on_instead_of_beginning_again(store, folder, tmp_path):
    toml = tmp_path / "run.toml"
    toml.write_text(as_toml(settings_of(store, tmp_path / "run", run__init_from_hf=str(folder))))
    config = load_config(toml)
    loop.run(config, warn=lambda text: None)
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["validation_loss"] < lines[0]["validation_loss"]
    trained = load_run(tmp_path / "run")
    assert trained.shape.positions == 48
    (folder / "model.safetensors").unlink()  # a resume must not read it
    outcome = loop.run(config, warn=lambda text: None)
    assert outcome.step == lines[-1]["step"]
    after = load_run(tmp_path / "run").model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in trained.model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__layers": 3}, r"layers 2[\s\S]*layers 3[\s\S]*model\.layers=2"),
        ({"model__heads": 4}, r"heads 2[\s\S]*model\.heads=2"),
        ({"model__init": "scaled_embedding"}, r"init gpt2[\s\S]*model\.init=gpt2"),
        ({"model__positions": "rope"}, r"positions learned[\s\S]*model\.positions=learned"),
        ({"curriculum__seqlen_end": 64}, r"64 tokens[\s\S]*48 tokens"),
    ],
)
def test_another_shape_is_refused_with_the_keys_to_set(store, folder, changes, said):
    with pytest.raises(ConfigError, match=said):
        started(store, folder, **changes)


def test_other_tokens_are_refused(store, folder):
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    swapped = {**vocabulary, "w3": vocabulary["w4"], "w4": vocabulary["w3"]}
    (folder / "tokenizer.json").unlink()
    _, heard = started(store, folder)
    assert "no tokenizer.json" in heard[0]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    assert started(store, folder)[1] == []
    (folder / "vocab.json").write_text(json.dumps(swapped))
    with pytest.raises(RunError, match=r"'w3' is 4 there, 3 in the store|'w4' is 3 there, 4 in the store"):
        started(store, folder)


def test_another_size_of_vocabulary_is_refused(store, folder, tmp_path):
    folder = folder.rename(tmp_path / "their model")
    config = GPT2Config(vocab_size=60, n_positions=48, n_embd=32, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    with pytest.raises(
        RunError, match=r"60 tokens there, 50 in the store[\s\S]*--tokenizer '.*their model/tokenizer.json'"
    ):
        started(store, folder)


def test_what_is_said_of_a_folder_of_older_tokenizer_files_writes_its_tokenizer_json(store, folder):
    (folder / "tokenizer.json").unlink()
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*characters, "he", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nh e\n")
    with pytest.raises(RunError, match="in the store") as refused:
        started(store, folder)
    said = [str(refused.value)]
    for load, error in ((load_hf, RunError), (load_vocabulary, TokenizerError)):
        with pytest.raises(error) as refused:
            load(folder)
        said.append(str(refused.value))
    (command,) = {re.search(r"AutoTokenizer\.\S+", text).group() for text in said}
    assert (
        f"then build the store with its tokenizer: slw-prep build ... --tokenizer {folder}/tokenizer.json" in said[0]
    )
    eval(command, {"AutoTokenizer": AutoTokenizer})
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab() == vocabulary
    assert load_vocabulary(folder).eod_id == vocabulary["<|endoftext|>"]
    (folder / "vocab.json").unlink()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"from_pretrained\(MODEL\)"):
        load_vocabulary(folder)
