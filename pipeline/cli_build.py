"""The commands of `slw-prep` that build a store: build, finalize."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.amount import amount
from pipeline.cli_input import input_options
from pipeline.command import (
    FORCE,
    JSON,
    STORE,
    Bytes,
    Command,
    Option,
    Place,
    contents,
    echo_json,
    note_ordinary_eod,
)
from pipeline.shell import pasted

if TYPE_CHECKING:
    from pipeline.build import BuildResult, TaskResult
    from pipeline.unit import UnitResult

made = partial(click.option, cls=Option, section="What is made")
_who = partial(click.option, cls=Option, section="Who builds it")


class Task(click.ParamType):  # type: ignore[type-arg]
    """One task of an array job, such as 3/64."""

    name = "i/n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Parse i/n."""
        try:
            task, tasks = (int(number) for number in value.split("/"))
        except ValueError:
            self.fail(f"{value!r} is not a task such as 3/64", param, ctx)
        return task, tasks


@click.command(cls=Command)
@input_options
@made("--tokenizer", required=True, type=click.Path(path_type=Path), help="A tokenizer.json, or a folder with one.")
@made("--out", required=True, type=Place(), help="The store to make: a folder, or a URL such as s3://...")
@made("--eod", help="The end-of-document token, where its name is unusual.")
@made("--bos", help="The beginning-of-document token, where its name is unusual.")
@made("--validation-fraction", default=0.0, show_default=True, help="Share of documents held out, by content.")
@made("--unit-bytes", type=Bytes(), default="64M", show_default=True, help="Input of one unit: one shard.")
@_who("--workers", default=1, show_default=True, help="Processes; the encoder has threads of its own.")
@_who("--engine", type=click.Choice(["inline", "processes", "ray"]), help="Who builds the units.")
@_who("--ray-address", help='A running Ray cluster, such as "auto"; without it Ray runs on this machine.')
@_who("--task", type=Task(), help="Only units i, i + n, ... of an array job; `finalize` commits.")
@click.option("--skip-bad", is_flag=True, help="Leave out bad records, count and report them.")
@click.option("--encoder", type=click.Choice(["auto", "fastokens", "tokenizers"]), default="auto", show_default=True)
@FORCE
@JSON
def build(
    inputs: tuple[str, ...], out: Path, task: tuple[int, int] | None, force: bool, as_json: bool, **options: Any
) -> None:
    """Build STORE from text: files, folders, patterns, URLs (s3://, gs://, hf://, https://) or - for standard input.

    Read are .jsonl, .txt, .parquet, .arrow and Hugging Face save_to_disk folders; jsonl and text also as .gz or .zst.
    A rerun of the same command goes on where a killed one stopped, and repairs a finished store that is damaged.

    \b
    slw-prep build books.jsonl --tokenizer tokenizer.json --out shards/books --validation-fraction 0.01
    slw-prep build 'src/**/*.py' --tokenizer tokenizer.json --out shards/code
    slw-prep build --source web=s3://bucket/web/ --source code=code.parquet --tokenizer t.json --out shards/mix
    zcat *.gz | slw-prep build - --format jsonl --tokenizer tokenizer.json --out shards/all
    """
    from pipeline import build as builder
    from pipeline.job import BuildOptions
    from pipeline.progress import ProgressLine

    if force and task:
        raise click.UsageError("--force would delete what other tasks built: remove the store first, then start them")
    if inputs == ("-",):
        click.echo("note: standard input cannot be read again: if it stops, begin from the start", err=True)
    note_ordinary_eod(options["tokenizer"], options["eod"])
    settings = BuildOptions(inputs=inputs, out=out, **options)
    with ProgressLine("building", 1) as progress:
        if task:
            done = builder.build_task(settings, *task, report=_reporter(progress))
        else:
            result = builder.build(settings, _reporter(progress), force=force)
    if task:
        _say_task(done, out, task, as_json)
    else:
        _say_built(result, out, as_json)


@click.command(cls=Command)
@STORE
@JSON
def finalize(store: Path, as_json: bool) -> None:
    """Commit STORE once every task of an array job is done; else say which units are missing.

    \b
    slw-prep build books/ --tokenizer tokenizer.json --out shards/books --task $SLURM_ARRAY_TASK_ID/64   # 64 times
    slw-prep finalize shards/books
    """
    from pipeline.build import finalize as commit

    manifest = commit(store)
    facts = {"store": str(store), "documents": manifest.documents(), "tokens": manifest.tokens()}
    if as_json:
        echo_json(facts)
    else:
        click.echo(f"{store}: complete; {contents(manifest)}")


def _reporter(progress: Any) -> Any:
    import time

    started, seen = time.monotonic(), [0, 0, 0]

    def report(result: UnitResult, units: int) -> None:
        seen[0] += 1
        seen[1] += result.text_bytes
        seen[2] += sum(shard.tokens for shard in result.shards)
        elapsed = max(time.monotonic() - started, 1e-9)
        rate = f"{seen[1] / elapsed / 1e6:.1f} MB/s  {seen[2] / elapsed / 1e6:.2f} M tokens/s"
        progress.total = units
        progress.update(seen[0], rate)

    return report


def _say_task(result: TaskResult, out: Path, task: tuple[int, int], as_json: bool) -> None:
    for example in result.bad_examples:
        click.echo(f"left out: {example}", err=True)
    if as_json:
        echo_json({"store": str(out), "task": task[0], "tasks": task[1], **dataclasses.asdict(result)})
    else:
        click.echo(
            f"{out}: task {task[0]}/{task[1]} is done, {result.built} of its {result.units} units built now, "
            f"{result.seconds:.1f} s\nnext, after all tasks: slw-prep finalize {pasted(out)}"
        )


def _say_built(result: BuildResult, out: Path, as_json: bool) -> None:
    from pipeline.boundaries import boundaries, render_boundaries

    manifest = result.manifest
    ends = boundaries(out, manifest)
    rate = result.tokens / max(result.seconds, 1e-9)
    facts = {
        "store": str(out),
        "already_built": result.already_built,
        "repaired": result.repaired,
        "documents": manifest.documents(),
        "tokens": manifest.tokens(),
        "validation_documents": manifest.documents("validation"),
        "validation_tokens": manifest.tokens("validation"),
        "shards": len(manifest.shards),
        "skipped": manifest.skipped,
        "bad": result.bad,
        "encoder": result.encoder,
        "unknown_share": result.unknown_share,
        **ends,
        "seconds": round(result.seconds, 3),
        "tokens_per_s": round(rate),
    }
    for example in result.bad_examples:
        click.echo(f"left out: {example}", err=True)
    if result.unknown_share:
        share = f"{result.unknown_share:.1%}"
        click.echo(f"note: of a sample's tokens {share} stand for text that the tokenizer does not know", err=True)
    if as_json:
        echo_json(facts)
        return
    if result.already_built:
        sound = "read to its end and sound"
        mended = f"{amount(result.repaired, 'damaged file')} repaired" if result.repaired else sound
        click.echo(f"{out}: already built, {mended}; {contents(manifest)}")
        click.echo(render_boundaries(ends))
        return
    click.echo(f"{out}: {contents(manifest)}; {amount(manifest.skipped, 'record')} left out ({result.bad:,} bad)")
    click.echo(render_boundaries(ends))
    click.echo(
        f"{result.seconds:.1f} s: {rate / 1e6:.2f} M tokens/s, {result.text_bytes / 1e6 / result.seconds:.1f} MB/s "
        f"with {result.encoder} ({result.encoder_reason})"
    )
    click.echo(f"next: slw-prep info {pasted(out)}")
