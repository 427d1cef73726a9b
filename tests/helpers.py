"""Drives a model by hand, without scheduler or engine: spans of sequences to a ForwardBatch.

Block ids are handed out in an order of no meaning, so that nothing passes by luck of neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elinvar.base.batch import DecodeBatch, ForwardBatch
from elinvar.base.config import BLOCK_SIZE, KVDtype
from elinvar.models.family import Model
from elinvar.ops import LayerCache, Ops

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Span:
    """Tokens start .. stop of a sequence are computed; its blocks are `blocks` (in every group)."""

    ids: Sequence[int]
    start: int
    stop: int
    blocks: Sequence[int]


def make_cache(model: Model, ops: Ops, num_blocks: int, kv_dtype: KVDtype) -> list[LayerCache]:
    """One cache a layer, `num_blocks` blocks in every group."""
    layers: dict[int, LayerCache] = {}
    for spec in model.kv_specs(kv_dtype):
        layers |= zip(spec.layers, ops.kv_layers(spec, num_blocks), strict=True)
    return [layers[i] for i in range(len(layers))]


def make_batch(spans: Sequence[Span], num_groups: int) -> ForwardBatch:
    """A flat batch of the spans that asks for the logits of every token."""
    num_blocks = max(len(s.blocks) for s in spans)
    tables = np.full((len(spans), num_blocks), -1, np.int32)
    for row, s in zip(tables, spans, strict=True):
        row[: len(s.blocks)] = s.blocks
    positions = np.concatenate([np.arange(s.start, s.stop, dtype=np.int32) for s in spans])
    slots = [
        s.blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
        for s in spans
        for p in range(s.start, s.stop)
    ]
    return ForwardBatch(
        input_ids=np.concatenate([np.array(s.ids[s.start : s.stop], np.int32) for s in spans]),
        positions=positions,
        query_start_loc=np.cumsum([0] + [s.stop - s.start for s in spans], dtype=np.int32),
        seq_lens=np.array([s.stop for s in spans], np.int32),
        block_tables=(tables,) * num_groups,
        slot_mapping=(np.array(slots, np.int32),) * num_groups,
        logit_rows=np.arange(len(positions), dtype=np.int32),
    )


def decode_batch(spans: Sequence[Span], num_groups: int) -> DecodeBatch:
    """The same for spans of one token."""
    flat = make_batch(spans, num_groups)
    numbers = [flat.input_ids, flat.positions, flat.seq_lens, *flat.slot_mapping]
    return DecodeBatch(np.array(numbers, np.int32), flat.block_tables)


def run_sequences(
    model: Model,
    ops: Ops,
    sequences: Sequence[Sequence[int]],
    chunk: int,
    kv_dtype: KVDtype = "f32",
) -> list[F32]:
    """Logits [tokens, V] of every position of every sequence, all in one continuous batch, each
    sequence advancing `chunk` tokens a step."""
    num_groups = len(model.kv_specs(kv_dtype))
    need = [-(-len(ids) // BLOCK_SIZE) for ids in sequences]
    order = np.random.default_rng(0).permutation(sum(need)).tolist()
    blocks = [[order.pop() for _ in range(n)] for n in need]
    kv = make_cache(model, ops, sum(need), kv_dtype)
    parts: list[list[F32]] = [[] for _ in sequences]
    for start in range(0, max(map(len, sequences)), chunk):
        live = [i for i, ids in enumerate(sequences) if start < len(ids)]
        spans = [
            Span(sequences[i], start, min(start + chunk, len(sequences[i])), blocks[i])
            for i in live
        ]
        batch = make_batch(spans, num_groups)
        logits = model.forward(batch, kv)
        for i, piece in zip(live, np.split(logits, batch.query_start_loc[1:-1]), strict=True):
            parts[i].append(piece)
    return [np.concatenate(p) for p in parts]


def iterate_tokens(
    model: Model, ops: Ops, ids: Sequence[int], chunk: int, kv_dtype: KVDtype = "f32"
) -> Iterator[tuple[int, F32]]:
    """One sequence alone, `chunk` tokens a step: (first position, logits [chunk, V]) a step."""
    num_groups = len(model.kv_specs(kv_dtype))
    num_blocks = -(-len(ids) // BLOCK_SIZE)
    blocks = np.random.default_rng(1).permutation(num_blocks).tolist()
    kv = make_cache(model, ops, num_blocks, kv_dtype)
    for start in range(0, len(ids), chunk):
        span = Span(ids, start, min(start + chunk, len(ids)), blocks)
        yield start, model.forward(make_batch([span], num_groups), kv)


def run_tokens(
    model: Model, ops: Ops, ids: Sequence[int], chunk: int | None = None, kv_dtype: KVDtype = "f32"
) -> F32:
    """Logits [tokens, V] of one sequence alone, `chunk` tokens a step (None: all in one)."""
    steps = iterate_tokens(model, ops, ids, chunk or len(ids), kv_dtype)
    return np.concatenate([logits for _, logits in steps])


def greedy(
    model: Model,
    ops: Ops,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    kv_dtype: KVDtype = "f32",
) -> list[list[int]]:
    """The most likely continuation of each prompt, the prompts in one batch."""
    num_groups = len(model.kv_specs(kv_dtype))
    sequences = [list(p) for p in prompts]
    starts = [0] * len(sequences)
    need = max(-(-(len(p) + num_tokens) // BLOCK_SIZE) for p in prompts)
    blocks = [range(i * need, (i + 1) * need) for i in range(len(prompts))]
    kv = make_cache(model, ops, need * len(prompts), kv_dtype)
    for _ in range(num_tokens):
        spans = [
            Span(ids, start, len(ids), held)
            for ids, start, held in zip(sequences, starts, blocks, strict=True)
        ]
        batch = make_batch(spans, num_groups)
        starts = [len(ids) for ids in sequences]
        logits = model.forward(batch, kv)
        for ids, last in zip(sequences, batch.query_start_loc[1:] - 1, strict=True):
            ids.append(int(logits[last].argmax()))
    return [ids[len(p) :] for ids, p in zip(sequences, prompts, strict=True)]


def log_softmax(logits: F32) -> F32:
    """[..., V]; the sum is in float64, the rest in float32 (a vocabulary can be large)."""
    z = logits - logits.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)


def assert_parity(ours: F32, theirs: F32, tolerance: float = 1e-4) -> float:
    """Checks |a - b| <= tolerance * max(1, |b|) for all log-probs; returns the largest ratio."""
    a, b = log_softmax(ours), log_softmax(theirs)
    worst = float((np.abs(a - b) / np.maximum(1.0, np.abs(b))).max())
    assert worst <= tolerance, f"log-probs differ by {worst:.2e} relative, {tolerance:g} allowed"
    return worst
