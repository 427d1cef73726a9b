"""Which experts a token goes to, and how much each counts (ops.api.Ops.route).

One program a token, so no other token is looked at: the experts of a group lie in a row of a tile
[groups, experts a group], k times the largest is taken. Moves T E floats and 2 T k back: 4 MB for
8,192 tokens of 128 experts, some 2 us of a launch for decoding (expected; not yet measured).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from elinvar.base.config import Scoring
from elinvar.ops.triton.cases import KernelCase

_LOWEST = tl.constexpr(-1.7e38)
_CLOSED = tl.constexpr(float("-inf"))


@triton.jit
def highest(values, ids, NONE: tl.constexpr):
    """Where the largest is, of equal ones the lowest id."""
    return tl.min(tl.where(values == tl.max(values), ids, NONE))


@triton.jit
def route_kernel(logits, bias, ids, weights, stride, scaling, k: tl.constexpr, SIGMOID: tl.constexpr,
                 RENORMALISE: tl.constexpr, GROUPS: tl.constexpr, TOP: tl.constexpr,
                 SIZE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr):  # fmt: skip
    """SIZE: experts a group; the blocks: powers of two that hold the groups and a group."""
    token = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, BLOCK_G)
    s = tl.arange(0, BLOCK_S)
    live = (g[:, None] < GROUPS) & (s[None, :] < SIZE)
    experts = g[:, None] * SIZE + s[None, :]
    row = tl.load(logits + token * stride + experts, mask=live, other=_CLOSED).to(tl.float32)
    # Finite numbers, and their differences: NaN is the lowest, what is closed is lower still.
    row = tl.where(row > _LOWEST, tl.minimum(row, -_LOWEST), _LOWEST)
    if SIGMOID:
        scores = 1 / (1 + tl.exp(-tl.maximum(row, -87.0)))
    else:
        scores = tl.where(live, tl.exp(row - tl.max(tl.where(live, row, _CLOSED))), 0)
        scores /= tl.sum(scores)
    if bias is not None:
        row = scores + tl.load(bias + experts, mask=live, other=0)
    elif SIGMOID and GROUPS > 1:
        row = scores
    choice = tl.where(live, row, _CLOSED)
    if TOP < GROUPS:
        choice = tl.where(best_groups(choice, g, s, SIGMOID, TOP)[:, None], choice, _CLOSED)
    chosen = tl.zeros((BLOCK_G, BLOCK_S), tl.int32)
    for _ in range(k):
        best = highest(choice, tl.where(choice > _CLOSED, experts, GROUPS * SIZE), GROUPS * SIZE)
        chosen = tl.where(experts == best, 1, chosen)
        choice = tl.where(experts == best, _CLOSED, choice)
    chosen = tl.where(live, chosen, 0)
    if RENORMALISE:
        scores /= tl.sum(tl.where(chosen == 1, scores, 0))
    before = tl.cumsum(tl.sum(chosen, 1), 0) - tl.sum(chosen, 1)
    at = token * k + before[:, None] + tl.cumsum(chosen, 1) - 1
    tl.store(ids + at, experts, mask=chosen == 1)
    tl.store(weights + at, scores * scaling, mask=chosen == 1)


@triton.jit
def best_groups(choice, g, s, SIGMOID: tl.constexpr, TOP: tl.constexpr):
    """Whether each group is one of the TOP best, by its best expert or (sigmoid) its two best."""
    worth = tl.max(choice, 1)
    if SIGMOID:
        first = tl.min(tl.where(choice == worth[:, None], s[None, :], s.shape[0]), 1)
        rest = tl.where(s[None, :] == first[:, None], _CLOSED, choice)
        worth += tl.max(rest, 1)
    kept = tl.zeros(g.shape, tl.int1)
    for _ in range(TOP):
        best = highest(worth, g, g.shape[0])
        kept |= g == best
        worth = tl.where(g == best, _CLOSED, worth)
    return kept


def route(
    logits_TE: torch.Tensor,
    k: int,
    scoring: Scoring,
    renormalise: bool,
    scaling: float,
    bias_E: torch.Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids i32 and weights f32 [T, k], by ascending id."""
    t, e = logits_TE.shape
    ids = logits_TE.new_empty((t, k), dtype=torch.int32)
    weights = logits_TE.new_empty((t, k), dtype=torch.float32)
    size = e // num_groups
    if t:
        route_kernel[(t,)](
            logits_TE, bias_E, ids, weights, logits_TE.stride(0), scaling, k, scoring == "sigmoid",
            renormalise, num_groups, top_groups, size, triton.next_power_of_2(num_groups),
            triton.next_power_of_2(size), num_warps=1,
        )  # fmt: skip
    return ids, weights


def _case(name: str, e: int, k: int, groups: int, top: int, sigmoid: bool) -> KernelCase:
    signature = {"logits": "*fp32", "ids": "*i32", "weights": "*fp32", "stride": "i32:16", "scaling": "fp32"}  # fmt: skip
    constexprs: dict[str, Any] = {
        "k": k, "SIGMOID": sigmoid, "RENORMALISE": True, "GROUPS": groups, "TOP": top,
        "SIZE": e // groups, "BLOCK_G": groups, "BLOCK_S": e // groups,
    }  # fmt: skip
    if sigmoid:
        signature["bias"] = "*fp32"
    else:
        constexprs["bias"] = None
    return KernelCase(f"route/{name}", route_kernel, signature, constexprs, num_warps=1)


COMPILED = [_case("softmax", 128, 8, 1, 1, False), _case("groups", 256, 8, 8, 4, True)]
