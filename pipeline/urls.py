"""Paths and URLs of what is read: which of the two, suffix and compression, the fsspec filesystem behind a URL."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from pipeline.errors import ConfigError

COMPRESSIONS = (".gz", ".zst")
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*(://|::)")


def is_remote(path: str) -> bool:
    """Whether `path` is a URL (`s3://...`, `zip://a.txt::b.zip`), not a local path or `-`. See `local_path` first."""
    return bool(_URL.match(path))


def local_path(path: str) -> str:
    """`file:///a/b` and `local://...` as the plain path they mean; anything else as it is."""
    for scheme in ("file://", "local://"):
        if path.startswith(scheme) and "::" not in path:
            return path.removeprefix(scheme)
    return path


def suffixes_of(path: str) -> tuple[str, str]:
    """Suffix and compression of a path or URL, lower case: `.jsonl`, `.gz`. A URL's query does not count."""
    name = next((part for part in path.split("::") if "://" in part), path)
    if name.startswith(("http://", "https://")):
        name = unquote(urlsplit(name).path)
    pure = PurePosixPath(name.lower())
    if pure.suffix in COMPRESSIONS:
        return PurePosixPath(pure.stem).suffix, pure.suffix
    return pure.suffix, ""


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of `url`, and the path in it.

    Raises ConfigError where the protocol is unknown, or its library is not installed.
    """
    from fsspec.core import url_to_fs

    protocol = re.split("://|::", url, maxsplit=1)[0]
    try:
        with fetching(ImportError, ValueError):
            found: tuple[Any, str] = url_to_fs(url)
            return found
    except ImportError as error:
        raise ConfigError(
            f"reading {protocol}:// needs a library that is not installed",
            where=url,
            found=error,
            remedy=f"pip install {package_for(protocol)}",
        ) from error
    except ValueError as error:
        raise ConfigError(
            "not a URL that can be read", where=url, found=error, remedy="check the protocol"
        ) from error


def package_for(protocol: str) -> str:
    """What to install for URLs of a protocol, as pip takes it."""
    extras = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "http": "http", "https": "http"}
    if protocol in extras:
        return f"'slw[{extras[protocol]}]'"
    others = {"hf": "huggingface_hub", "abfs": "adlfs", "az": "adlfs"}
    return others.get(protocol, f"the fsspec library for {protocol}://")


@lru_cache(maxsize=1024)
def has_ranges(url: str) -> bool:
    """Whether parts of `url` can be fetched; only a web server has to be asked."""
    if not url.startswith(("http://", "https://")):
        return True
    files, path = filesystem(url)
    try:
        with fetching(), files.open(path, "rb", block_size=1, cache_type="none") as stream:
            stream.seek(1)
            return len(stream.read(1)) <= 1
    except OSError:  # it sends all or nothing
        return False


@contextlib.contextmanager
def fetching(*passed: type[Exception]) -> Iterator[None]:
    """Whatever a protocol's library raises becomes an OSError, but for `passed`."""
    try:
        yield
    except Exception as error:  # each library has a tree of its own
        if isinstance(error, (OSError, *passed)):
            raise
        raise OSError(f"{type(error).__name__}: {error}") from error
