"""A tokenizer.json: its ids, and which of them end and begin documents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from tokenizers import Tokenizer

from pipeline.encoding import lightened, make_encoder, parsed, start_encoder
from pipeline.errors import TokenizerError
from pipeline.format import FORMAT_VERSION, TOKENIZER_NAME, Manifest, digest_bytes, token_dtype

EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|bos|>", "[BOS]")
OLDER_NAME = "vocab.json"
"""The vocabulary in GPT-2 folders without a tokenizer.json."""
CONFIG_NAMES = ("tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer.json says about ids, and its bytes."""

    data: bytes
    size: int
    eod_id: int
    bos_id: int

    @property
    def digest(self) -> str:
        """Digest of the file."""
        return digest_bytes(self.data)

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint16 or uint32."""
        return token_dtype(self.size)


def load_vocabulary(
    path: Path, *, eod: str | None = None, bos: str | None = None, encoder: str = "tokenizers"
) -> Vocabulary:
    """Read a tokenizer.json, or that of a folder. `eod` and `bos` name its tokens that end and begin documents.

    Without them it is the folder's `eos_token` and `bos_token`, where save_pretrained has left them, else the first
    of EOD_NAMES and BOS_NAMES that there is.
    Where `encoder` may become fastokens, its loading begins here: it takes three times as long, but not the GIL.
    Raises TokenizerError where it is none, or has no end-of-document token.
    """
    folder = path.is_dir()
    path = path / TOKENIZER_NAME if folder else path
    if not path.is_file():
        raise TokenizerError(
            "no tokenizer here",
            where=path,
            allowed="a tokenizer.json, or a folder with one; names of a model hub are not looked up",
            remedy=writing_remedy(path.parent)
            if folder
            else "check the path, or make one: slw-prep tokenizer INPUT... --out tokenizer.json",
        )
    if folder:
        eod, bos = eod or _named(path.parent, "eos_token"), bos or _named(path.parent, "bos_token")
    data = path.read_bytes()
    try:
        lightened(data)
        if encoder != "tokenizers":
            start_encoder("fastokens", data)
        tokenizer = parsed(data)
    except Exception as error:  # tokenizers raises plain Exception
        raise TokenizerError(
            "not a tokenizer.json",
            where=path,
            found=str(error)[:200],
            allowed="the file that Hugging Face tokenizers saves",
        ) from error
    eod_id = _special_id(tokenizer, eod, EOD_NAMES, path, "--eod")
    bos_id = _special_id(tokenizer, bos, BOS_NAMES, path, "--bos", default=eod_id)
    added = tokenizer.get_added_tokens_decoder()
    return Vocabulary(data, max([lightened(data)[1], *(number + 1 for number in added)]), eod_id, bos_id)


def writing_remedy(folder: Path) -> str:
    """How to write the tokenizer.json that `folder` lacks: of its older files, where it has these."""
    source, what = "MODEL", "MODEL: its name, or a folder with its older files"
    if (folder / OLDER_NAME).is_file():
        source, what = repr(str(folder)), f"it reads {OLDER_NAME}, merges.txt and config.json there"
    command = f"AutoTokenizer.from_pretrained({source}).save_pretrained({str(folder)!r})"
    return f"write it, in Python with transformers: {command} ({what})"


def manifest_of(vocabulary: Vocabulary, parameters: dict[str, Any]) -> Manifest:
    """The manifest of a store to come, still without shards."""
    return Manifest(
        format_version=FORMAT_VERSION,
        tokenizer_digest=vocabulary.digest,
        vocab_size=vocabulary.size,
        token_dtype=str(vocabulary.dtype),
        eod_id=vocabulary.eod_id,
        bos_id=vocabulary.bos_id,
        shards=[],
        parameters=parameters,
    )


def is_special(vocabulary: Vocabulary, token: int) -> bool:
    """Whether no text is ever encoded as `token`."""
    added = parsed(vocabulary.data).get_added_tokens_decoder().get(token)
    return added is not None and bool(added.special)


def unknown_share(vocabulary: Vocabulary, texts: list[str]) -> float:
    """Share of the tokens of `texts` that are the unknown token: the text that they stand for is lost."""
    model = orjson.loads(vocabulary.data)["model"]
    name, number = model.get("unk_token"), model.get("unk_id")  # Unigram has the number
    if (name, number) == (None, None):
        return 0.0
    reference = make_encoder("tokenizers", vocabulary.data)
    unknown = number if name is None else parsed(vocabulary.data).token_to_id(name)
    ids, _ = reference.encode(texts)
    return np.count_nonzero(ids == unknown) / max(len(ids), 1) if unknown is not None else 0.0


def _named(folder: Path, key: str) -> str | None:
    """The token that the files of save_pretrained beside a tokenizer.json name so, if they do."""
    for path in (folder / name for name in CONFIG_NAMES):
        try:
            token = orjson.loads(path.read_bytes()).get(key)
            if token is not None:
                return str(token["content"] if isinstance(token, dict) else token)
        except FileNotFoundError:
            continue
        except (ValueError, AttributeError, KeyError) as error:
            raise TokenizerError("not what save_pretrained writes", where=path, found=repr(error)) from error
    return None


def _special_id(
    tokenizer: Tokenizer,
    asked: str | None,
    names: tuple[str, ...],
    path: Path,
    option: str,
    default: int | None = None,
) -> int:
    for name in (asked,) if asked is not None else names:
        found = tokenizer.token_to_id(name)
        if found is not None:
            return int(found)
    if asked is None and default is not None:
        return default
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    raise TokenizerError(
        f"the tokenizer has no token {asked!r}"
        if asked
        else "the tokenizer has no end-of-document token of a known name",
        where=path,
        found=f"added tokens {', '.join(special[:20]) or 'none'}",
        allowed=None if asked else ", ".join(names),
        remedy=f"name one of its tokens, one that no text has: {option} TOKEN",
    )
