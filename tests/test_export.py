"""A run in Hugging Face's hands and theirs in ours: the same logits, the same ids, nothing half-written."""

import json
import resource

import pytest
import torch
from click.testing import CliRunner
from runs import config_of, tiny_store
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPTNeoXForCausalLM

from pipeline.errors import RunError, StoreError
from train import checkpoint, loop
from train.cli import main
from train.export import export_hf
from train.sample import sample
from train.trained import load_hf, load_run

IDS = torch.randint(0, 50, (3, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    store = tiny_store(folder / "store")
    config = config_of(store, folder / "run", run__keep_checkpoints=3)
    loop.run(config, warn=lambda text: None)
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "hf"
    export_hf(run, folder)
    return folder


def test_a_full_disk_is_an_error_and_leaves_nothing(run, tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(StoreError, match="cannot write"):
            export_hf(run, tmp_path / "hf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def ours(trained, ids=IDS):
    logits = trained.model(ids, torch.arange(ids.shape[1]).expand_as(ids))
    return logits[..., : trained.shape.vocab_size]


@torch.no_grad()
def theirs(folder, ids=IDS):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits


def test_hugging_face_gives_our_logits_without_the_padding_of_the_vocabulary(run, exported):
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert isinstance(model, GPT2LMHeadModel)
    assert model.dtype == torch.float32
    assert theirs(exported).shape == (3, 32, 50)
    torch.testing.assert_close(theirs(exported), ours(load_run(run)), atol=1e-4, rtol=0)
    assert ours(load_run(run)).std() > 0.1  # a model that learnt something, or any two would be equal


def test_scaled_embeddings_are_multiplied_in_and_the_output_layer_untied(tmp_path):
    config = config_of(tiny_store(tmp_path / "store"), tmp_path / "run", model__init="scaled_embedding")
    loop.run(config, warn=lambda text: None)
    export_hf(tmp_path / "run", tmp_path / "hf")
    torch.testing.assert_close(theirs(tmp_path / "hf"), ours(load_run(tmp_path / "run")), atol=1e-4, rtol=0)
    with pytest.raises(RunError, match="tie_word_embeddings"):
        load_hf(tmp_path / "hf")


@pytest.fixture(scope="module")
def rotary(run):
    """A run with rotary positions."""
    folder = run.parent / "rotary"
    config = config_of(run.parent / "store", folder, model__positions="rope", model__rope_theta=500.0)
    loop.run(config, warn=lambda text: None)
    return folder


def test_rotary_positions_make_a_gpt_neox_with_our_logits_and_back(rotary, tmp_path):
    export_hf(rotary, tmp_path / "hf")
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), GPTNeoXForCausalLM)
    torch.testing.assert_close(theirs(tmp_path / "hf"), ours(load_run(rotary)), atol=1e-4, rtol=0)
    back = load_hf(tmp_path / "hf")
    assert back.shape.model.rope_theta == 500
    assert torch.equal(ours(back), ours(load_run(rotary)))
    longer = torch.randint(0, 50, (1, 64))  # rotary positions have no end
    torch.testing.assert_close(theirs(tmp_path / "hf", longer), ours(back, longer), atol=1e-4, rtol=0)


def test_scaled_rotary_embeddings_are_exported_too(run, tmp_path):
    changes = {"model__positions": "rope", "model__init": "scaled_embedding"}
    loop.run(config_of(run.parent / "store", tmp_path / "run", **changes), warn=lambda text: None)
    export_hf(tmp_path / "run", tmp_path / "hf")
    torch.testing.assert_close(theirs(tmp_path / "hf"), ours(load_run(tmp_path / "run")), atol=1e-4, rtol=0)


def test_the_usual_gpt_neox_is_refused(rotary, tmp_path):
    export_hf(rotary, tmp_path / "hf")
    changed_config(tmp_path / "hf", use_parallel_residual=True)
    with pytest.raises(RunError, match="use_parallel_residual False"):
        load_hf(tmp_path / "hf")


def test_an_export_read_back_has_our_logits_to_the_last_bit(run, exported):
    assert torch.equal(ours(load_hf(exported)), ours(load_run(run)))


def test_a_checkpoint_can_be_chosen(run, exported, tmp_path):
    steps = [int(path.name.removeprefix("step-")) for path in checkpoint.find(run)]
    written = export_hf(run, tmp_path / "early", step=steps[0])
    assert written["step"] == steps[0]
    torch.testing.assert_close(theirs(tmp_path / "early"), ours(load_run(run, steps[0])), atol=1e-4, rtol=0)
    assert not torch.allclose(theirs(tmp_path / "early"), theirs(exported), atol=1e-3)
    with pytest.raises(RunError, match=f"no checkpoint of this step[\\s\\S]*{steps[0]}, {steps[1]}"):
        export_hf(run, tmp_path / "none", step=1)
    assert not (tmp_path / "none").exists()


def test_the_tokenizer_is_ours_and_both_special_tokens_are_known(run, exported):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert (exported / "tokenizer.json").read_bytes() == load_run(run).tokenizer_path.read_bytes()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 0)
    assert tokenizer("w3 w4 <|endoftext|> w5")["input_ids"] == [3, 4, 0, 5]
    assert tokenizer.model_max_length == 32
    config = json.loads((exported / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 0)


def test_generate_writes_what_sample_writes(run, exported):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    prompt = torch.tensor([[0, 3, 4]])  # begins with the beginning-of-document token, as training does
    written = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=9, do_sample=False)
    text = tokenizer.decode(written[0], skip_special_tokens=True)
    assert sample(run, "w3 w4", tokens=9, temperature=0.0, top_k=0, seed=1) == text


def test_what_is_in_the_way_stays_unless_it_is_an_export_and_force_is_given(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("not yours")
    for force in (False, True):
        with pytest.raises(StoreError, match="the output"):
            export_hf(run, tmp_path / "mine", force=force)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    export_hf(run, tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"")
    with pytest.raises(StoreError, match="--force"):
        export_hf(run, tmp_path / "hf")
    export_hf(run, tmp_path / "hf", force=True)
    assert load_file(tmp_path / "hf" / "model.safetensors")


def test_runs_and_exports_are_not_taken_for_each_other(run, exported):
    with pytest.raises(StoreError, match="something else"):
        export_hf(run, run, force=True)
    assert checkpoint.find(run)
    with pytest.raises(RunError, match="a Hugging Face folder"):
        load_run(exported)
    with pytest.raises(RunError, match="a Hugging Face folder"):
        loop.run(config_of(run.parent / "store", exported), force=True, warn=lambda text: None)
    assert (exported / "model.safetensors").exists()


def test_a_failed_write_leaves_nothing(run, tmp_path, monkeypatch):
    def full(*arguments, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.export.save_file", full)
    done = CliRunner().invoke(main, ["export", str(run), "--hf", str(tmp_path / "hf")])
    assert done.exit_code == 1
    assert "No space left" in done.output
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def foreign(exported, tmp_path_factory):
    """A GPT-2 that transformers made and saved, in several files, with the tokenizer of the export."""
    folder = tmp_path_factory.mktemp("foreign") / "hf"
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=50, n_positions=48, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    (folder / "tokenizer.json").write_bytes((exported / "tokenizer.json").read_bytes())
    return folder


def test_their_model_gives_their_logits_in_ours(foreign):
    torch.testing.assert_close(ours(load_hf(foreign)), theirs(foreign), atol=1e-4, rtol=0)


def test_names_of_the_first_release_are_read_too(foreign, tmp_path):
    """Those files have no `transformer.` before a name, and the causal masks among the weights."""
    copied(foreign, tmp_path)
    weights = {}
    for path in tmp_path.glob("*.safetensors"):
        weights |= {name.removeprefix("transformer."): value for name, value in load_file(path).items()}
        path.unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file({**weights, "h.0.attn.bias": torch.ones(48, 48)}, tmp_path / "model.safetensors")
    assert torch.equal(ours(load_hf(tmp_path)), ours(load_hf(foreign)))


def copied(source, target):
    target.mkdir(exist_ok=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def changed_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_pickle_is_never_read(foreign, tmp_path):
    folder = copied(foreign, tmp_path / "hf")
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(RunError, match=r"pickle[\s\S]*pytorch_model.bin[\s\S]*save_pretrained"):
        load_hf(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "llama"}, "gpt2 or gpt_neox"),
        ({"activation_function": "relu"}, "activation_function gelu_new"),
        ({"n_inner": 77}, "n_inner 128"),
        ({"scale_attn_by_inverse_layer_idx": True}, "another make"),
        ({"n_layer": 3}, r"missing or unknown: transformer\.h\.2"),
        ({"n_positions": 49}, r"another shape: positions\.weight"),
        ({"vocab_size": 51}, "50 rows of the vocabulary"),
    ],
)
def test_models_of_another_kind_are_refused_by_name(foreign, tmp_path, changes, said):
    changed_config(copied(foreign, tmp_path / "hf"), **changes)
    with pytest.raises(RunError, match=said):
        load_hf(tmp_path / "hf")


def test_a_damaged_file_and_a_missing_tokenizer_are_named(foreign, tmp_path):
    folder = copied(foreign, tmp_path / "hf")
    first = min(folder.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:100])
    with pytest.raises(RunError, match=first.name):
        load_hf(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(RunError, match="no tokenizer here"):
        load_hf(folder)
