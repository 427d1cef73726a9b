"""TierStats: what a tier did, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class TierStats:
    """Of one tier since the start, for the metrics."""

    name: str
    hits: int
    misses: int
    bytes_in: int
    bytes_out: int
    bytes_held: int
    errors: int
    damaged: int
    lost: int
    """Contents that were gone from host memory before this tier had them; for host memory, those it
    had no room for."""
