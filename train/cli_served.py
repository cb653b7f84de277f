"""`slw-train plan` and `trace`: what a run serves, before it or of it. Lengths of documents are read, no token."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import click

from pipeline.command import JSON, echo_json, tell_compiling

OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")


@click.command()
@click.argument("config", required=False, type=click.Path(path_type=Path))
@OVERRIDES
@click.option("--deepspeed", type=click.Path(path_type=Path), help="A DeepSpeed config: its curriculum, as TOML.")
@click.option("--plot", type=click.Path(path_type=Path), help="A picture too: .png, .svg or .pdf.")
@click.option("--tflops", type=click.FloatRange(min=0, min_open=True), help="Hours at so many TFLOP/s, all devices.")
@click.option("--quick", is_flag=True, help="The table alone: do not rehearse the dealing.")
@JSON
def plan(
    config: Path | None,
    overrides: tuple[str, ...],
    deepspeed: Path | None,
    plot: Path | None,
    tflops: float | None,
    quick: bool,
    as_json: bool,
) -> None:
    """The whole run before it starts: lengths, steps, tokens, what the dealing serves, learning rates, FLOPs.

    With --deepspeed the curriculum and batch size of that JSON file, printed as TOML; and planned in place of
    those of CONFIG.toml, if that is given.

    \b
    slw-train plan run.toml curriculum.duration_steps=20_000
    slw-train plan run.toml --plot plan.png --tflops 400
    slw-train plan --deepspeed ds_config.json
    """
    from curriculum.plan import render
    from train.config_file import load_config

    if config is None and deepspeed is None:
        raise click.UsageError("give CONFIG.toml, or --deepspeed ds_config.json")
    translated = _translated(deepspeed, alone=config is None, as_json=as_json) if deepspeed else None
    if config is None:
        return
    settings = load_config(config, overrides, translated)
    from train.forecast import forecast, render_forecast

    if plot:
        from pipeline.plot import check_picture

        check_picture(plot)
    tell_compiling()
    schedule, what = forecast(settings, rehearsed=not quick, tflops=tflops)
    if notches := schedule.notches:
        calm, every = notches.fewest_validations, settings.run.validate_every_steps
        click.echo(
            "adaptive: validation decides when the length rises; this is the run if it never did. To seqlen "
            f"{notches.seqlen_end:,} it takes {calm:,} calm validations, {calm * every:,} steps",
            err=True,
        )
    if plot:
        from train.chart import draw

        draw(settings, schedule, what, plot)
    if as_json:
        echo_json({**what.to_json(), "picture": str(plot) if plot else None})
    else:
        click.echo(render(what.plan))
        click.echo(render_forecast(what))
        if plot:
            click.echo(f"picture: {plot}")


def _translated(deepspeed: Path, *, alone: bool, as_json: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Its [curriculum] and [batch], printed, and what of it is not taken over; `alone`: no TOML says the rest."""
    from curriculum.deepspeed import translate
    from curriculum.settings import as_toml

    curriculum, batch, left_out = translate(deepspeed)
    if left_out:
        click.echo(f"not taken over from {deepspeed}: {', '.join(left_out)}", err=True)
    if alone and not batch:
        click.echo("no train_batch_size there, or auto: set batch.global_batch_sequences yourself", err=True)
    tables = {"curriculum": curriculum, "batch": batch}
    if not as_json:
        click.echo(as_toml(tables))
    elif alone:
        echo_json(tables)
    return curriculum, batch


@click.command()
@click.argument("config_or_run", type=click.Path(path_type=Path))
@OVERRIDES
@click.option("--step", type=int, help="Which documents are in the batch of this step, counted from 0.")
@click.option("--document", type=int, help="In which steps this document is served.")
@click.option("--rank", type=int, help="Only this rank's rows; needs --world-size.")
@click.option("--world-size", type=int, help="How many ranks share a batch.")
@click.option("--text", is_flag=True, help="Decode every piece.")
@JSON
def trace(
    config_or_run: Path,
    overrides: tuple[str, ...],
    step: int | None,
    document: int | None,
    rank: int | None,
    world_size: int | None,
    text: bool,
    as_json: bool,
) -> None:
    """From a step to its documents, or from a document to its steps: before a run, or of one.

    Step N is the line of metrics.jsonl whose "step" is N + 1: that counts updates done. CONFIG_OR_RUN may be a run
    directory, whose changed schedules are followed.

    \b
    slw-train trace run.toml --step 1200 --rank 3 --world-size 8
    slw-train trace runs/slw --step 1200 --text
    slw-train trace runs/slw --document 17 --json
    """
    from curriculum.trace import render, to_json, trace_document, trace_step
    from pipeline.errors import ConfigError
    from train.replay import loader_of

    if (step is None) == (document is None):
        raise ConfigError("give one of --step and --document", found="both" if step is not None else "neither")
    if (rank is None) != (world_size is None):
        raise ConfigError("a rank is one of a number of ranks: give --rank and --world-size together, or neither")
    tell_compiling()
    loader = loader_of(config_or_run, overrides, rank=rank or 0, world_size=1 if world_size is None else world_size)
    traced = trace_step(loader, step) if step is not None else trace_document(loader, document or 0)
    decode = None
    if text:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(loader.store.tokenizer_path))
        decode = functools.partial(tokenizer.decode, skip_special_tokens=False)
    if as_json:
        echo_json(to_json(traced, loader.store, decode))
    else:
        for line in render(traced, loader.store, decode):
            click.echo(line)
