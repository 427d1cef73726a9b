"""What ops take and return besides arrays, matrices and caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elinvar.ops.layout import Weight

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]


@dataclass(slots=True, eq=False)
class Experts:
    """The gated MLPs that the tokens of a layer are routed to, expert e at index e. All have one
    shape; their matrices may be of any kinds."""

    gates: Sequence[Weight]
    ups: Sequence[Weight]
    downs: Sequence[Weight]
    gate_bias: F32 | None = None
    """[E, N], as those that follow: row e belongs to expert e."""
    up_bias: F32 | None = None
    down_bias: F32 | None = None
    handle: Any = field(default=None, init=False, repr=False)
    """How a provider holds them, bound at their first use."""


@dataclass(frozen=True, slots=True, eq=False)
class LoraPair:
    """What one adapter (Hu et al., 2022) adds to one matrix w [N, K]: scale * b a."""

    a: Weight
    """[r, K]; float, as b is."""
    b: Weight
    """[N, r]"""
    scale: float


@dataclass(slots=True, eq=False)
class Lora:
    """What all adapters add to matrices that are multiplied side by side."""

    columns: Sequence[int]
    """Where the outputs of each matrix that any adapter changes begin."""
    pairs: Sequence[Sequence[LoraPair | None]]
    """For each of those: by the adapter's number."""
    handle: Any = field(default=None, init=False, repr=False)
    """How a provider holds it, bound at its first use."""


@dataclass(slots=True, eq=False)
class SampleArgs:
    """Per logit row. Noise is Philox4x32-10 (Salmon et al., 2011) of (seed, position, token id)."""

    seeds: NDArray[np.uint64]
    positions: I32
    """Index in the sequence that the sampled token will have."""
    temperature: F32
    """0: greedy (the lowest id among equals)."""
    top_k: I32
    """0: off."""
    top_p: F32
    min_p: F32
    num_logprobs: int
    """Top log-probs to return for every row; 0 for none."""


@dataclass(slots=True, eq=False)
class SampleResult:
    ids: I32
    """[L]"""
    logprobs: F32
    """[L] of the sampled token, softmax of the raw logits."""
    top_ids: I32
    """[L, num_logprobs] likeliest first, equal ones by id."""
    top_logprobs: F32
