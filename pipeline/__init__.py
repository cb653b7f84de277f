"""Text to tokens to shards: the offline half, behind `slw-prep`. Knows no schedule."""

from pipeline.kernels import drop_stale

drop_stale()
