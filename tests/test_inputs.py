"""Files are found the same way everywhere: folders, patterns, Hugging Face datasets, named sources."""

import json

import datasets
import fsspec
import pytest
from forms import into_memory, texts_in

from pipeline.documents import Reading
from pipeline.errors import ConfigError, CorpusError, SlwError
from pipeline.inputs import find_files, parse_source

datasets.disable_progress_bars()


@pytest.fixture
def tree(tmp_path):
    """Files by name, each with its name as its text."""

    def make(*names):
        for name in names:
            path = tmp_path / "tree" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f'{{"text": "{name}"}}\n' if ".json" in name else name)
        return tmp_path / "tree"

    yield make
    fsspec.filesystem("memory").store.clear()


def names_in(reading, *inputs, **more):
    return [file.path.rpartition("tree/")[2] for file in find_files(tuple(map(str, inputs)), reading, **more)]


def test_folders_and_patterns_give_sorted_known_files_locally_and_remotely(tree):
    folder = tree("b/2.jsonl", "b/1.txt", "a.txt", "c.md", ".git/x.txt", ".hidden.txt", "d.py", "e.jsonl", "f.bin")
    remote = into_memory(folder, "memory://tree")
    for place in (str(folder), remote):
        assert names_in(Reading(), place) == ["a.txt", "b/1.txt", "b/2.jsonl", "c.md", "e.jsonl"]
        assert names_in(Reading(suffixes=(".py",)), place)[-2:] == ["d.py", "e.jsonl"]
        assert len(names_in(Reading(format="text"), place)) == 7
        assert names_in(Reading(), f"{place}/**/*.txt", f"{place}/a.txt") == ["a.txt", "b/1.txt"]
        assert names_in(Reading(), f"{place}/*.py", f"{place}/[ab].txt") == ["d.py", "a.txt"]
        assert texts_in(Reading(), place) == ["a.txt", "b/1.txt", "b/2.jsonl", "c.md", "e.jsonl"]


def test_a_file_named_twice_is_read_once_also_by_a_link(tree, monkeypatch):
    folder = tree("a.txt", "b.txt")
    (folder / "c.txt").symlink_to(folder / "a.txt")
    assert names_in(Reading(), folder / "b.txt", folder, folder / "c.txt") == ["b.txt", "a.txt"]
    monkeypatch.chdir(folder)
    assert texts_in(Reading(), "a.txt", "./a.txt", "../tree/a.txt", f"file://{folder}/a.txt") == ["a.txt"]
    assert names_in(Reading(), ".") == ["a.txt", "b.txt"]


def test_formats_go_by_suffix_and_can_be_said(tree):
    folder = tree("a.jsonl", "part-0", "b.TXT")
    files = find_files((str(folder / "a.jsonl"), str(folder / "part-0"), str(folder / "b.TXT")), Reading())
    assert [file.format for file in files] == ["jsonl", "text", "text"]
    assert texts_in(Reading(format="text"), folder / "a.jsonl") == ['{"text": "a.jsonl"}\n']
    (folder / "part-0").write_text('{"text": "of a part"}\n')
    assert texts_in(Reading(format="jsonl"), folder / "part-0") == ["of a part"]


@pytest.mark.parametrize("place", ["local", "memory"])
def test_a_hugging_face_folder_is_read_in_its_order_and_a_split_is_named(tmp_path, place):
    parts = {
        name: datasets.Dataset.from_dict({"text": [f"{name} {i}" for i in range(30)]}) for name in ("test", "train")
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "the both", num_shards={"test": 1, "train": 3})
    datasets.DatasetDict({"train": parts["train"]}).save_to_disk(tmp_path / "one")
    (tmp_path / "the both" / "train" / "cache-1.arrow").write_bytes(b"not ours")
    both, one = tmp_path / "the both", tmp_path / "one"
    if place == "memory":
        both, one = into_memory(both, "memory://the both"), into_memory(one, "memory://one")
    assert texts_in(Reading(), f"{both}/train", unit_bytes=100) == [f"train {i}" for i in range(30)]
    assert texts_in(Reading(), one) == [f"train {i}" for i in range(30)]
    with pytest.raises(CorpusError, match=r"splits test, train[\s\S]*name it: '\S* both/test'"):
        find_files((str(both),), Reading())
    fsspec.filesystem("memory").store.clear()


