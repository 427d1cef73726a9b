"""What a run of a model would take and could reach at most, from its configuration: no weight is read.

A step reads the weights that its tokens go through once, and of each sequence the keys and values
that its tokens see; it cannot take less time than that, nor than its products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from elinvar.base.config import BLOCK_SIZE, EngineConfig, KVSpec, ModelConfig
from elinvar.base.errors import InputError
from elinvar.engine.described import Described
from elinvar.engine.devices import Chip
from elinvar.engine.plan_kv import KVPlan, blocks_needed, plan_kv
from elinvar.nn.attention import kv_specs
from elinvar.ops.triton.sizes import arriving_bytes, matrix_bytes
from elinvar.weights.packfile import Entry

GATHERED = ("embed", "own_embed")
"""Matrices of which a step reads a row a token, where they are not the head, too."""
CONTEXT_BYTES = 500 << 20
"""Of a GPU: its driver's context, which is there before anything is asked for."""
RESERVE_BYTES = 256 << 20
"""Code of kernels, and what an allocator loses between pieces of several sizes."""
STATE_BYTES = 256 << 20
"""As ops.triton.attention bounds them."""
NODE_BYTES = 16 << 10
"""Of a recorded graph, a kernel."""
NODES = 14
"""Kernels of a layer."""


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
    """Most that a forward holds at once beside weights and cache: rotary tables (which grow by doubling),
    the residual stream, what is added to it, their sum and its norm, and the widest of attention, MLP
    and head. size: bytes of what enters a product; what leaves one is f32.

    Attention of a long context leaves a sum of values in f32 for each split of 1,024 keys of a row, as
    long as all of them take no more than STATE_BYTES; an index, scores of some rows at a time, and what
    it chose."""
    c, heads = config, config.num_heads * config.head_dim
    tables = sum(2 * context * rope.dim * 4 for rope in c.rope.values())
    stream = rows * c.dim * (3 * 4 + size)
    qkv = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    states = rows * -(-context // 1024) * (heads + 2 * c.num_heads) * 4
    attention = rows * (qkv * 4 + 2 * heads * size) + min(states, STATE_BYTES)
    if c.index is not None and context > c.index.top_k:
        attention += min(4 * rows * context, 256 << 20) + 8 * rows * c.index.top_k
    mlp = rows * c.ff_dim * (8 + size)  # where gate and up are no one matrix
    if c.moe is not None:
        a_token = c.moe.top_k * (c.dim + c.moe.ff_dim) + c.moe.shared_ff_dim
        mlp = max(mlp, rows * (a_token * size + 4 * (c.moe.num_experts + 2 * c.moe.top_k)))
    # Logits, and what sampling makes of them.
    head = 2 * logit_rows * c.vocab_size * 4
    return tables + stream + max(attention, mlp, head)


def graph_bytes(config: ModelConfig, max_rows: int) -> int:
    """Of the recorded steps of a GPU: by their sizes, which are rounded up."""
    recorded = math.ceil(math.log2(max_rows)) + 1
    return recorded * (config.num_layers * NODES + 8) * NODE_BYTES


def device_room(model: ModelConfig, config: EngineConfig, free: int) -> int:
    """What the cache may have of a device's free memory, that of weights subtracted; 0 or less: it does
    not fit."""
    rows = max(config.max_rows, config.max_step_tokens)
    longest = min(config.max_context or model.max_context, model.max_context)
    work = workspace_bytes(model, rows, config.max_rows, longest, 2)
    return free - work - graph_bytes(model, config.max_rows) - RESERVE_BYTES


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


class Run:
    """A model on a chip, run as `config` says; chip.name `cpu` is this machine.

    Raises InputError where it does not fit.
    """

    def __init__(self, model: Described, config: EngineConfig, chip: Chip) -> None:
        c, on_cpu = model.config, chip.name == "cpu"
        self.model, self.chip = model, chip
        sizes = [_bytes_of(entry, on_cpu) for entry in model.entries]
        self.weights = sum(sizes)
        longest = min(config.max_context or c.max_context, c.max_context)
        rows, size = max(config.max_rows, config.max_step_tokens), 4 if on_cpu else 2
        self.workspace = workspace_bytes(c, rows, config.max_rows, longest, size)
        self.graphs = self.runtime = self.arriving = 0
        kv_memory, room = config.kv_memory, chip.memory
        if not on_cpu:
            self.graphs = graph_bytes(c, config.max_rows)
            self.arriving = arriving_bytes((e.name, e.kind, e.shape) for e in model.entries)
            self.runtime = CONTEXT_BYTES + RESERVE_BYTES
            there = CONTEXT_BYTES + self.weights + self.arriving
            room = device_room(c, config, chip.memory - there)
            if room <= 0 or (kv_memory or 0) > room:
                raise InputError(
                    "device",
                    f"{(chip.memory - room) / 1e9:.1f} GB and a KV cache do not fit into the "
                    f"{chip.memory / 1e9:.1f} GB of {chip.title}; take fewer rows, a smaller model, "
                    "format or kv_memory, or another device.",
                )
            kv_memory = kv_memory or room
        self.specs = kv_specs(c, config.kv_dtype)
        self.kv = plan_kv(
            self.specs,
            c.max_context,
            room,
            kv_memory=kv_memory,
            max_context=config.max_context,
            max_rows=config.max_rows,
            max_step_tokens=config.max_step_tokens,
        )
        self.at_once = sequences(self.specs, self.kv, config.max_step_tokens)
        self.reads = Reads.of(model, self.specs, sizes)

    def facts(self) -> dict[str, Any]:
        """As plain data; sizes in bytes."""
        parts = {
            "weights": self.weights,
            "kv": self.kv.num_bytes,
            "workspace": self.workspace,
            "graphs": self.graphs,
            "runtime": self.runtime,
            "arriving": self.arriving,
        }
        return {
            "family": self.model.config.family,
            "exact": self.model.exact,
            "device": asdict(self.chip),
            "bytes": {**parts, "total": sum(parts.values())},
            "kv": {
                "tokens": kv_tokens(self.specs, self.kv),
                "sequences": self.at_once,
                "max_context": self.kv.max_context,
                "groups": [
                    {"kind": spec.kind, "blocks": blocks, "block_bytes": spec.block_bytes}
                    for spec, blocks in zip(self.specs, self.kv.num_blocks, strict=True)
                ],
            },
        }

    def decode(self, rows: int, context: int) -> dict[str, Any]:
        """The least that a step of so many rows with this context takes."""
        weights, kv = self.reads.weight_bytes(rows), rows * self.reads.kv_bytes(context)
        reading = (weights + kv) / self.chip.bandwidth
        computing = self.reads.flops(rows, context) / self.chip.matmul
        step = max(reading, computing)
        return {
            "weight_bytes": round(weights),
            "kv_bytes": round(kv),
            "step_s": step,
            "tokens_per_s": rows / step,
            "bound": "memory" if reading >= computing else "compute",
        }

    def prefill(self, tokens: int) -> dict[str, Any]:
        """The same of a prompt, of which a token sees half on average."""
        reading = self.reads.weight_bytes(tokens) / self.chip.bandwidth
        step = max(reading, self.reads.flops(tokens, tokens // 2) / self.chip.matmul)
        return {"tokens": tokens, "step_s": step, "tokens_per_s": tokens / step}


def _bytes_of(entry: Entry, on_cpu: bool) -> int:
    if on_cpu:
        return entry.nbytes
    if entry.kind == "vector":
        return 4 * math.prod(entry.shape)
    return matrix_bytes(entry.kind, (entry.shape[0], entry.shape[1]))
