"""The same documents in every form that can be read, and what is read out of a form."""

import gzip

import datasets
import fsspec
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from pipeline.corpus import documents, split_units
from pipeline.documents import Reading
from pipeline.inputs import find_files

SEPARATOR = "\n===\n"
FORMS = (
    *("jsonl", "jsonl.gz", "jsonl.zst", "txt", "txt.gz", "txt.zst"),
    *("folder", "parquet", "arrow", "arrow file", "hugging face"),
)


def json_lines(texts, ending=b"\n", last=True):
    lines = [orjson.dumps({"id": i, "text": text}) for i, text in enumerate(texts)]
    return ending.join(lines) + (ending if last and lines else b"")


def write_form(folder, form, texts, rows=3):
    """Write `texts`; tables in groups of `rows`. Returns what to read and how."""
    path = folder / f"corpus.{form.replace(' ', '-')}"
    table = pa.table({"id": range(len(texts)), "text": pa.array(texts, type=pa.string())})
    if form == "folder":
        path.mkdir()
        for at, text in enumerate(texts):
            (path / f"{at:05d}.txt").write_bytes(text.encode())
    elif form == "parquet":
        pq.write_table(table, path, row_group_size=rows)
    elif form.startswith("arrow"):
        path = path.with_suffix(".arrow")
        new = pa.ipc.new_file if form == "arrow file" else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=rows)
    elif form == "hugging face":
        datasets.disable_progress_bars()
        datasets.Dataset(table).save_to_disk(path, num_shards=min(2, len(texts)))
    else:
        data = json_lines(texts) if form.startswith("jsonl") else SEPARATOR.join(texts).encode()
        pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(form.rpartition(".")[2])
        path.write_bytes(pack(data) if pack else data)
    return path, Reading(separator=SEPARATOR if form.startswith("txt") else None)


def raising(error):
    raise error


def read(reading, *inputs, unit_bytes=1 << 26, bad=raising, batch_bytes=1 << 20, sources=()):
    """All records as (text, row, id), unit by unit."""
    units = split_units(find_files(tuple(str(i) for i in inputs), reading, sources), unit_bytes, reading)
    found = []
    for unit in units:
        for batch in documents(unit, reading, bad, batch_bytes):
            ids = batch.ids or [None] * len(batch.texts)
            found += zip(batch.texts, batch.rows, ids, strict=True)
    return found


def texts_in(reading, *inputs, **more):
    return [text for text, _, _ in read(reading, *inputs, **more)]


def into_memory(path, url):
    """Copy a file or folder to a URL."""
    files = fsspec.filesystem("memory")
    for source in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if source.is_file():
            files.pipe(url + str(source).removeprefix(str(path)), source.read_bytes())
    return url
