"""The length raised one notch when full-length validation has stopped fluctuating: the SLW paper's tuning, automated.

The paper (arXiv 2108.06084, section 4) picks its lengths by looking for significant fluctuations of the validation
perplexity: above 1.3 times the best so far. Here a validation is calm when

    perplexity <= tolerance * best perplexity so far          in nats: loss <= best + ln(tolerance)

and after `patience` calm ones in a row at a length the next step is one notch longer, up to `seqlen_end`. One that is
not calm starts the count anew. The state is two numbers, kept in checkpoints; the lengths that were taken are in the
loader's state as changes of the schedule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from curriculum.pacing import require_multiples, require_positive
from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Notches:
    """When the length rises, and by how much."""

    seqlen_start: int
    seqlen_end: int
    seqlen_multiple: int = 8
    """One notch."""
    tolerance: float = 1.3
    """A validation is calm up to this factor of the best perplexity so far."""
    patience: int = 3
    """Calm validations in a row for a notch."""

    def __post_init__(self) -> None:
        require_multiples(self.seqlen_start, self.seqlen_end, self.seqlen_multiple)
        require_positive(patience=self.patience)
        if self.seqlen_start > self.seqlen_end:
            raise ConfigError("seqlen_start is above seqlen_end", found=f"{self.seqlen_start} > {self.seqlen_end}")
        if self.tolerance < 1:
            raise ConfigError(
                "tolerance is a factor of the best perplexity", found=self.tolerance, allowed="1 or more"
            )

    @property
    def fewest_validations(self) -> int:
        """How many it takes to the full length, calm as they may be."""
        return (self.seqlen_end - self.seqlen_start) // self.seqlen_multiple * self.patience


@dataclass
class Calm:
    """What validations have shown so far; state of a run."""

    best: float = math.inf
    """Least validation loss, nats a token."""
    calm: int = 0
    """Calm validations in a row at this length."""

    def observe(self, loss: float, seqlen: int, notches: Notches) -> int:
        """The length from the next step on, after a full-length validation with `loss` at `seqlen`."""
        self.best = min(self.best, loss)
        self.calm = self.calm + 1 if loss <= self.best + math.log(notches.tolerance) else 0
        if self.calm < notches.patience or seqlen >= notches.seqlen_end:
            return seqlen
        self.calm = 0
        return seqlen + notches.seqlen_multiple
