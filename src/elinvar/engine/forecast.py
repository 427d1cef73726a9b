"""What a run of a model would take and could reach at most, from its configuration: no weight is read.

A step reads the weights that its tokens go through once, and of each sequence the keys and values
that its tokens see; it cannot take less time than that, nor than its products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from elinvar.base.config import BLOCK_SIZE, EngineConfig, KVSpec, ModelConfig
from elinvar.engine.plan_kv import KVPlan, blocks_needed, plan_kv
from elinvar.models.registry import find_family, read_config
from elinvar.nn.attention import kv_specs
from elinvar.weights.checkpoint import Checkpoint, open_checkpoint
from elinvar.weights.described import config_alone, described_checkpoint, described_entries
from elinvar.weights.load import packed_entries
from elinvar.weights.packfile import Entry
from elinvar.weights.rules import as_published

GATHERED = ("embed", "own_embed")
"""Matrices of which a step reads a row a token, where they are not the head, too."""


@dataclass(frozen=True, slots=True)
class Described:
    """A model as its files describe it."""

    config: ModelConfig
    entries: list[Entry]
    exact: bool
    """Of a checkpoint; otherwise of config.json alone, without biases that only some have."""


def describe(path: Path, weight_format: str = "auto") -> Described:
    """Raises ModelError for what is no model, or one that cannot be run."""
    alone = config_alone(path)
    checkpoint = described_checkpoint(alone) if alone else open_checkpoint(path)
    try:
        return _describe(checkpoint, weight_format, exact=alone is None)
    finally:
        checkpoint.close()


def _describe(checkpoint: Checkpoint, weight_format: str, exact: bool) -> Described:
    family, config = find_family(checkpoint), read_config(checkpoint)
    rules = as_published(family.rules(config), checkpoint.tensors)
    if exact:
        kind = "f32" if weight_format == "f32" else "auto"
        return Described(config, packed_entries(checkpoint, rules, config, kind), True)
    entries = described_entries(checkpoint, rules, config.num_layers)
    if weight_format == "f32":
        entries = [Entry(e.name, e.kind if e.kind == "vector" else "f32", e.shape) for e in entries]
    return Described(config, entries, False)


@dataclass(frozen=True, slots=True)
class Reads:
    """What one decode step reads and computes, by its rows and their context."""

    config: ModelConfig
    specs: tuple[KVSpec, ...]
    always: int
    """Bytes of weights that every step reads."""
    experts: int
    """Bytes of all experts."""
    active: int
    """Numbers of weights that a token is multiplied by."""

    @classmethod
    def of(cls, model: Described, specs: tuple[KVSpec, ...], sizes: Sequence[int]) -> Reads:
        """sizes: bytes of each entry where it runs."""
        config, always, experts, active = model.config, 0, 0, 0.0
        for entry, size in zip(model.entries, sizes, strict=True):
            if entry.name in GATHERED and not (entry.name == "embed" and config.tied_head):
                continue
            numbers = math.prod(entry.shape) if len(entry.shape) == 2 else 0
            if ".experts." in entry.name:
                assert config.moe is not None
                experts += size
                active += numbers * config.moe.top_k / config.moe.num_experts
            else:
                always += size
                active += numbers
        return cls(config, specs, always, experts, round(active))

    def weight_bytes(self, rows: int) -> float:
        """Experts are chosen as by chance: of E a step of r rows reads E (1 - (1 - k / E)^r)."""
        moe = self.config.moe
        part = 1 - (1 - moe.top_k / moe.num_experts) ** rows if moe else 1
        return self.always + part * self.experts

    def kv_bytes(self, context: int) -> float:
        """Of one row: what its token's attention reads."""
        return sum(self._kv_bytes(i, spec, context) for i, spec in enumerate(self.specs))

    def _kv_bytes(self, group: int, spec: KVSpec, context: int) -> float:
        if spec.state is not None:
            return 2 * spec.block_bytes  # read and written
        seen = context if spec.window is None else min(context, spec.window)
        if self.config.index is not None and group == 0:
            seen = min(seen, self.config.index.top_k)
        return seen * spec.block_bytes / spec.block_size

    def flops(self, rows: int, context: int) -> float:
        """Products of weights, and of queries with keys and weights with values."""
        attended = sum(
            min(context, spec.window or context) * len(spec.layers)
            for spec in self.specs
            if spec.state is None
        )
        c = self.config
        return 2.0 * rows * (self.active + 2 * attended * c.num_heads * c.head_dim)


def workspace_bytes(
    config: ModelConfig, rows: int, logit_rows: int, context: int, size: int
) -> int:
    """Most that a forward holds at once beside weights and cache: the residual stream twice in f32,
    a norm of it, and the widest of attention, MLP and head. size: bytes of an activation.

    Attention of a long context leaves a sum of values in f32 for each split of 1,024 keys of the
    rows that decode."""
    c, heads = config, config.num_heads * config.head_dim
    stream = rows * c.dim * (2 * 4 + size)
    qkv = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    splits = -(-context // 1024)
    attention = rows * (qkv + 2 * heads) * size + logit_rows * splits * (heads + 2 * c.num_heads) * 4
    mlp = rows * 3 * c.ff_dim * size
    if c.moe is not None:
        a_token = c.moe.top_k * (c.dim + 3 * c.moe.ff_dim) + 3 * c.moe.shared_ff_dim
        mlp = max(mlp, rows * (a_token * size + c.moe.num_experts * 4))
    # Logits, and what sampling makes of them.
    head = 2 * logit_rows * c.vocab_size * 4
    return stream + max(attention, mlp, head)


def forecast_kv(
    config: ModelConfig, engine: EngineConfig, available: int
) -> tuple[tuple[KVSpec, ...], KVPlan]:
    """The cache as an engine on this memory would make it."""
    specs = kv_specs(config, engine.kv_dtype)
    plan = plan_kv(
        specs,
        config.max_context,
        available,
        kv_memory=engine.kv_memory,
        max_context=engine.max_context,
        max_rows=engine.max_rows,
        max_step_tokens=engine.max_step_tokens,
    )
    return specs, plan


def kv_tokens(specs: Sequence[KVSpec], plan: KVPlan) -> int:
    """Tokens of which the layers that keep every key hold all; where there are none, of sequences of
    full length."""
    for spec, blocks in zip(specs, plan.num_blocks, strict=True):
        if spec.window is None and spec.state is None:
            return blocks * BLOCK_SIZE
    return plan.max_context * sequences(specs, plan, 1)


def sequences(specs: Sequence[KVSpec], plan: KVPlan, max_step_tokens: int) -> int:
    """How many of full length there may be at once."""
    return min(
        blocks // blocks_needed(spec, plan.max_context, max_step_tokens)
        for spec, blocks in zip(specs, plan.num_blocks, strict=True)
    )
