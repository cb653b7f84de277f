"""The commands of `slw-prep` that exchange data with other systems: import, export, pack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline.amount import amount
from pipeline.command import FORCE, JSON, SPLIT, STORE, Bytes, contents, echo_json, note_ordinary_eod, tell_compiling
from pipeline.shell import pasted


class Local(click.Path):
    """A path on this machine: what is written here is renamed into its place."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click.Path, but no URL."""
        if "://" in str(value):
            self.fail(f"{value} is a URL; write to a local path, then copy it there", param, ctx)
        return super().convert(value, param, ctx)


@click.command("import")
@click.argument("inputs", nargs=-1)
@click.option(
    "--source", "sources", multiple=True, metavar="NAME=INPUT", help="In place of INPUT: a named source, to mix by."
)
@click.option("--tokenizer", required=True, type=click.Path(path_type=Path), help="The one that made the ids.")
@click.option("--out", required=True, type=Local(path_type=Path), help="The store to make.")
@click.option("--format", type=click.Choice(["megatron", "hf"]), help="Without it, told from the input.")
@click.option("--token-column", default="input_ids", show_default=True, help="Column of a dataset with the ids.")
@click.option("--id-column", help="Column of a dataset to keep as the column `id`: strings or integers.")
@click.option("--eod", help="The end-of-document token, where its name is unusual.")
@click.option("--bos", help="The beginning-of-document token, where its name is unusual.")
@click.option(
    "--validation-fraction", default=0.0, show_default=True, help="Share of documents held out, by content."
)
@click.option("--unit-bytes", type=Bytes(), default="64M", show_default=True, help="Tokens of one shard.")
@FORCE
@JSON
def import_command(
    inputs: tuple[str, ...], sources: tuple[str, ...], out: Path, as_json: bool, **options: Any
) -> None:
    """Make a store of data that is tokens already: Megatron .bin/.idx, or a Hugging Face dataset.

    A document that does not end in the end-of-document token is given one; an id outside the vocabulary is an error.

    \b
    slw-prep import data/books_text_document --tokenizer tokenizer.json --out shards/books
    slw-prep import saved_dataset/train --token-column input_ids --tokenizer tokenizer.json --out shards/books
    slw-prep import --source en=en.parquet --source code=code.bin --tokenizer tokenizer.json --out shards/mix
    """
    from pipeline.boundaries import boundaries, render_boundaries
    from pipeline.inputs import parse_source
    from pipeline.interop import ImportOptions, import_tokens
    from pipeline.progress import ProgressLine

    named = tuple(parse_source(source) for source in sources)
    note_ordinary_eod(options["tokenizer"], options["eod"])
    with ProgressLine("importing", len(inputs) + len(named)) as progress:
        result = import_tokens(
            ImportOptions(inputs=inputs, sources=named, out=out, **options),
            lambda done, tokens: progress.update(done, f"{tokens / 1e6:,.0f} M tokens"),
        )
    manifest = result.manifest
    ends = boundaries(out, manifest)
    facts = {
        "store": str(out),
        "documents": manifest.documents(),
        "tokens": manifest.tokens(),
        "validation_documents": manifest.documents("validation"),
        "validation_tokens": manifest.tokens("validation"),
        "shards": len(manifest.shards),
        **ends,
        "end_of_document_added": result.added,
        "empty": result.empty,
    }
    if as_json:
        echo_json(facts)
        return
    documents = manifest.documents() + manifest.documents("validation")
    click.echo(f"{out}: {contents(manifest)}")
    click.echo(
        f"{render_boundaries(ends)}; {amount(documents - result.added, 'document')} had that end already, "
        f"{result.added:,} were given one; {amount(result.empty, 'empty document')} left out"
    )
    click.echo(f"next: slw-prep info {pasted(out)}")


