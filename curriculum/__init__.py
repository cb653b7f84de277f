"""Shards and a schedule to batches: the only place that knows about length over time. Knows no torch."""
