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
U32 = NDArray[np.uint32]


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
class Penalties:
    """For tokens that were there before, of each of the L rows; a row without history has none."""

    starts: I32
    """[L + 1] where each row's history begins in token_ids, and the end."""
    token_ids: I32
    """What comes before the sampled token: prompt and answer."""
    prompt_lens: I32
    """[L] how many of them are the prompt's."""
    repetition: F32
    """[L], above 0. Of each token of the history: a positive logit is divided by it, another is
    multiplied (Keskar et al., 2019)."""
    presence: F32
    """[L] Of each token of the answer, taken from its logit."""
    frequency: F32
    """[L] The same, as often as the token is in the answer: (logit - frequency * count) - presence."""

    @property
    def arrays(self) -> tuple[I32, I32, I32, F32, F32, F32]:
        counted = self.starts, self.token_ids, self.prompt_lens
        return *counted, self.repetition, self.presence, self.frequency


@dataclass(slots=True, eq=False)
class Biases:
    """What is added to logits of single tokens."""

    starts: I32
    """[L + 1] where each row's begin in the two that follow, and the end."""
    ids: I32
    """May come twice; those beyond the vocabulary change nothing."""
    values: F32
    """-inf forbids the token."""

    @property
    def arrays(self) -> tuple[I32, I32, F32]:
        return self.starts, self.ids, self.values


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
    num_logprobs: int | None
    """Top log-probs to return for every row; None: not even that of the sampled token."""
    typical_p: F32 | None = None
    """Below 1: on. None: off for all."""
    penalties: Penalties | None = None
    biases: Biases | None = None
    masks: U32 | None = None
    """[M, ceil(V / 32)] Token i may be sampled where bit i % 32 of word i // 32 is set; as llguidance
    and xgrammar fill them (their int32, viewed)."""
    mask_rows: I32 | None = None
    """[M] which of the L rows each belongs to; with several, all must allow a token."""

    def add_masks(self, masks: U32, rows: I32) -> None:
        """More of them."""
        if self.masks is not None and self.mask_rows is not None:
            masks = np.concatenate([self.masks, masks])
            rows = np.concatenate([self.mask_rows, rows])
        self.masks, self.mask_rows = masks, rows


@dataclass(slots=True, eq=False)
class SampleResult:
    ids: I32
    """[L]"""
    logprobs: F32
    """[L] of the sampled token, softmax of the raw logits; [0] where none were asked for."""
    top_ids: I32
    """[L, num_logprobs] likeliest first, equal ones by id."""
    top_logprobs: F32
