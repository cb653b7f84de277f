"""Arguments of the commands that a message tells the user to run."""

from __future__ import annotations

from pathlib import Path
from shlex import quote


def pasted(argument: str | Path) -> str:
    """What a command to paste into a shell has as one argument: quoted, and no option where it begins with a dash."""
    text = str(argument)
    return quote(f"./{text}" if text.startswith("-") else text)
