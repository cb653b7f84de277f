"""Every error a user can cause, as one small tree; a traceback is for our bugs only.

SlwError
├── ConfigError    a setting, an option or a combination of them is wrong
├── CorpusError    the input text is missing, unreadable or not in the expected form
├── TokenizerError not a usable tokenizer.json, or not the one the store was built with
├── StoreError     a store is missing, damaged, locked or of another kind than expected
└── RunError       a training run cannot start or go on (run directory in use, checkpoint damaged, loss not finite)
"""

from __future__ import annotations


class SlwError(Exception):
    """A mistake in what the user gave us: says what is wrong, where, what was found, what is allowed, what to do.

    `exit_code` is the status a console script ends with: 2 where the command or its configuration is wrong,
    1 where it was right but the data, a store or a run failed.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: object | None = None,
        found: object | None = None,
        allowed: object | None = None,
        remedy: str | None = None,
    ) -> None:
        self.details = {"where": where, "found": found, "allowed": allowed, "remedy": remedy}
        lines = [what]
        named = (("where", where), ("found", found), ("allowed", allowed), ("to do", remedy))
        lines += [f"  {name + ':':<9}{value}" for name, value in named if value is not None]
        super().__init__("\n".join(lines))
        self.what = what

    def within(self, where: object) -> SlwError:
        """The same error, with `where` if it has none."""
        details = {**self.details, "where": self.details["where"] or where}
        return type(self)(self.what, **details)  # type: ignore[arg-type]


class ConfigError(SlwError):
    """A setting, an option or a combination of them is wrong."""

    exit_code = 2


class CorpusError(SlwError):
    """The input text is missing, unreadable or not in the expected form."""


class TokenizerError(SlwError):
    """Not a usable tokenizer.json, or not the one the store was built with."""


class StoreError(SlwError):
    """A store is missing, damaged, locked or of another kind than expected."""


class RunError(SlwError):
    """A training run cannot start or go on."""
