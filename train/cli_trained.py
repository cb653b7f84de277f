"""The commands of `slw-train` for a model that is trained: sample, export, eval."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from pipeline.command import FORCE, JSON, echo_json

RUN = click.argument("run", type=click.Path(path_type=Path))


@click.command()
@RUN
@click.option("--prompt", default="", help="Text to go on from.")
@click.option("--tokens", default=100, show_default=True, help="Most tokens to add.")
@click.option("--temperature", default=0.8, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-k", default=50, show_default=True, help="Choose among so many tokens; 0: all.")
@click.option("--seed", default=1, show_default=True)
@JSON
def sample(run: Path, prompt: str, tokens: int, temperature: float, top_k: int, seed: int, as_json: bool) -> None:
    """Let a trained run write.

    \b
    slw-train sample runs/slw --prompt "def read(" --tokens 80
    """
    from train.sample import sample as write

    text = write(run, prompt, tokens=tokens, temperature=temperature, top_k=top_k, seed=seed)
    if as_json:
        echo_json({"run": str(run), "prompt": prompt, "text": text})
    else:
        click.echo(text)


@click.command()
@RUN
@click.option("--hf", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option("--checkpoint", "step", type=int, help="After so many updates; default: the newest.")
@FORCE
@JSON
def export(run: Path, hf: Path, step: int | None, force: bool, as_json: bool) -> None:
    """Write a run as a Hugging Face folder: GPT2LMHeadModel.from_pretrained(DIR) gives the same logits.

    \b
    slw-train export runs/slw --hf exported/slw
    """
    from train.export import export_hf

    written = export_hf(run, hf, step=step, force=force)
    if as_json:
        echo_json(written)
    else:
        click.echo(
            f"{hf}: step {written['step']:,} of {run}, {written['parameters']:,} parameters, "
            f"{written['vocab_size']:,} tokens, {written['positions']:,} positions"
        )


@click.command(name="eval")
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option("--hf", type=click.Path(path_type=Path), help="A Hugging Face folder instead of a run.")
@click.option("--wikitext", type=click.Path(path_type=Path), help="WikiText as raw text, for example wiki.test.raw.")
@click.option("--lambada", type=click.Path(path_type=Path), help='LAMBADA as JSON lines of {"text": ...}.')
@click.option("--stride", type=int, help="Tokens from one window of WikiText to the next; default: 32.")
@click.option("--context", type=int, help="Tokens of a window; default: the model's own.")
@click.option("--bos", is_flag=True, help="Begin LAMBADA's passages with the beginning-of-document token.")
@click.option("--checkpoint", "step", type=int, help="After so many updates; default: the newest.")
@JSON
def evaluate(
    run: Path | None,
    hf: Path | None,
    wikitext: Path | None,
    lambada: Path | None,
    stride: int | None,
    context: int | None,
    bos: bool,
    step: int | None,
    as_json: bool,
) -> None:
    """Zero-shot WikiText perplexity and LAMBADA accuracy of a run, or of a GPT-2 in a Hugging Face folder.

    In float32, on a GPU where there is one. A stride as long as the context is up to context / 32 times as quick, and
    gives a higher perplexity.

    \b
    slw-train eval runs/slw --wikitext wiki.test.raw --lambada lambada_test.jsonl
    slw-train eval --hf exported/slw --lambada lambada_test.jsonl --json
    """
    if (run is None) == (hf is None):
        raise click.UsageError("give RUN, or --hf DIR")
    if wikitext is None and lambada is None:
        raise click.UsageError("give --wikitext FILE, --lambada FILE, or both")
    if hf and step is not None:
        raise click.UsageError("--checkpoint is of a run, not of --hf")
    from train import evaluate as measures
    from train.trained import load_hf, load_run

    trained = load_run(run, step) if run else load_hf(hf or Path())
    text = measures.wikitext(trained, wikitext, stride=stride, context=context) if wikitext else None
    passages = measures.lambada(trained, lambada, bos=bos) if lambada else None
    if as_json:
        found = {"wikitext": text, "lambada": passages}
        results = {name: dataclasses.asdict(one) for name, one in found.items() if one}
        echo_json({"model": str(run or hf), "step": trained.step, **results})
        return
    if text:
        click.echo(
            f"wikitext: perplexity {text.word_perplexity:,.2f} a word ({text.words:,} words), "
            f"{text.token_perplexity:,.2f} a token ({text.tokens:,} tokens); "
            f"context {text.context:,}, stride {text.stride:,}"
        )
    if passages:
        click.echo(
            f"lambada:  accuracy {100 * passages.accuracy:.2f} % of {passages.passages:,} last words, "
            f"perplexity {passages.perplexity:,.2f} a last word"
            + (f"; {passages.cut:,} passages cut to the context" if passages.cut else "")
        )
