"""Batches to weights and metrics: the torch trainer behind `slw-train`."""
