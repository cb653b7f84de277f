"""Streams: decompressed to the last byte or refused, fetched by ranges, standard input read on after a look ahead."""

import functools
import gzip
import io
import os
import sys
import threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
import zstandard
from forms import read, texts_in, write_form
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import files
from pipeline.corpus import split_units
from pipeline.documents import Reading
from pipeline.errors import ConfigError, CorpusError
from pipeline.files import open_input
from pipeline.inputs import find_files

COMPRESS = {".gz": gzip.compress, ".zst": zstandard.compress}


def all_of(path):
    with open_input(str(path)) as stream:
        return stream.read()


@pytest.mark.parametrize("suffix", COMPRESS)
@settings(max_examples=40, deadline=None)
@given(parts=st.lists(st.binary(max_size=400), max_size=4), cut=st.integers(0, 10**6))
def test_all_members_are_read_and_a_cut_is_an_error_or_between_them(tmp_path_factory, suffix, parts, cut):
    path = tmp_path_factory.mktemp("files") / f"c{suffix}"
    packed = [COMPRESS[suffix](part) for part in parts]
    data = b"".join(packed)
    path.write_bytes(data)
    assert all_of(path) == b"".join(parts)
    cut %= len(data) + 1
    path.write_bytes(data[:cut])
    ends = {sum(map(len, packed[:n])): b"".join(parts[:n]) for n in range(len(parts) + 1)}
    if cut in ends:
        assert all_of(path) == ends[cut]
    else:
        with pytest.raises(CorpusError, match="cannot be read to its end"):
            all_of(path)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_damaged_byte_is_an_error(tmp_path, suffix):
    data = bytearray(COMPRESS[suffix](os.urandom(3000).hex().encode()))
    if suffix == ".zst":
        data = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(os.urandom(3000)))
    data[len(data) // 2] ^= 0x55
    (tmp_path / f"c{suffix}").write_bytes(data)
    with pytest.raises(CorpusError, match=rf"c\{suffix}"):
        all_of(tmp_path / f"c{suffix}")


def test_a_frame_with_a_window_of_two_gigabytes_is_read(tmp_path):
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, enable_ldm=False)
    (tmp_path / "c.zst").write_bytes(zstandard.ZstdCompressor(compression_params=parameters).compress(b"x" * 10))
    data = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "s.zst").write_bytes(data.compress(b"y" * 10) + data.flush())
    assert (all_of(tmp_path / "c.zst"), all_of(tmp_path / "s.zst")) == (b"x" * 10, b"y" * 10)


def test_standard_input_is_read_on_after_a_look_ahead(monkeypatch):
    data = os.urandom(5_000_000)

    class Given:
        buffer = io.BytesIO(data)

    monkeypatch.setattr(sys, "stdin", Given)
    for size in (10, 2_000_000):
        with files.looking_ahead(), open_input("-") as stream:
            assert stream.read(size) == data[:size]
        Given.buffer = io.BytesIO(data) if size == 10 else Given.buffer
        files._StandardInput.kept = [] if size == 10 else files._StandardInput.kept
    assert all_of("-") == data
    assert all_of("-") == b""


@contextmanager
def web_server(folder, *, ranges):
    """`folder` on loopback, with or without ranged reads. Yields its URL and the ranges that were asked for."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_HEAD(self):
            path = Path(self.translate_path(self.path))
            if not path.is_file():
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(path.stat().st_size))
            if ranges:
                self.send_header("Accept-Ranges", "bytes")
            self.end_headers()

        def do_GET(self):
            wanted = self.headers.get("Range")
            if not (ranges and wanted):
                super().do_GET()
                return
            first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            with Path(self.translate_path(self.path)).open("rb") as stream:
                stream.seek(first)
                data = stream.read(last - first + 1)
                total = stream.seek(0, io.SEEK_END)
            asked.append((first, last))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{total}")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_web_server_is_read_by_ranges_where_it_knows_them_and_whole_where_not(tmp_path, monkeypatch, ranges):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(files, "REMOTE_BLOCK_BYTES", 1000)
    texts = [f"document {i} " * 5 for i in range(200)]
    path, reading = write_form(tmp_path, "jsonl", texts)
    packed, _ = write_form(tmp_path, "jsonl.gz", texts)
    with web_server(tmp_path, ranges=ranges) as (url, asked):
        units = split_units(find_files((f"{url}/{path.name}",), reading), 4000, reading)
        assert (len(units) > 3) is ranges
        assert texts_in(reading, f"{url}/{path.name}", unit_bytes=4000, batch_bytes=500) == texts
        assert texts_in(reading, f"{url}/{packed.name}?download=true") == texts
        with pytest.raises(CorpusError, match="nothing of that name"):
            find_files((f"{url}/none.jsonl",), reading)
    assert all(last - first < 1000 for first, last in asked if packed.stat().st_size > 1000)
    assert bool(asked) is ranges


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for protocol in ("s3", "gs"):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
    for url, package in (("s3://bucket/c.jsonl", r"slw\[s3\]"), ("gs://bucket/c.jsonl", r"slw\[gs\]")):
        with pytest.raises(ConfigError, match=rf"pip install \S*{package}"):
            find_files((url,), Reading())
    with pytest.raises(ConfigError, match=r"not a URL that can be read[\s\S]*nothere"):
        find_files(("nothere://x/c.jsonl",), Reading())


def test_chained_urls_are_read_and_found_by_pattern(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        for name, text in (("b.txt", "two"), ("a.txt", "one"), ("c.md", "three")):
            archive.writestr(name, text)
    assert texts_in(Reading(), f"zip://*.txt::{tmp_path / 'c.zip'}") == ["one", "two"]
    assert texts_in(Reading(), f"zip://c.md::{tmp_path / 'c.zip'}") == ["three"]
    fsspec.filesystem("memory").pipe("/in/a.jsonl", b'{"text": "x"}\n')
    assert read(Reading(), "simplecache::memory://in/a.jsonl") == [("x", 0, None)]
    fsspec.filesystem("memory").store.clear()


def test_what_a_protocol_raises_is_an_error_of_the_file(monkeypatch):
    from fsspec.implementations.memory import MemoryFile

    fsspec.filesystem("memory").pipe("/in/a.jsonl", b'{"text": "x"}\n')

    def lost(self, size=-1):
        raise RuntimeError("connection lost")

    monkeypatch.setattr(MemoryFile, "read", lost)
    with pytest.raises(CorpusError, match=r"memory://in/a\.jsonl[\s\S]*connection lost"):
        read(Reading(), "memory://in/a.jsonl")
    fsspec.filesystem("memory").store.clear()


def test_s3_is_read_by_ranges_and_found_by_pattern(tmp_path, monkeypatch):
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    texts = [f"document {i} " * 5 for i in range(200)]
    path, reading = write_form(tmp_path, "jsonl", texts)
    table, _ = write_form(tmp_path, "parquet", texts, rows=50)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        bucket = fsspec.filesystem("s3", skip_instance_cache=True)
        bucket.mkdir("corpus")
        for file in (path, table):
            bucket.pipe(f"corpus/in/{file.name}", file.read_bytes())
        units = split_units(find_files(("s3://corpus/in/*.jsonl",), reading), 4000, reading)
        assert len(units) > 3
        assert texts_in(reading, "s3://corpus/in/", unit_bytes=4000) == texts + texts
        with pytest.raises(CorpusError, match="nothing of that name"):
            find_files(("s3://corpus/none/",), reading)
        with pytest.raises(CorpusError, match=r"s3://nobucket/"):
            find_files(("s3://nobucket/*.jsonl",), reading)
    finally:
        server.stop()
