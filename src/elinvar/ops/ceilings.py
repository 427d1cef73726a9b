"""What this machine reaches at most: the roof that a roofline is drawn under."""

from __future__ import annotations

from dataclasses import dataclass

from elinvar import _cpu


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Bytes a second and operations a second (a multiply-add is two) over all threads. 0: this
    instruction set has no such instruction."""

    cache_bytes: int
    """Of the last cache: what a step reads beyond that comes from memory."""
    read: float
    """From memory."""
    read_cached: float
    """From the last cache."""
    fma: float
    """f32."""
    maddubs: float
    """8 bit times 8 bit, pairs added up in 16 bits."""
    dot: float
    """8 bit times 8 bit, fours added up in 32 bits (vpdpbusd, sdot)."""


def measure_ceilings(num_threads: int, simd: str) -> Ceilings:
    """Runs C++ loops that do nothing else, for about a second."""
    return Ceilings(**_cpu.ceilings(num_threads, simd))
