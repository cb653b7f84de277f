"""Small corpora, builds of them, and all bytes of the store that they made."""

import orjson
from tokenizers import Tokenizer

from pipeline.documents import Reading
from pipeline.format import digest_bytes
from pipeline.job import BuildOptions
from pipeline.reader import Store
from pipeline.train_tokenizer import train_tokenizer

WORDS = [f"naïve {word} and 😀 " for word in ("fox", "ship", "café", "house", "<|endoftext|>")]


def write_jsonl(path, texts):
    path.write_bytes(b"".join(orjson.dumps({"id": i, "text": text}) + b"\n" for i, text in enumerate(texts)))


def tokenizer_of(folder):
    """A byte-level tokenizer of 400 tokens."""
    write_jsonl(folder / "words.jsonl", [word * 20 for word in WORDS])
    out = folder / "tokenizer.json"
    train_tokenizer((str(folder / "words.jsonl"),), out, vocab_size=300, reading=Reading())
    return out


def options(tokenizer, out, *inputs, **more):
    return BuildOptions(inputs=tuple(str(i) for i in inputs), tokenizer=tokenizer, out=out, **more)


def bytes_of(out):
    """Digest of every file of a store, by name: the manifest too, and whatever was left lying about."""
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.name != ".verified")
    return {path.relative_to(out).as_posix(): digest_bytes(path.read_bytes()) for path in files}


def texts_of(out, tokenizer, split="train"):
    """The decoded documents of a store; all end in its end-of-document token."""
    store, decoder = Store.open(out, split), Tokenizer.from_file(str(tokenizer))
    ids = [store.document(i).tolist() for i in range(store.documents)]
    assert all(document[-1] == store.manifest.eod_id for document in ids)
    return [decoder.decode(document[:-1], skip_special_tokens=False) for document in ids]