def test_more_than_ten_files_of_a_dataset_keep_their_order_and_a_lost_one_is_named(tmp_path):
    dataset = datasets.Dataset.from_dict({"text": [str(i) for i in range(24)]})
    dataset.save_to_disk(tmp_path / "d", num_shards=12)
    assert texts_in(Reading(), tmp_path / "d") == [str(i) for i in range(24)]
    lost = sorted((tmp_path / "d").glob("*.arrow"))[4]
    lost.unlink()
    with pytest.raises(CorpusError, match=lost.name):
        find_files((str(tmp_path / "d"),), Reading())
    state = json.loads((tmp_path / "d/state.json").read_text())
    (tmp_path / "d/state.json").write_text(json.dumps({**state, "_indices_data_files": [{"filename": "i.arrow"}]}))
    with pytest.raises(CorpusError, match="flatten_indices"):
        find_files((str(tmp_path / "d"),), Reading())


def test_sources_stand_together_in_the_order_of_their_names(tree):
    folder = tree("a.txt", "b.txt", "c.txt", "d/1.txt", "d/2.txt")
    pairs = [parse_source(f"{name}={folder}/{path}") for name, path in (("y", "c.txt"), ("x", "d/*"), ("y", "a.txt"))]
    files = find_files((), Reading(), tuple(pairs))
    assert [(file.source, file.path.rpartition("tree/")[2]) for file in files] == [
        ("y", "c.txt"),
        ("y", "a.txt"),
        ("x", "d/1.txt"),
        ("x", "d/2.txt"),
    ]


@pytest.mark.parametrize(
    ("inputs", "sources", "message"),
    [
        ((), (), "nothing to read"),
        (("a.txt",), (("x", "b.txt"),), r"inputs with and without a source[\s\S]*--source NAME=a\.txt"),
        (("a b.txt",), (("x", "b.txt"),), r"--source 'NAME=a b\.txt'"),
        ((), (("x", "a.txt"), ("y", "a.txt")), r"a file in two sources[\s\S]*x and y"),
        (("-", "a.txt"), (), "standard input beside other inputs"),
        (("-",), (), r"standard input has no suffix[\s\S]*--format jsonl or text"),
        (("a.parquet.gz",), (), "a compressed parquet file"),
        (("a b.jsonl.xz",), (), r"xz -dc 'a b\.jsonl\.xz' \| slw-prep build -"),
        (("m.v1.bin",), (), r"not read: \.bin[\s\S]*slw-prep import m\.v1\.idx"),
        (("m.*",), (), r"not read: \.bin[\s\S]*slw-prep import m\.v1\.idx"),
        (("f",), (), r"a folder without such files[\s\S]*--suffix"),
        (("none*",), (), "nothing of that name"),
        (("/dev/null",), (), "a pipe or a device"),
        (("memory://none/",), (), "nothing of that name"),
    ],
)
def test_what_cannot_be_found_is_said(tmp_path, monkeypatch, inputs, sources, message):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "a.parquet.gz", "a b.jsonl.xz", "m.v1.bin", "m.v1.idx"):
        (tmp_path / name).write_text(name)
    (tmp_path / "f").mkdir()
    with pytest.raises(SlwError, match=message):
        find_files(inputs, Reading(), sources)


@pytest.mark.parametrize("text", ["books", "=a.txt", "a b=c.txt", "x=", "a/b=c"])
def test_odd_names_of_sources_are_refused(text):
    with pytest.raises(ConfigError, match="NAME=PATH"):
        parse_source(text)
    assert parse_source("a-b.2_c=s3://x/y=z") == ("a-b.2_c", "s3://x/y=z")
