"""The reader: what was stored is what is served, and damage is named before a token of it is."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import documents_of, write_store

from pipeline.errors import ConfigError, StoreError
from pipeline.reader import Store


@pytest.mark.parametrize("vocab_size", [50, 70_000])
def test_documents_come_back_over_any_number_of_shards(tmp_path, vocab_size):
    documents = documents_of([5, 1, 9, 30, 2, 2, 17], vocab_size)
    write_store(tmp_path, documents, shards=3, vocab_size=vocab_size)
    store = Store.open(tmp_path)
    assert store.lengths.tolist() == [len(d) for d in documents]
    for index, document in enumerate(documents):
        assert store.document(index).tolist() == document.tolist()
        assert store.document(index).dtype == document.dtype


def test_a_tokenizer_that_is_another_is_not_decoded_with(tmp_path):
    write_store(tmp_path, documents_of([5]), tokenizer=b"{}")
    assert Store.open(tmp_path).tokenizer_path.read_bytes() == b"{}"
    (tmp_path / "tokenizer.json").write_bytes(b"{ }")
    with pytest.raises(StoreError, match=r"not the one[\s\S]*tokenizer.json[\s\S]*slw-prep build"):
        Store.open(tmp_path).tokenizer_path  # noqa: B018
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(StoreError, match="missing"):
        Store.open(tmp_path).tokenizer_path  # noqa: B018


@given(pieces=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 40), st.integers(1, 40)), max_size=20))
def test_inputs_are_labels_shifted_by_one_within_the_document(tmp_path_factory, pieces):
    documents = documents_of([5, 1, 9, 30, 2, 2, 17])
    path = tmp_path_factory.mktemp("store")
    write_store(path, documents, shards=2, bos_id=49)
    pieces = [(d, s % len(documents[d]), n) for d, s, n in pieces]
    pieces = [(d, s, min(n, len(documents[d]) - s)) for d, s, n in pieces]
    document, start, length = np.array(pieces, dtype=np.int64).reshape(-1, 3).T.copy()
    inputs, labels, positions = np.empty((3, int(length.sum())), dtype=np.int64)
    Store.open(path).gather(document, start, length, inputs, labels, positions)
    assert labels.tolist() == [int(documents[d][s + k]) for d, s, n in pieces for k in range(n)]
    before = [int(documents[d][s + k - 1]) if s + k else 49 for d, s, n in pieces for k in range(n)]
    assert inputs.tolist() == before
    assert positions.tolist() == [k for _, _, n in pieces for k in range(n)]


@pytest.fixture(scope="module", params=[50, 70_000])
def long_documents(tmp_path_factory, request):
    documents = documents_of([5000, 3, 1, 9001, 40], request.param)
    path = tmp_path_factory.mktemp("store")
    write_store(path, documents, shards=2, vocab_size=request.param, bos_id=49)
    return Store.open(path), documents


@given(
    pieces=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9000), st.integers(1, 9001)), min_size=1, max_size=6),
    dtype=st.sampled_from([np.int32, np.int64]),
    shifts=st.tuples(*[st.integers(0, 17)] * 3),
)
def test_pieces_of_any_length_go_to_any_address_and_nowhere_else(long_documents, pieces, dtype, shifts):
    store, documents = long_documents
    pieces = [(d, s % len(documents[d]), n) for d, s, n in pieces]
    pieces = [(d, s, min(n, len(documents[d]) - s)) for d, s, n in pieces]
    document, start, length = np.array(pieces, dtype=np.int64).T.copy()
    size = int(length.sum())
    memory = [np.full(shift + size + 9, -5, dtype=dtype) for shift in shifts]
    store.gather(document, start, length, *[m[shift : shift + size] for m, shift in zip(memory, shifts, strict=True)])
    with_bos = [np.append(49, tokens) for tokens in documents]
    expected = [
        np.concatenate([with_bos[d][s : s + n] for d, s, n in pieces]),
        np.concatenate([documents[d][s : s + n] for d, s, n in pieces]),
        np.concatenate([np.arange(n) for _, _, n in pieces]),
    ]
    for found, shift, values in zip(memory, shifts, expected, strict=True):
        assert np.array_equal(found, np.pad(values.astype(np.int64), (shift, 9), constant_values=-5))


@pytest.mark.parametrize("piece", [(3, 0, 1), (7, 0, 1), (-1, 0, 1), (0, -1, 2), (0, 5, 1), (0, 3, 3), (0, 0, 0)])
def test_a_piece_outside_its_document_is_a_bug_that_is_found(tmp_path, piece):
    write_store(tmp_path, documents_of([5, 1, 9]), shards=2)
    store, out = Store.open(tmp_path), np.empty((3, piece[2]), dtype=np.int64)
    store.document(2), store.document(0)  # every shard is mapped: only the kernel looks
    for name in ("_offsets_at", "_tokens_at"):  # a read beyond the last shard's address finds that shard, not chance
        setattr(store, name, np.append(getattr(store, name), getattr(store, name)[-1])[:-1])
    with pytest.raises(AssertionError, match="outside its document"):
        store.gather(*np.array([piece], dtype=np.int64).T.copy(), *out)


def test_a_flipped_bit_is_found_before_tokens_are_served(tmp_path):
    manifest = write_store(tmp_path, documents_of([100, 100]))
    path = tmp_path / manifest.shards[0].file
    data = bytearray(path.read_bytes())
    data[-40] ^= 4
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"00000\.arrow"):
        Store.open(tmp_path).document(0)


def test_a_bad_offset_is_found_at_first_use_even_without_digests(tmp_path):
    documents = documents_of([100, 100])
    manifest = write_store(tmp_path, documents)
    path = tmp_path / manifest.shards[0].file
    data = path.read_bytes()
    offsets = np.array([0, 100, 200], dtype="<i8").tobytes()
    assert data.count(offsets) == 1
    path.write_bytes(data.replace(offsets, np.array([0, 10**9, 200], dtype="<i8").tobytes()))
    store = Store.open(tmp_path, verify=False)
    for use in (lambda: store.lengths, lambda: next(store.shard_lengths([0])), lambda: store.document(1)):
        with pytest.raises(StoreError, match="offsets"):
            use()


def test_opening_touches_no_shard_and_use_only_the_one_that_is_needed(tmp_path):
    documents = documents_of([5, 1, 9, 30])
    manifest = write_store(tmp_path, documents, shards=3)
    for shard in (0, 2):
        (tmp_path / manifest.shards[shard].file).unlink()
    store = Store.open(tmp_path)
    assert (store.documents, store.tokens, store.sources) == (4, 45, {"": range(4)})
    assert store.document(2).tolist() == documents[2].tolist()
    assert next(store.shard_lengths([1])).tolist() == [9]
    with pytest.raises(StoreError, match=r"missing[\s\S]*00002\.arrow"):
        store.document(3)


def test_verification_is_remembered_until_the_file_changes(tmp_path):
    manifest = write_store(tmp_path, documents_of([100, 100]))
    Store.open(tmp_path).document(0)
    assert (tmp_path / ".verified").exists()
    path = tmp_path / manifest.shards[0].file
    data = bytearray(path.read_bytes())
    data[-40] ^= 4
    path.write_bytes(data)
    with pytest.raises(StoreError, match="digest"):
        Store.open(tmp_path).document(1)


def test_the_fingerprint_names_what_is_served(tmp_path):
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        write_store(tmp_path / name, documents_of([9, 9], seed=seed))
    a, b, c = (Store.open(tmp_path / name).fingerprint for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("given", [3, None, b"books", ["books"]])
def test_what_is_no_path_is_refused(given):
    with pytest.raises(ConfigError, match=r"not a path[\s\S]*text or a Path"):
        Store.open(given)


def test_missing_things_are_named(tmp_path, monkeypatch):
    with pytest.raises(StoreError, match=r"no store here[\s\S]*slw-prep import"):
        Store.open(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match=rf"where: +nowhere\s+found: .* in {tmp_path}, where this was started"):
        Store.open("nowhere")
    with pytest.raises(StoreError, match=r"manifest\.json"):
        Store.open(tmp_path)
    store = tmp_path / "a store"
    manifest = write_store(store, documents_of([3]))
    with pytest.raises(ConfigError, match="validation"):
        Store.open(store, "test")
    with pytest.raises(ConfigError, match="0 to 0"):
        Store.open(store).document(1)
    (store / manifest.shards[0].file).unlink()
    with pytest.raises(StoreError, match=r"missing[\s\S]*slw-prep verify '.*/a store';"):
        Store.open(store).document(0)


def test_the_documents_of_a_source_stand_together(tmp_path):
    write_store(tmp_path, documents_of([5, 1, 9]), shards=2, source="books")
    write_store(tmp_path, documents_of([7, 7]), source="code")
    store = Store.open(tmp_path)
    assert store.sources == {"books": range(3), "code": range(3, 5)}
    assert store.lengths.tolist() == [5, 1, 9, 7, 7]
