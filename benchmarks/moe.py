"""Whether a token of a mixture of experts costs what the experts it goes to weigh, and no more.

    .venv/bin/python benchmarks/moe.py
    .venv/bin/python benchmarks/moe.py --experts 64 --top 2,4,8 --kind q4 --threads 2

One model with random weights and routes, larger than any cache; only the number of experts a token
goes to changes. If nothing but the routed experts is read, time at batch 1 follows the active bytes:
the last two columns are equal.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np

from elinvar.base.batch import DecodeBatch
from elinvar.base.config import BLOCK_SIZE, ModelConfig, MoEConfig, RopeConfig
from elinvar.models.llama import build
from elinvar.models.mixtral import rules
from elinvar.ops import Ops, Weight, load_provider
from elinvar.ops.layout import aligned_empty, packed_bytes
from elinvar.run.graphs import Graphs
from elinvar.weights.rules import bind

LAYERS, DIM, FF_DIM, VOCAB = 12, 1024, 512, 8192
TOKENS, ROUNDS = 24, 7


def shape_of(num_experts: int) -> ModelConfig:
    return ModelConfig(
        family="mixtral",
        vocab_size=VOCAB,
        dim=DIM,
        num_layers=LAYERS,
        num_heads=16,
        num_kv_heads=4,
        head_dim=64,
        ff_dim=FF_DIM,
        max_context=4096,
        norm_eps=1e-5,
        layer_kinds=("full",) * LAYERS,
        rope={"full": RopeConfig(10000.0, 64)},
        attn_scale=0.125,
        moe=MoEConfig(num_experts, 1, FF_DIM, tuple(range(LAYERS)), renormalise=True),
    )


def random_weights(config: ModelConfig, kind: Any) -> dict[str, Any]:
    """Every matrix in memory of its own. Those of an expert hold small numbers: what counts is
    their size; the router's and the embedding are random, so that tokens spread."""
    rng = np.random.default_rng(1)
    weights: dict[str, Any] = {}
    for binding in bind(rules(config), "safetensors", config.num_layers):
        shape: Any = binding.shape
        if len(shape) == 1:
            weights[binding.name] = np.ones(shape, np.float32)
            continue
        plain = binding.name.endswith("router") or binding.name == "embed"
        stored = "f32" if plain else kind
        data = aligned_empty(packed_bytes(stored, shape))
        if plain:
            data.view(np.float32)[:] = rng.standard_normal(data.size // 4, np.float32)
        else:
            data[:] = 12  # as f16 2.4e-4
        weights[binding.name] = Weight(stored, shape, data)
    return weights


def active_bytes(weights: Mapping[str, Any], top_k: int, num_experts: int) -> float:
    experts = sum(w.nbytes for name, w in weights.items() if ".experts." in name)
    rest = sum(
        w.nbytes for name, w in weights.items() if ".experts." not in name and name != "embed"
    )
    return rest + experts * top_k / num_experts


def seconds_a_token(graphs: Graphs, table: Any, start: int) -> float:
    rng = np.random.default_rng(start)
    batches = []
    for position in range(start, start + TOKENS):
        slot = table[0, position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        numbers = [[rng.integers(VOCAB)], [position], [position + 1], [slot]]
        batches.append(DecodeBatch(np.array(numbers, np.int32), (table,)))
    began = time.perf_counter()
    for batch in batches:
        graphs.forward(batch)
    return (time.perf_counter() - began) / TOKENS


def measure(config: ModelConfig, weights: dict[str, Any], tops: list[int], ops: Ops) -> list[float]:
    """Seconds a token for each number of experts, the median of rounds taken in turn."""
    assert config.moe is not None
    blocks = (ROUNDS + 1) * TOKENS // BLOCK_SIZE + 1
    table = np.arange(blocks, dtype=np.int32)[None]
    runs = []
    for top_k in tops:
        model = build(replace(config, moe=replace(config.moe, top_k=top_k)), weights, ops)
        [spec] = model.kv_specs("f16")
        runs.append(Graphs(model, ops, ops.kv_layers(spec, blocks)))
    times = [
        [seconds_a_token(graphs, table, i * TOKENS) for graphs in runs] for i in range(ROUNDS + 1)
    ]
    return [median(column) for column in zip(*times[1:], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top", default="2,4,8", help="experts of a token, with commas")
    parser.add_argument("--kind", default="q4")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    tops = [int(k) for k in arguments.top.split(",")]
    config = shape_of(arguments.experts)
    weights = random_weights(config, arguments.kind)
    ops = load_provider("cpu", arguments.threads)
    total = sum(w.nbytes for w in weights.values()) / 1e6
    print(f"{arguments.experts} experts, {arguments.kind}, {total:.0f} MB in all\n")
    print("| experts a token | active MB | ms a token | tokens/s | GB/s | bytes | time |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    times = measure(config, weights, tops, ops)
    bytes_ = [active_bytes(weights, k, arguments.experts) for k in tops]
    for top_k, size, seconds in zip(tops, bytes_, times, strict=True):
        print(
            f"| {top_k} | {size / 1e6:.1f} | {seconds * 1e3:.2f} | {1 / seconds:.0f} | "
            f"{size / seconds / 1e9:.1f} | {size / bytes_[0]:.2f}x | {seconds / times[0]:.2f}x |"
        )


if __name__ == "__main__":
    main()
