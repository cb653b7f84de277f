"""What both console scripts share: errors without a traceback, JSON on standard output."""

from __future__ import annotations

import sys
from typing import Any

import click

from pipeline.errors import SlwError


class Group(click.Group):
    """A click group in which a user's mistake ends in a message and an exit status: 1 for data, 2 for the command."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; SlwError becomes "error: ..." on standard error."""
        try:
            return super().invoke(ctx)
        except SlwError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except BrokenPipeError:
            raise  # click knows what to do
        except OSError as error:  # no permission, no room: not a bug of ours, and nothing is half-written
            click.echo(f"error: {error}", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("\nstopped; the same command goes on where it stopped", err=True)
            sys.exit(130)


def echo_json(value: Any) -> None:
    """One JSON object on standard output."""
    import json

    click.echo(json.dumps(value))
