"""Text to tokens to shards: the offline half, behind `slw-prep`. Knows no schedule."""
