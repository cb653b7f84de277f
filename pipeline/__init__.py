"""Text to tokens to shards: the offline half, behind `slw-prep`. Knows no schedule."""

from pipeline.numba_cache import drop_stale

drop_stale()
