"""What commands share: errors without a traceback, JSON on standard output, common arguments."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.amount import amount
from pipeline.errors import SlwError

if TYPE_CHECKING:
    from pipeline.format import Manifest


class Place(click.ParamType):  # type: ignore[type-arg]
    """A folder, or a URL such as s3://bucket/books."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """A Path, or what is used as one for a URL."""
        from pipeline.place import place

        return place(value)


STORE = click.argument("store", type=Place())
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
RESUMED = ("build", "run", "tune")
"""Commands that a rerun goes on with."""
FORCE = click.option("--force", is_flag=True, help="Replace what is there.")
SPLIT = click.option("--split", type=click.Choice(["train", "validation"]), default="train", show_default=True)


class Option(click.Option):
    """An option that stands under a heading in its command's help."""

    def __init__(self, *names: Any, section: str = "Options", **more: Any) -> None:
        super().__init__(*names, **more)
        self.section = section


class Command(click.Command):
    """A click command whose help groups its options by their headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, those without a heading last."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)):
                sections.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        rest = sections.pop("Options", [])
        for heading, rows in [*sections.items(), ("Options", rest)]:
            with formatter.section(heading):
                formatter.write_dl(rows)


class Group(click.Group):
    """A click group in which a user's mistake ends in a message and an exit status: 1 for data, 2 for the command."""

    command_class = Command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; SlwError becomes "error: ..." on standard error."""
        import logging

        for library in ("gcsfs", "fsspec"):  # they print tracebacks of what an error of ours says then
            logging.getLogger(library).addHandler(logging.NullHandler())
        try:
            with _ctrl_c():
                return super().invoke(ctx)
        except SlwError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except MemoryError as error:
            click.echo(f"error: not enough memory: {error}", err=True)
            sys.exit(1)
        except BrokenPipeError:
            raise  # click knows what to do
        except OSError as error:  # no permission, no room: not a bug of ours, and nothing is half-written
            click.echo(f"error: {error}", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            kept = ctx.invoked_subcommand in RESUMED
            then = "goes on where it stopped" if kept else "begins again, nothing is half-written"
            click.echo(f"\nstopped; the same command {then}", err=True)
            sys.exit(130)


@contextmanager
def _ctrl_c() -> Iterator[None]:
    """Whatever follows from a Ctrl-C is KeyboardInterrupt: numba, compiling, swallows that, prints it, then fails."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    pressed, hook = [], sys.unraisablehook

    def press(number: int, frame: Any) -> None:
        pressed.append(number)
        sys.unraisablehook = lambda _: None
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, press)
    try:
        yield
    except Exception as error:
        if pressed:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = hook


def tell_compiling() -> None:
    """In a command that uses kernels: the first of its ranks says so where they have to be compiled."""
    from pipeline.numba_cache import compiling_told

    if os.environ.get("RANK", "0") == "0":
        told = compiling_told(lambda text: click.echo(text, err=True))
        click.get_current_context().with_resource(told)


def echo_json(value: Any) -> None:
    """One JSON object on standard output."""
    import json

    click.echo(json.dumps(value))


def contents(manifest: Manifest) -> str:
    """What a store has to train on, and what it holds out."""
    train, held_out = (
        f"{amount(manifest.documents(split), 'document')}, {amount(manifest.tokens(split), 'token')}"
        for split in ("train", "validation")
    )
    return f"{train} to train on; {held_out if manifest.documents('validation') else 'nothing'} held out"


def note_ordinary_eod(tokenizer: Path, eod: str | None) -> None:
    """Say so on standard error where `--eod` names a token that text is made of too. Raises TokenizerError."""
    from pipeline.vocabulary import is_special, load_vocabulary

    if eod is None:
        return
    vocabulary = load_vocabulary(tokenizer, eod=eod)
    if not is_special(vocabulary, vocabulary.eod_id):
        click.echo(
            f"note: --eod {eod!r} is no special token of the tokenizer: text may hold it too, "
            "and a model cannot tell the two apart",
            err=True,
        )


class Bytes(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes such as 64M."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse 1000, 64K, 64M or 2G (powers of 1024)."""
        if isinstance(value, int):
            return value
        text = str(value).strip().upper().removesuffix("B")
        factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        try:
            return int(text.rstrip("KMG")) * factor
        except ValueError:
            self.fail(f"{value!r} is not a number of bytes such as 64M", param, ctx)
