"""What invariance costs: one configuration for all numbers of rows, against the best free one for each;
of each product of Llama-3.1-8B, of attention, and of all that a forward has of both. A few candidates
each, where `elinvar tune` looks at all."""

from __future__ import annotations

from typing import Any

import torch

from elinvar.ops.triton.configs import Config, Tile
from elinvar.ops.triton.tuner import tune_matrix
from elinvar.ops.triton.tuner_heads import LOADS, Heads, tune_attention
from elinvar.ops.triton.tuning import together
from gpu_parts.base import Part
from gpu_parts.products import SHAPES

LAYERS = 32
CANDIDATES = {
    "bf16": [
        Config(height, 128, 64, warps, stages)
        for height, warps, stages in ((16, 4, 4), (64, 4, 3), (64, 4, 4), (128, 8, 4), (256, 8, 3))
    ],
    "q4": [
        Config(height, block_n, 128, 4, stages)
        for height, block_n, stages in ((16, 64, 3), (16, 128, 3), (64, 64, 3), (64, 128, 3))
    ],
}
TILES = [
    Tile(64, tall, keys, stages) for tall, keys, stages in ((64, 64, 3), (128, 64, 3), (128, 64, 2))
]


def measure(part: Part) -> None:
    if part.small:  # no clock tells anything there
        part.put("skipped", "times mean nothing under the interpreter")
        return
    costs: list[dict[str, Any]] = []
    part.attempt("attention", lambda: kept(costs, heads(part)))
    for kind in CANDIDATES:
        of_kind = costs[:1]
        for name, shape in SHAPES.items():
            how = kind, shape, name == "gate_up"
            part.attempt(f"{kind}/{name}", lambda how=how, to=of_kind: kept(to, one(part, *how)))
            torch.cuda.empty_cache()
        if len(of_kind) == 1 + len(SHAPES):
            part.put(f"{kind}/forward", together(of_kind))


def kept(costs: list[dict[str, Any]], cost: dict[str, Any]) -> dict[str, Any]:
    costs.append({**cost, "uses": LAYERS})
    return cost


def one(part: Part, kind: Any, shape: tuple[int, int], gated: bool) -> dict[str, Any]:
    some = CANDIDATES[kind]
    return tune_matrix(kind, shape, gated, part.device, tuple(LOADS), configs=some).told()


def heads(part: Part) -> dict[str, Any]:
    return tune_attention(Heads(32, 8, 128, "bf16"), part.device, some=TILES).told()
