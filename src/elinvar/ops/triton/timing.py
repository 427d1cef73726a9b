"""Time of kernels on a device: of many calls recorded in one graph, so that Python's is none of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch

CACHE_BYTES = 256 << 20
"""More than any chip's last cache holds: what is to come from memory is spread over so much."""
_LEAST_S = 2e-3
"""A graph that takes less is replayed more often."""


def seconds(calls: Sequence[Callable[[], object]], repeats: int = 5) -> float:
    """Of one call: the median over `repeats` runs through all of `calls`, which should work on other
    copies of what they read where it is to come from memory. Whoever cannot be recorded raises."""
    for call in (calls[0], calls[-1]):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    once = _run(graph, 1)
    turns = max(1, round(_LEAST_S / once))
    return median(_run(graph, turns) / turns for _ in range(repeats)) / len(calls)


def _run(graph: torch.cuda.CUDAGraph, turns: int) -> float:
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    for _ in range(turns):
        graph.replay()
    ended.record()
    ended.synchronize()
    return float(begun.elapsed_time(ended)) / 1e3


def copies(num_bytes: int, most: int = 32) -> int:
    """How many copies of an array of so many bytes no cache holds."""
    return max(1, min(most, -(-CACHE_BYTES // max(1, num_bytes))))
