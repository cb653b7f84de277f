"""`slw-train`: batches -> weights, metrics, pictures: `run`, `tune`, `compare`. Imports inside keep --help quick."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.command import JSON, Group, echo_json, tell_compiling
from train.cli_served import OVERRIDES, plan, trace
from train.cli_trained import evaluate, export, sample

if TYPE_CHECKING:
    from train.loop import Outcome

CONFIG = click.argument("config", type=click.Path(path_type=Path))


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="slw")
def main() -> None:
    """Train a GPT with a sequence length schedule and watch its stability.

    \b
    slw-train plan run.toml
    slw-train tune run.toml
    slw-train run run.toml optimizer.lr=1e-3
    slw-train trace runs/slw --step 1200
    slw-train compare runs/constant runs/slw --out compare.png
    """


@main.command()
@CONFIG
@OVERRIDES
@click.option("--force", is_flag=True, help="Start over: delete the run that is there.")
@click.option(
    "--reschedule", "change_schedule", is_flag=True, help="Go on with another schedule; what was served stays served."
)
@click.option("--init-from-hf", type=click.Path(path_type=Path), help="Begin with this folder's GPT-2 weights.")
@JSON
def run(
    config: Path,
    overrides: tuple[str, ...],
    force: bool,
    change_schedule: bool,
    init_from_hf: Path | None,
    as_json: bool,
) -> None:
    """Train as CONFIG.toml says; the same command goes on where a stopped or killed run left off.

    SIGTERM, SIGUSR1 and the first Ctrl-C write a checkpoint and end with exit status 75: the same command, later.

    \b
    slw-train run run.toml run.dir=runs/hot optimizer.lr=2e-3
    slw-train run run.toml --init-from-hf exported/slw     # the same as run.init_from_hf=exported/slw
    """
    from train.config_file import load_config

    if init_from_hf:
        overrides = (*overrides, f"run.init_from_hf={json.dumps(str(init_from_hf))}")
    if "RANK" not in os.environ:  # else the ranks hear of a mistake together
        load_config(config, overrides)
    _loading()
    from train.distributed import together
    from train.loop import run as train
    from train.signals import STOPPED, StoppedEarly

    try:
        with together() as ranks:
            settings = load_config(config, overrides)
            outcome = train(settings, force=force, change_schedule=change_schedule, warn=_warn, ranks=ranks)
            if ranks.first:  # before any rank ends: torchrun then ends the others
                echo_json(dataclasses.asdict(outcome)) if as_json else _tell(outcome)
    except StoppedEarly as early:
        _warn(f"stopped by {early.name} before the first step; the same command begins again, or goes on")
        sys.exit(STOPPED)
    ranks.exit(0 if outcome.finished else STOPPED)


def _loading() -> None:
    """Before PyTorch is imported, which takes seconds, from a cold disk many: lines of waits, ears for signals."""
    from train.signals import ended_at_once

    first = os.environ.get("RANK", "0") == "0"
    click.get_current_context().with_resource(ended_at_once(tell=first))
    if "torch" not in sys.modules and first:
        _warn("loading PyTorch")
    tell_compiling()


def _warn(text: str) -> None:
    click.echo(text, err=True)


def _tell(outcome: Outcome) -> None:
    """What a run ended with, on standard output."""
    loss = "" if outcome.validation_loss is None else f", validation loss {outcome.validation_loss:.4f}"
    spikes = ", ".join(f"{count} spikes above {ratio}" for ratio, count in outcome.spikes.items())
    done = "" if outcome.finished else f"stopped by {outcome.stopped_by}; the same command goes on: "
    click.echo(
        f"{done}{outcome.dir}: {outcome.step:,} steps, {outcome.tokens_seen:,} tokens{loss}, "
        f"{spikes}, {outcome.elapsed_s:.0f} s"
    )
    lost = "" if outcome.lost is None else f", {outcome.lost:,} lost"
    click.echo(
        f"served: {outcome.tokens_seen:,} targets, {outcome.epochs:.2f} epochs; {outcome.padding:,} padding{lost}"
    )
    if outcome.lengths:
        taken = ", ".join(f"{seqlen:,} from step {first:,}" for first, seqlen in outcome.lengths)
        click.echo(f"lengths taken: {taken}")
    if outcome.unlearnt:
        shown = ", ".join(f"{first:,} to {last:,}" for first, last in outcome.unlearnt)
        click.echo(f"not finite: batches {shown} (counted from 0) were served and are in no weights")


@main.command()
@CONFIG
@OVERRIDES
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the probes.  [default: RUN.DIR-tune]")
@click.option("--threshold", default=1.3, show_default=True, help="A perplexity so many times its best: fluctuation.")
@click.option("--multiples", default=3, show_default=True, help="Length of a probe in LR warmups.")
@click.option("--validations", default=24, show_default=True, help="In a probe.")
@click.option("--most-share", default=0.1, show_default=True, help="Refuse to cost more than this share of the run.")
@click.option("--force", is_flag=True, help="Start over: delete the probes that are there.")
@JSON
def tune(
    config: Path,
    overrides: tuple[str, ...],
    out: Path | None,
    threshold: float,
    multiples: int,
    validations: int,
    most_share: float,
    force: bool,
    as_json: bool,
) -> None:
    """Find the start length and the duration of CONFIG.toml's ramp by short probes, as the SLW paper does.

    The start length is raised until validation is calm at the very start, then the longest ramp that stays calm is
    searched by halves. Says what it costs first; the same command goes on where a stopped or killed one left off.

    \b
    slw-train tune run.toml
    slw-train tune run.toml optimizer.lr=2e-3 --out tuned && slw-train run tuned/chosen.toml
    """
    from train.config_file import load_config

    given = load_config(config, overrides)
    _loading()
    from train.probe import Stopped
    from train.signals import STOPPED, StoppedEarly
    from train.tune import Settings
    from train.tune import tune as search
    from train.tuned import CHOSEN_NAME, PICTURE_NAME, draw, failure, render

    folder = out or given.run.dir.with_name(f"{given.run.dir.name}-tune")
    settings = Settings(threshold=threshold, multiples=multiples, validations=validations, most_share=most_share)
    try:
        tuned = search(given, folder, settings, force=force, warn=_warn)
    except (Stopped, StoppedEarly):
        _warn(f"stopped; the same command goes on: {folder}")
        sys.exit(STOPPED)
    draw(tuned, folder / PICTURE_NAME)
    if tuned.toml:
        (folder / CHOSEN_NAME).write_text(tuned.toml, encoding="utf-8")
    if as_json:
        echo_json({**tuned.to_json(), "picture": str(folder / PICTURE_NAME)})
    else:
        click.echo(render(tuned))
        click.echo(f"\npicture: {folder / PICTURE_NAME}")
    if not tuned.toml:
        raise failure(tuned)


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The picture: .png, .svg or .pdf.")
@click.option("--html", type=click.Path(path_type=Path), help="Tables and picture as a page that needs nothing else.")
@click.option("--table", type=click.Path(path_type=Path), help="The tables as Markdown.")
@click.option("--target", type=float, help="Validation loss to reach; else the worst run's last.")
@click.option("--each", is_flag=True, help="Do not put runs together that differ in their seed alone.")
@JSON
def compare(
    runs: tuple[Path, ...],
    out: Path | None,
    html: Path | None,
    table: Path | None,
    target: float | None,
    each: bool,
    as_json: bool,
) -> None:
    """Put runs side by side, finished or not: losses, tokens and time to a target, stability, curves.

    Runs that differ in their seed alone are one arm: mean and interval. The first arm is what the others are
    measured against.

    \b
    slw-train compare runs/constant runs/slw --out compare.png
    slw-train compare runs/constant-* runs/slw-* --target 4.9 --html compare.html
    """
    from train import compare as comparing
    from train import compare_tables as tables

    found = comparing.compare(runs, target=target, each=each)
    if out:
        from train.panels import draw

        draw(found, out)
    if html:
        from train.page import write_page

        write_page(found, html)
    if table:
        table.write_text(tables.as_markdown(found), encoding="utf-8")
    written = {"picture": out, "page": html, "table": table}
    if as_json:
        echo_json({**found.to_json(), **{name: str(path) if path else None for name, path in written.items()}})
    else:
        parts = [tables.as_text(part) for part in (tables.losses(found), tables.stability(found))]
        click.echo("\n\n".join([*parts, "\n".join(tables.notes(found))]))
        for name, path in written.items():
            if path:
                click.echo(f"{name}: {path}")


for command in (plan, trace, sample, export, evaluate):
    main.add_command(command)

if __name__ == "__main__":
    main()
