"""Seeds: drawn at the door where the user gave none, derived where a request has many answers."""

from __future__ import annotations

import os

_MASK = 2**64 - 1


def draw_seed() -> int:
    """A fresh seed. 53 bits, so that it survives JSON readers that know only doubles."""
    return int.from_bytes(os.urandom(7)) >> 3


def choice_seed(seed: int, index: int) -> int:
    """Seed of answer `index` of a request with n > 1. Answer 0 keeps the seed, so n = 1 and the
    first of many are the same; the others are splitmix64 (Steele, Lea and Flood, 2014)."""
    if index == 0:
        return seed
    z = (seed + index * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) >> 11