@click.command()
@STORE
@click.option("--format", "form", type=click.Choice(["megatron", "hf"]), required=True)
@click.option("--out", required=True, type=Local(path_type=Path), help="PREFIX of .bin and .idx, or a folder.")
@SPLIT
@click.option("--source", help="Only the documents of this source.")
@click.option("--eod/--no-eod", default=True, show_default=True, help="With or without the end-of-document tokens.")
@FORCE
@JSON
def export(
    store: Path, form: str, out: Path, split: str, source: str | None, eod: bool, force: bool, as_json: bool
) -> None:
    """Write the documents of STORE as Megatron .bin/.idx, or as a dataset for `datasets.load_from_disk`.

    \b
    slw-prep export shards/books --format megatron --out data/books_text_document
    slw-prep export shards/books --format hf --out books_dataset
    """
    from pipeline.interop import export_huggingface, export_megatron
    from pipeline.progress import ProgressLine
    from pipeline.reader import Store

    opened = Store.open(store, split)
    write = {"megatron": export_megatron, "hf": export_huggingface}[form]
    with ProgressLine("exporting", opened.tokens) as progress:
        documents, tokens = write(
            opened,
            out,
            source=source,
            eod=eod,
            force=force,
            progress=lambda tokens: progress.update(tokens, f"{tokens / 1e6:,.0f} M tokens"),
        )
    if as_json:
        echo_json({"store": str(store), "format": form, "out": str(out), "documents": documents, "tokens": tokens})
    else:
        files = f"{out}.bin and {out}.idx" if form == "megatron" else str(out)
        click.echo(f"{files}: {amount(documents, 'document')}, {amount(tokens, 'token')}")


@click.command()
@STORE
@click.option("--seqlen", type=int, required=True, help="Tokens of a sequence.")
@SPLIT
@click.option("--out", type=Local(path_type=Path), help="Write the sequences as a dataset into this folder.")
@click.option("--seed", default=0, show_default=True, help="Of the order of the sequences.")
@click.option("--file-bytes", type=Bytes(), default="500M", show_default=True, help="Size of the files written.")
@FORCE
@JSON
def pack(
    store: Path, seqlen: int, split: str, out: Path | None, seed: int, file_bytes: int, force: bool, as_json: bool
) -> None:
    """Pack all documents of STORE into sequences; report cuts and padding, and with --out write the sequences.

    \b
    slw-prep pack shards/books --seqlen 1024
    slw-prep pack shards/books --seqlen 1024 --out packed/books-1024
    """
    from pipeline.packed import write_packed
    from pipeline.packing import least_cuts
    from pipeline.packing import pack as pack_lengths
    from pipeline.progress import ProgressLine
    from pipeline.reader import Store

    tell_compiling()
    opened = Store.open(store, split)
    lengths = opened.lengths
    if out is None:
        packed = pack_lengths(lengths, seqlen)
    else:
        with ProgressLine("packing", opened.tokens // max(seqlen, 1) + 1) as progress:
            packed = write_packed(
                opened,
                out,
                seqlen=seqlen,
                seed=seed,
                file_bytes=file_bytes,
                force=force,
                progress=lambda rows: progress.update(rows, f"{amount(rows, 'sequence')}"),
            )
    cuts, least = len(packed.document) - len(lengths), least_cuts(lengths, seqlen)
    facts = {
        "store": str(store),
        "seqlen": seqlen,
        "documents": len(lengths),
        "sequences": packed.sequences,
        "padding": packed.padding(seqlen),
        "cuts": cuts,
        "least_cuts": least,
        "excess_cuts_per_document": (cuts - least) / max(len(lengths), 1),
        "out": str(out) if out else None,
    }
    if as_json:
        echo_json(facts)
        return
    click.echo(
        f"{amount(len(lengths), 'document')} in {amount(packed.sequences, 'sequence')} of {seqlen:,}: "
        f"{amount(packed.padding(seqlen), 'position')} of padding, "
        f"{amount(cuts, 'cut')} where {least:,} are the least possible "
        f"({facts['excess_cuts_per_document']:.4f} in excess a document)"
    )
    if out:
        click.echo(f"next: datasets.load_from_disk({str(out)!r})")
