"""JSON lines cut out of a reused buffer: the same texts and offsets whatever the buffer and the size of a read."""

import contextlib
import io

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import lines
from pipeline.documents import Reading, Unit


class Slow(io.BytesIO):
    """Gives a few bytes a call, as pipes and sockets do."""

    most = 1

    def readinto(self, room):
        return super().readinto(memoryview(room)[: self.most])


def read(data, *, batch_bytes=64, most=1 << 20):
    def fail(error):
        raise error

    @contextlib.contextmanager
    def opened(path):
        stream = Slow(data)
        stream.most = most
        yield stream

    real, lines.open_input = lines.open_input, opened
    try:
        batches = list(lines.read_lines(Unit(kind="lines", paths=("c.jsonl",)), Reading(), fail, batch_bytes))
    finally:
        lines.open_input = real
    return [record for batch in batches for record in zip(batch.texts, batch.rows, strict=True)]


@settings(max_examples=100)
@given(
    texts=st.lists(st.text(st.characters(blacklist_categories=("Cs",)), max_size=40), max_size=20),
    separator=st.sampled_from([b"\n", b"\r\n", b"\n\n", b" \n"]),
    last=st.booleans(),
    batch_bytes=st.integers(1, 200),
    most=st.integers(1, 300),
)
def test_any_buffer_and_any_read_gives_every_line_once(texts, separator, last, batch_bytes, most):
    whole = [orjson.dumps({"id": 1, "text": text}) for text in texts]
    data = separator.join(whole) + (separator if last else b"")
    found = read(data, batch_bytes=batch_bytes, most=most)
    assert [text for text, _ in found] == texts
    assert all(data[row:].startswith(line) for (_, row), line in zip(found, whole, strict=True))


def test_the_buffer_grows_for_a_long_line_and_shrinks_again():
    texts = ["a", "long " * 5000, "b" * 30, "c", "d"] * 3
    data = b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts)
    assert [text for text, _ in read(data, batch_bytes=32)] == texts
