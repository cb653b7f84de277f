"""Both console scripts as a user calls them: examples in help, JSON, exit statuses, no traceback."""

import ctypes
import json
import os
import re
import shlex
import signal
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from runs import as_toml, settings_of, tiny_store
from tokenizers import Tokenizer
from tokenizers.models import Unigram, WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from pipeline.amount import amount
from pipeline.cli import main as prep
from train.cli import main as train

COMMANDS = [(prep, "slw-prep", name) for name in prep.commands] + [(train, "slw-train", n) for n in train.commands]


def call(script, *arguments, status=0):
    result = CliRunner().invoke(script, [str(a) for a in arguments])
    assert result.exit_code == status, (result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


@pytest.mark.parametrize(("script", "name", "command"), COMMANDS)
def test_every_command_has_an_example_and_json(script, name, command):
    text = call(script, command, "--help").output
    assert f"{name} {command} " in text.split("Options:")[0].split("Usage:")[1].split("\n", 1)[1]
    assert "--json" in text


@pytest.mark.parametrize("module", ["pipeline", "train", "pipeline.cli", "train.cli"])
def test_a_module_that_is_run_is_its_command(module):
    done = subprocess.run([sys.executable, "-m", module, "nothing"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "") and "No such command 'nothing'" in done.stderr


@pytest.mark.parametrize("command", ["run", "tune"])
@pytest.mark.parametrize(("rank", "told"), [("0", "loading PyTorch\n"), ("1", "")])
def test_a_run_says_that_it_loads_before_it_does(tmp_path, command, rank, told):
    code = f"""
import os, sys
from train.cli import main

class End:
    @staticmethod
    def find_spec(name, *rest):
        if name == "torch":
            sys.stderr.flush()
            os._exit(7)

sys.meta_path.insert(0, End)
sys.argv[1:] = ["{command}", "run.toml", "--json"]
main()
"""
    (tmp_path / "run.toml").write_text(as_toml(settings_of("store", "run")))
    environment = {**os.environ, "RANK": rank}
    started = [sys.executable, "-c", code]
    done = subprocess.run(started, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (7, "", told)
    assert "loading" not in call(train, command, "--help").output


@pytest.mark.parametrize("package", ["pipeline", "train"])
@pytest.mark.parametrize("imported", ["click", "pipeline.command"])
def test_ctrl_c_while_modules_are_imported_ends_in_a_line(package, imported):
    code = f"""
import os, signal, sys
from {package}.__main__ import main

class Press:
    @staticmethod
    def find_spec(name, *rest):
        if name == "{imported}":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Press)
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "\nstopped; the same command begins again, or goes on\n"


def test_the_whole_path_in_json(tmp_path):
    (tmp_path / "c.jsonl").write_text(
        "".join(json.dumps({"text": f"a tale of {i} words " * i}) + "\n" for i in range(1, 61))
    )
    tokenizer, store, run = tmp_path / "tokenizer.json", tmp_path / "store", tmp_path / "run"

    def ask(script, *arguments):
        return json.loads(call(script, *arguments, "--json").stdout)

    assert ask(prep, "tokenizer", tmp_path / "c.jsonl", "--vocab-size", 300, "--out", tokenizer)["documents"] == 60
    arguments = (
        "build",
        tmp_path / "c.jsonl",
        "--tokenizer",
        tokenizer,
        "--out",
        store,
        "--validation-fraction",
        0.2,
    )
    built = ask(prep, *arguments)
    assert built["documents"] + built["validation_documents"] == 60
    assert ask(prep, *arguments)["already_built"]
    assert ask(prep, "info", store)["splits"]["train"]["tokens"] == built["tokens"]
    assert ask(prep, "verify", store)["sound"]
    assert ask(prep, "show", store, "--document", 3)["text"].endswith("<|endoftext|>")
    packed = ask(prep, "pack", store, "--seqlen", 32)
    assert packed["sequences"] * 32 - packed["padding"] == built["tokens"]
    toml = tmp_path / "run.toml"
    toml.write_text(as_toml(settings_of(store, run)))
    planned = ask(train, "plan", toml)
    assert planned["ledger"]["targets"] == built["tokens"]
    assert (planned["ledger"]["served_least"], planned["ledger"]["served_most"]) == (1, 1)
    outcome = ask(train, "run", toml)
    assert (outcome["step"], outcome["tokens_seen"]) == (planned["total_steps"], built["tokens"])
    assert [outcome[key] for key in ("padding", "lost")] == [planned["ledger"][key] for key in ("padding", "lost")]
    assert outcome["padding"] == planned["total_tokens"] - built["tokens"] > 0
    assert outcome["epochs"] == 1
    compared = ask(train, "compare", run, "--out", tmp_path / "c.png")
    assert compared["runs"][0]["validation_loss"] == outcome["validation_loss"]
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert ask(train, "sample", run, "--prompt", "a tale", "--tokens", 5)["text"].startswith("a tale")


def test_text_output_says_what_to_do_next(tmp_path):
    store = tiny_store(tmp_path / "store")
    toml = tmp_path / "run.toml"
    toml.write_text(as_toml(settings_of(store, tmp_path / "run")))
    assert "documents" in call(prep, "info", store).stdout
    assert "all sound" in call(prep, "verify", store).stdout
    assert "the least possible" in call(prep, "pack", store, "--seqlen", 16).stdout
    assert "w" in call(prep, "show", store, "--document", 4).stdout
    assert "each document served 1 times" in call(train, "plan", toml).stdout
    assert "validation loss" in (ran := call(train, "run", toml).stdout)
    assert re.search(r"served: [\d,]+ targets, 1\.00 epochs; \d+ padding, 0 lost\n", ran)
    assert "spikes" in call(train, "compare", tmp_path / "run").stdout


def test_one_thing_is_not_called_several(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "a tale"}\n')
    call(prep, "tokenizer", tmp_path / "c.jsonl", "--vocab-size", 257, "--out", tmp_path / "t.json")
    (tmp_path / "c.jsonl").write_text('{"text": "a tale"}\n{"text": 3}\n')
    build = ["build", tmp_path / "c.jsonl", "--tokenizer", tmp_path / "t.json", "--out", tmp_path / "s", "--skip-bad"]
    assert "1 document, 7 tokens" in (built := call(prep, *build).stdout)
    assert "nothing held out; 1 record left out (1 bad)" in built
    assert "1 shard," in call(prep, "verify", tmp_path / "s").stdout
    assert [amount(n, "cut") for n in (0, 1, 2000)] == ["0 cuts", "1 cut", "2,000 cuts"]


@pytest.mark.parametrize("name", ["a store", "-store"])
def test_the_next_command_can_be_pasted(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.jsonl").write_text('{"text": "a tale"}\n')
    call(prep, "tokenizer", tmp_path / "c.jsonl", "--vocab-size", 257, "--out", tmp_path / "t.json")
    build = ["build", tmp_path / "c.jsonl", "--tokenizer", tmp_path / "t.json", f"--out={name}"]
    for done in (call(prep, *build, "--task", "0/1"), call(prep, *build)):
        script, *command = shlex.split(done.stdout.splitlines()[-1].partition(": ")[2])
        assert script == "slw-prep" and call(prep, *command).exit_code == 0


@pytest.mark.parametrize(
    "model",
    [WordLevel({"<unk>": 0, "a": 1, "b": 2}, "<unk>"), Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -1.0)], 0)],
    ids=["by name", "by number"],
)
def test_text_that_the_tokenizer_does_not_know_is_told(tmp_path, model):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "t.json"))
    build = ["build", tmp_path / "c.jsonl", "--tokenizer", tmp_path / "t.json", "--out", tmp_path / "s", "--force"]
    for text, share in (("a b x b y", 0.4), ("a b", 0.0)):
        (tmp_path / "c.jsonl").write_text(json.dumps({"text": text}))
        done = call(prep, *build, "--json")
        assert json.loads(done.stdout)["unknown_share"] == share
        assert ("40.0% stand for text that the tokenizer does not know" in done.stderr) == (share > 0)


def test_an_end_of_document_token_that_text_may_hold_is_told(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "a tale"}\n')
    call(prep, "tokenizer", tmp_path / "c.jsonl", "--vocab-size", 257, "--out", tmp_path / "t.json")
    given = ["--tokenizer", tmp_path / "t.json", "--force", "--out", tmp_path / "s"]
    for eod, told in (("a", True), ("<|endoftext|>", False)):
        done = call(prep, "build", tmp_path / "c.jsonl", *given, "--eod", eod)
        assert ("note: --eod 'a' is no special token" in done.stderr) == told
        pq.write_table(pa.table({"input_ids": [[1, 2]]}), tmp_path / "i.parquet")
        done = call(prep, "import", tmp_path / "i.parquet", *given, "--eod", eod)
        assert ("no special token" in done.stderr) == told


@pytest.mark.parametrize(("script", "name", "command"), COMMANDS)
def test_ctrl_c_says_whether_the_same_command_goes_on(script, name, command, monkeypatch):
    def interrupted(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr(script.commands[command], "callback", interrupted)
    monkeypatch.setattr(script.commands[command], "params", [])
    said = call(script, command, status=130).stderr
    assert ("goes on where it stopped" in said) == (command in ("build", "run", "tune"))
    assert ("begins again" in said) == (command not in ("build", "run", "tune"))


def test_ctrl_c_is_no_traceback_where_compiled_code_swallows_it(monkeypatch):
    def compiling(**options):
        ctypes.CFUNCTYPE(None)(lambda: signal.raise_signal(signal.SIGINT))()  # as numba is called back by LLVM
        raise RuntimeError("no compiled object yet")

    monkeypatch.setattr(prep.commands["pack"], "callback", compiling)
    monkeypatch.setattr(prep.commands["pack"], "params", [])
    hook, before = sys.unraisablehook, signal.signal(signal.SIGINT, signal.default_int_handler)
    try:  # a shell's background processes ignore it
        said = call(prep, "pack", status=130).stderr
        assert "begins again" in said and "Traceback" not in said
        assert (sys.unraisablehook, signal.getsignal(signal.SIGINT)) == (hook, signal.default_int_handler)
    finally:
        signal.signal(signal.SIGINT, before)


def test_too_little_memory_is_no_traceback(tmp_path):
    store = tiny_store(tmp_path / "store")
    assert "not enough memory" in call(prep, "pack", store, "--seqlen", 1 << 58, status=1).stderr


def test_a_link_that_leads_to_nothing_yet_is_followed(tmp_path):
    (tmp_path / "store").symlink_to(tmp_path / "elsewhere" / "store")
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere" / "run")
    (tmp_path / "c.jsonl").write_text('{"text": "a tale"}\n' * 40)
    call(prep, "tokenizer", tmp_path / "c.jsonl", "--vocab-size", 257, "--out", tmp_path / "t.json")
    build = ["build", tmp_path / "c.jsonl", "--tokenizer", tmp_path / "t.json", "--out", tmp_path / "store"]
    assert "40 documents" in call(prep, *build).stdout
    (tmp_path / "run.toml").write_text(as_toml(settings_of(tmp_path / "store", tmp_path / "run")))
    call(train, "run", tmp_path / "run.toml")
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"store", "run"}


def test_mistakes_end_in_a_message_and_the_right_status(tmp_path):
    store = tiny_store(tmp_path / "store")
    toml = tmp_path / "run.toml"
    toml.write_text(as_toml(settings_of(store, tmp_path / "run")))
    for status, script, *arguments in [
        (1, prep, "info", tmp_path / "none"),
        (1, prep, "build", tmp_path / "none.jsonl", "--tokenizer", store / "tokenizer.json", "--out", tmp_path / "x"),
        (
            2,
            prep,
            "build",
            toml,
            "--tokenizer",
            store / "tokenizer.json",
            "--out",
            tmp_path / "x",
            "--unit-bytes",
            "x",
        ),
        (1, prep, "build", toml, "--tokenizer", store / "tokenizer.json", "--out", "/proc/nowhere/store"),
        (2, prep, "pack", store, "--seqlen", 0),
        (2, prep, "show", store, "--document", 99),
        (2, prep, "nothing"),
        (2, train, "run", toml, "optimizer.lrr=3"),
        (2, train, "plan", toml, "run.epochs=0"),
        (2, train, "run", tmp_path / "none.toml"),
        (1, train, "run", toml, f"run.dir={toml}"),
        (1, train, "compare", tmp_path / "none"),
        (1, train, "sample", tmp_path / "none"),
    ]:
        result = call(script, *arguments, status=status)
        assert "rror:" in result.stderr, arguments
        assert "Traceback" not in result.output and "error: [Errno" not in result.stderr


def test_damage_ends_verify_with_status_1_and_names_the_shard(tmp_path):
    store = tiny_store(tmp_path / "store")
    path = store / "shards" / "00001.arrow"
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)
    assert "shards/00001.arrow: digest" in call(prep, "verify", store, status=1).stdout


def test_a_text_field_is_of_every_source_or_of_the_one_it_names(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "a b c d e f g h"}\n' * 9)
    (tmp_path / "b.jsonl").write_text('{"a=b": "a b c d e f g h"}\n' * 9)

    def ask(*fields, inputs=(f"--source=a={tmp_path / 'a.jsonl'}", f"--source=b={tmp_path / 'b.jsonl'}"), status=0):
        options = [part for field in fields for part in ("--text-field", field)]
        out = ("--vocab-size", 300, "--out", tmp_path / "t.json", "--force")
        return call(prep, "tokenizer", *inputs, *options, *out, status=status)

    ask("a=body", "b=a=b")
    ask("body", "b=a=b")
    ask("a=b", inputs=[tmp_path / "b.jsonl"])
    assert "found:   body, content" in ask("body", "content", status=2).stderr
    assert "for each source: a, b" in ask("a=body", "a=content", status=2).stderr
    assert "name the inputs" in ask("a=b", "body", inputs=[tmp_path / "b.jsonl"], status=2).stderr
