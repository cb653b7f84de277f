"""`slw-prep`: text -> tokens -> shards, offline. Heavy imports stay inside the commands, so that --help is quick."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from pipeline.amount import amount
from pipeline.cli_build import build, finalize, made
from pipeline.cli_exchange import export, import_command, pack
from pipeline.cli_input import input_options
from pipeline.command import FORCE, JSON, SPLIT, STORE, Group, echo_json
from pipeline.errors import ConfigError, StoreError


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="slw")
def main() -> None:
    """Tokenise a corpus once into immutable, length-indexed shards.

    \b
    slw-prep tokenizer books.jsonl --vocab-size 32000 --out tokenizer.json
    slw-prep build books.jsonl --tokenizer tokenizer.json --out shards/books
    slw-prep info shards/books
    """


for command in (build, finalize, import_command, export, pack):
    main.add_command(command)


@main.command()
@input_options
@made("--vocab-size", required=True, type=int, help="Tokens, 257 or more.")
@made("--out", required=True, type=click.Path(path_type=Path), help="The tokenizer.json to make.")
@FORCE
@JSON
def tokenizer(out: Path, vocab_size: int, as_json: bool, **options: Any) -> None:
    """Train a byte-level BPE tokenizer on a corpus; inputs as for `slw-prep build`.

    \b
    slw-prep tokenizer books.jsonl --vocab-size 32000 --out tokenizer.json
    """
    from pipeline.train_tokenizer import END_OF_DOCUMENT, train_tokenizer

    seen = [0, 0]

    def count(size: int) -> None:
        seen[0] += 1
        seen[1] += size

    trained = train_tokenizer(out=out, vocab_size=vocab_size, on_document=count, **options)
    if trained.get_vocab_size() < vocab_size:
        click.echo("note: fewer tokens than asked: the corpus has no more pairs of letters to join", err=True)
    facts = {"out": str(out), "vocab_size": trained.get_vocab_size(), "eod": END_OF_DOCUMENT, "documents": seen[0]}
    if as_json:
        echo_json(facts)
    else:
        click.echo(
            f"{out}: {amount(trained.get_vocab_size(), 'token')} from {amount(seen[0], 'document')}, "
            f"{seen[1] / 1e6:.1f} MB of text"
        )


@main.command()
@STORE
@click.option("--plot", type=click.Path(path_type=Path), metavar="PNG", help="Draw the lengths of a split.")
@SPLIT
@JSON
def info(store: Path, plot: Path | None, split: str, as_json: bool) -> None:
    """What STORE holds: documents, tokens, and how long the documents are, by documents and by tokens.

    \b
    slw-prep info shards/books
    slw-prep info shards/books --plot lengths.png
    """
    from pipeline.report import lengths_of_sources, render, summary

    facts = summary(store)
    if plot:
        from pipeline.plot import draw_lengths
        from pipeline.reader import Store

        opened = Store.open(store, split, verify=False)
        if not opened.documents:
            raise StoreError("nothing to draw: the split has no document", where=f"{store} ({split})")
        title = f"{store} ({split}): {amount(opened.documents, 'document')}, {amount(opened.tokens, 'token')}"
        draw_lengths(lengths_of_sources(opened), plot, title)
    if as_json:
        echo_json({**facts, "plot": str(plot) if plot else None})
        return
    click.echo(render(facts))
    if plot:
        click.echo(f"\n{plot}: the lengths of {split}, drawn")


@main.command()
@STORE
@JSON
def verify(store: Path, as_json: bool) -> None:
    """Read all of STORE and compare it with its manifest; exit status 1 where anything is damaged.

    \b
    slw-prep verify shards/books
    """
    from pipeline.format import Manifest
    from pipeline.progress import ProgressLine
    from pipeline.verify import verify as check

    shards = Manifest.load(store).shards
    done = [0]
    with ProgressLine("verifying", sum(shard.bytes for shard in shards)) as progress:

        def count(shard: Any) -> None:
            done[0] += shard.bytes
            progress.update(done[0], shard.file)

        damage = check(store, count)
    if as_json:
        echo_json({"store": str(store), "sound": not damage, "damage": [dataclasses.asdict(d) for d in damage]})
    elif not damage:
        tokens = sum(shard.tokens for shard in shards)
        click.echo(f"{store}: {amount(len(shards), 'shard')}, {amount(tokens, 'token')}, all sound")
    else:
        for part in damage:
            click.echo(f"damaged: {store / part.file}: {part.what}")
        click.echo(f"{amount(len(damage), 'damaged file')}; the same `slw-prep build` again repairs just that")
    sys.exit(1 if damage else 0)


@main.command()
@STORE
@click.option("--document", "index", type=int, help="Its number, from 0.")
@click.option("--id", "name", help="Its id, in a store that keeps them.")
@click.option("--tokens", "as_tokens", is_flag=True, help="Every token by itself, with its id and position.")
@SPLIT
@JSON
def show(store: Path, index: int | None, name: str | None, as_tokens: bool, split: str, as_json: bool) -> None:
    """Print one document of STORE, decoded, and where it comes from.

    \b
    slw-prep show shards/books --document 17
    slw-prep show shards/books --id gutenberg/2701 --tokens
    """
    from tokenizers import Tokenizer

    from pipeline.origin import find_id, origin
    from pipeline.reader import Store

    if (index is None) == (name is None):
        raise ConfigError("which document?", allowed="one of --document NUMBER and --id ID")
    opened = Store.open(store, split)
    number = find_id(opened, name) if name is not None else index
    assert number is not None
    ids = opened.document(number).tolist()
    tokenizer = Tokenizer.from_file(str(opened.tokenizer_path))
    text = tokenizer.decode(ids, skip_special_tokens=False)
    known = origin(opened, number)
    if as_json:
        found = {"document": number, "split": split, "id": known.id, "source": known.source, "unit": known.unit}
        echo_json({**found, "row": known.row, "tokens": ids, "text": text})
        return
    click.echo(f"document {number:,}: {amount(known.tokens, 'token')}; {known}", err=True)
    if as_tokens:
        for position, token in enumerate(ids):
            click.echo(f"{position:>7}  {token:>7}  {tokenizer.decode([token], skip_special_tokens=False)!r}")
    else:
        click.echo(text)


if __name__ == "__main__":
    main()
