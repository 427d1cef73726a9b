"""What invariance costs: one configuration for all numbers of rows, against the best free one for each;
of each product of Llama-3.1-8B, of attention, and of all that a forward has of both. A few candidates
each, where `elinvar tune` looks at all. The choices are a table, with which whole models run after this."""

from __future__ import annotations

from typing import Any

import torch
import triton

from elinvar.cli.tune import write
from elinvar.ops.triton.configs import Config, Tile
from elinvar.ops.triton.device import device_name
from elinvar.ops.triton.tuned import heads as key_of
from elinvar.ops.triton.tuned import place
from elinvar.ops.triton.tuner import tune_matrix
from elinvar.ops.triton.tuner_heads import LOADS, Heads, tune_attention
from elinvar.ops.triton.tuning import Choice, together
from gpu_parts.base import Part
from gpu_parts.products import SHAPES

LAYERS = 32
CANDIDATES = {
    "bf16": [
        *(Config(m, 128, 64, 4, 4, parts=parts) for m in (16, 64, 128) for parts in (1, 4)),
        *(Config(m, 128, 64, 8, 3) for m in (128, 256)),
    ],
    "q4": [
        *(Config(m, 64, 128, 4, 3, parts=parts) for m in (16, 64) for parts in (1, 4)),
        *(Config(m, 128, 128, 4, 3) for m in (16, 64)),
    ],
}
TILES = [
    Tile(64, tall, keys, stages) for tall, keys, stages in ((64, 64, 3), (128, 64, 3), (128, 64, 2))
]


def measure(part: Part) -> None:
    if part.small:  # no clock tells anything there
        part.put("skipped", "times mean nothing under the interpreter")
        return
    attention: list[dict[str, Any]] = []
    key = key_of(torch.bfloat16, "bf16", 128)
    part.attempt("attention", lambda: kept(part, attention, key, heads(part)))
    for kind in CANDIDATES:
        costs = [*attention]
        for name, (n, k) in SHAPES.items():
            how = kind, (n, k), name == "gate_up"

            def one(how: Any = how, costs: Any = costs, key: str = f"{kind}/{n}x{k}") -> Any:
                return kept(part, costs, key, product(part, *how))

            part.attempt(f"{kind}/{name}", one)
            torch.cuda.empty_cache()
        if len(costs) == 1 + len(SHAPES):
            part.put(f"{kind}/forward", together(costs))


def kept(part: Part, costs: list[dict[str, Any]], key: str, choice: Choice) -> dict[str, Any]:
    """Among the costs, and in the table."""
    cost = {**choice.told(), "uses": LAYERS}
    costs.append(cost)
    device = device_name(part.device)
    write(place(part.tables, device), device, triton.__version__, {key: choice}, {key: cost})
    return cost


def product(part: Part, kind: Any, shape: tuple[int, int], gated: bool) -> Choice:
    some = CANDIDATES[kind]
    return tune_matrix(kind, shape, gated, part.device, tuple(LOADS), configs=some)


def heads(part: Part) -> Choice:
    return tune_attention(Heads(32, 8, 128, "bf16"), part.device, some=TILES)
