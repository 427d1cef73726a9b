"""Sampling on a GPU: `sample` and `score` of ops/api.py, for one program a row of logits.

What top-k, top-p and typical-p keep is an order's first tokens, up to where a sum reaches a goal. No
row is sorted: the last one kept is searched for digit by digit in keys that order as the logits do,
then, among equal ones, in ids. Sums are of whole numbers, counts or probabilities in units of 2^-32,
so they have no order. Noise: noise.py. Edits of logits: edits.py.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from elinvar.ops.arguments import SampleArgs
from elinvar.ops.triton.cases import KernelCase
from elinvar.ops.triton.edits import edit, upload
from elinvar.ops.triton.noise import gumbel, log
from elinvar.ops.triton.numbers import keys_of, saturate

_BLOCK = 1024
"""Tokens that a program looks at together. Part of the order of the sum in log-probs."""
_MOST = tl.constexpr(3.4028234663852886e38)
_LOWEST = tl.constexpr(-(2**31))
_MOST_NOISE = tl.constexpr(16.65)
"""-ln(-ln(1 - 2^-24)) is 16.64: what is further below the best score cannot win."""


class Sampled(NamedTuple):
    """As SampleResult, on the device."""

    ids: torch.Tensor
    logprobs: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor


@triton.jit
def tokens(x, start, vocab, EDITED: tl.constexpr, BLOCK: tl.constexpr):
    """Ids of a block and their logits; -inf where a token may not be chosen."""
    ids = start + tl.arange(0, BLOCK)
    logits = tl.load(x + ids, mask=ids < vocab, other=float("-inf"))
    if not EDITED:
        logits = tl.where(ids < vocab, saturate(logits, _MOST), float("-inf"))
    return ids, logits


@triton.jit
def tempered(logits, highest, temperature):
    return tl.maximum(tl.div_rn(logits - highest, temperature + tl.zeros_like(logits)), -_MOST)


@triton.jit
def measured(
    x, start, vocab, highest, temperature, mean, least, last,
    BY: tl.constexpr, OF: tl.constexpr, EDITED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Ids of a block, their keys, and what each adds to the sum (i64): BY "logit" or "distance" from
    the mean, OF "count" or "probability". What lies behind (least, last) in the order adds nothing."""
    ids, logits = tokens(x, start, vocab, EDITED, BLOCK)
    z = tempered(logits, highest, temperature)
    keys = keys_of(logits) if BY == "logit" else keys_of(-tl.abs(z - mean))
    if OF == "count":
        amount = tl.full([BLOCK], 1, tl.int64)
    else:
        amount = (tl.exp(z) * 4294967296.0).to(tl.int64)
    kept = (logits > float("-inf")) & ((keys > least) | ((keys == least) & (ids <= last)))
    return ids, keys, tl.where(kept, amount, 0)


@triton.jit
def find_cut(
    x, vocab, highest, temperature, mean, least, last, goal,
    BY: tl.constexpr, OF: tl.constexpr, EDITED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(key, id) of the first token, from the greatest key on, with which the sum reaches `goal`; it
    must do so, and `goal` be above 0."""
    key = tl.zeros_like(least) + _LOWEST
    digits = tl.arange(0, 16)
    for digit in range(8):
        shift = 28 - 4 * digit
        steps = key + (digits << shift)
        sums = tl.zeros([16], tl.int64)
        for start in range(0, vocab, BLOCK):
            ids, keys, amount = measured(
                x, start, vocab, highest, temperature, mean, least, last, BY, OF, EDITED, BLOCK
            )
            above = keys[:, None] >= steps[None, :]
            sums += tl.sum(tl.where(above, amount[:, None], 0), 0)
        key += (tl.sum((sums >= goal).to(tl.int32)) - 1) << shift
    above = tl.zeros_like(goal)
    equal = tl.zeros_like(least)
    for start in range(0, vocab, BLOCK):
        ids, keys, amount = measured(
            x, start, vocab, highest, temperature, mean, least, last, BY, OF, EDITED, BLOCK
        )
        above += tl.sum(tl.where(keys > key, amount, 0))
        equal += tl.sum(((keys == key) & (amount > 0)).to(tl.int32))
    place = tl.zeros_like(least)
    if equal > 1:
        for digit in range(6):
            shift = 20 - 4 * digit
            steps = place + (digits << shift)
            sums = tl.zeros([16], tl.int64)
            for start in range(0, vocab, BLOCK):
                ids, keys, amount = measured(
                    x, start, vocab, highest, temperature, mean, least, last, BY, OF, EDITED, BLOCK
                )
                before = (keys == key)[:, None] & (ids[:, None] < steps[None, :])
                sums += tl.sum(tl.where(before, amount[:, None], 0), 0)
            place += (tl.sum((above + sums < goal).to(tl.int32)) - 1) << shift
    else:
        place += vocab
    return key, place


@triton.jit
def total_of(
    x, vocab, highest, temperature, least, last, EDITED: tl.constexpr, BLOCK: tl.constexpr
):
    """The sum of probabilities up to (least, last)."""
    total = tl.zeros([1], tl.int64)
    for start in range(0, vocab, BLOCK):
        _ids, _keys, amount = measured(
            x, start, vocab, highest, temperature, 0.0, least, last,
            "logit", "probability", EDITED, BLOCK,
        )  # fmt: skip
        total += tl.sum(amount)
    return tl.max(total)


@triton.jit
def share_of(total, p):
    """The whole number that `p` of the total is reached with."""
    return tl.maximum(tl.ceil(total.to(tl.float64) * p.to(tl.float64)).to(tl.int64), 1)


@triton.jit
def highest_of(x, vocab, EDITED: tl.constexpr, BLOCK: tl.constexpr):
    """The greatest logit, the lowest id that has it, and how many tokens may be chosen."""
    highest = tl.full([1], float("-inf"), tl.float32)
    best = tl.zeros([1], tl.int32)
    count = tl.zeros([1], tl.int64)
    for start in range(0, vocab, BLOCK):
        ids, logits = tokens(x, start, vocab, EDITED, BLOCK)
        top = tl.max(logits)
        first = tl.min(tl.where(logits == top, ids, vocab))
        best = tl.where(top > highest, first, best)
        highest = tl.maximum(highest, top)
        count += tl.sum((logits > float("-inf")).to(tl.int64))
    return tl.max(highest), tl.max(best), tl.max(count)


# Reference: ref_sample.typical. x [L, V] becomes -inf where a token is not typical.
# Must move a row of x twice; moves it 12 to 18 times, all but the first from the L2 cache.
@triton.jit
def typical_kernel(x, numbers, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x += row * vocab
    temperature = tl.load(numbers + row * 8 + 3).to(tl.float32, bitcast=True)
    typical_p = tl.load(numbers + row * 8 + 7).to(tl.float32, bitcast=True)
    highest, _best, count = highest_of(x, vocab, True, BLOCK)
    if (typical_p >= 1) | (temperature == 0) | (count == 0):
        return
    total = tl.zeros([1], tl.float64)
    weighted = tl.zeros([1], tl.float64)
    for start in range(0, vocab, BLOCK):
        ids, logits = tokens(x, start, vocab, True, BLOCK)
        z = tempered(logits, highest, temperature)
        p = tl.exp(z)
        total += tl.sum(p.to(tl.float64))
        weighted += tl.sum(tl.where(p > 0, p * z, 0).to(tl.float64))
    mean = tl.max((weighted / total).to(tl.float32))
    none = tl.zeros_like(temperature.to(tl.int32)) + _LOWEST
    goal = share_of(total_of(x, vocab, highest, temperature, none, vocab, True, BLOCK), typical_p)
    key, last = find_cut(
        x, vocab, highest, temperature, mean, none, vocab, goal,
        "distance", "probability", True, BLOCK,
    )  # fmt: skip
    tl.debug_barrier()
    for start in range(0, vocab, BLOCK):
        ids, _keys, amount = measured(
            x, start, vocab, highest, temperature, mean, key, last,
            "distance", "count", True, BLOCK,
        )  # fmt: skip
        tl.store(x + ids, float("-inf"), mask=(ids < vocab) & (amount == 0))


# Reference: ref_sample._choice. x [L, V] f32, edited or as it came; numbers [L, 8]: the seed's halves,
# position, temperature, top_k, top_p, min_p, typical_p -> ids [L].
# Must move a row of x once; moves it twice, and 10 to 15 times more for each of top-k and top-p, from
# the L2 cache.
@triton.jit
def choose_kernel(x, numbers, chosen, vocab, EDITED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x += row * vocab
    numbers += row * 8
    temperature = tl.load(numbers + 3).to(tl.float32, bitcast=True)
    top_k = tl.load(numbers + 4)
    top_p = tl.load(numbers + 5).to(tl.float32, bitcast=True)
    min_p = tl.load(numbers + 6).to(tl.float32, bitcast=True)
    highest, best, count = highest_of(x, vocab, EDITED, BLOCK)
    if (temperature > 0) & (count > 0):
        least = tl.zeros_like(top_k) + _LOWEST
        last = tl.zeros_like(top_k) + vocab
        if (top_k > 0) & (top_k < count):
            least, last = find_cut(
                x, vocab, highest, temperature, 0.0, least, last, top_k.to(tl.int64),
                "logit", "count", EDITED, BLOCK,
            )  # fmt: skip
        if top_p < 1:
            total = total_of(x, vocab, highest, temperature, least, last, EDITED, BLOCK)
            least, last = find_cut(
                x, vocab, highest, temperature, 0.0, least, last, share_of(total, top_p),
                "logit", "probability", EDITED, BLOCK,
            )  # fmt: skip
        least_z = tl.where(min_p > 1e-30, log(tl.maximum(min_p, 1e-30)), -_MOST)
        best_score = tl.full([1], float("-inf"), tl.float32)
        winner = tl.zeros([1], tl.int32) + best
        for start in range(0, vocab, BLOCK):
            ids, _keys, amount = measured(
                x, start, vocab, highest, temperature, 0.0, least, last,
                "logit", "count", EDITED, BLOCK,
            )  # fmt: skip
            ids, logits = tokens(x, start, vocab, EDITED, BLOCK)
            z = tempered(logits, highest, temperature)
            z = tl.where((amount > 0) & (z >= least_z), z, float("-inf"))
            if tl.max(z) + _MOST_NOISE >= tl.max(best_score):
                position, low, high = tl.load(numbers + 2), tl.load(numbers), tl.load(numbers + 1)
                score = z + gumbel(start, position, low, high, BLOCK)
                top = tl.max(score)
                first = tl.min(tl.where(score == top, ids, vocab))
                winner = tl.where(top > best_score, first, winner)
                best_score = tl.maximum(best_score, top)
        best = tl.max(winner)
    tl.store(chosen + row, best)


# Reference: ref_sample.SampleRef.score. x [L, V] f32, ids [L] -> logprobs [L]; COUNT > 0: the likeliest
# COUNT tokens of each row too.
# Must move a row of x once; moves it twice, and 10 to 15 times more with COUNT, from the L2 cache.
@triton.jit
def score_kernel(
    x, ids, logprobs, top_ids, top_logprobs, found, vocab,
    COUNT: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * vocab
    highest, _best, _count = highest_of(x, vocab, False, BLOCK)
    total = tl.zeros([1], tl.float32)
    for start in range(0, vocab, BLOCK):
        token, logits = tokens(x, start, vocab, False, BLOCK)
        total += tl.sum(tl.exp(logits - highest))
    log_sum = tl.max(log(total))
    own = tl.load(x + tl.load(ids + row))
    tl.store(logprobs + row, (own - highest) - log_sum)
    if COUNT > 0:
        none = tl.zeros_like(tl.load(ids + row)) + _LOWEST
        goal = tl.full([1], COUNT, tl.int64)
        key, last = find_cut(
            x, vocab, highest, 1.0, 0.0, none, vocab, tl.max(goal), "logit", "count", False, BLOCK
        )
        found += row * SIDE
        held = tl.zeros([1], tl.int32)
        for start in range(0, vocab, BLOCK):
            token, _keys, amount = measured(
                x, start, vocab, highest, 1.0, 0.0, key, last, "logit", "count", False, BLOCK
            )
            kept = (amount > 0).to(tl.int32)
            tl.store(found + held + tl.cumsum(kept) - 1, token, mask=kept > 0)
            held += tl.sum(kept)
        tl.debug_barrier()
        side = tl.arange(0, SIDE)
        likely = tl.load(found + side, mask=side < COUNT, other=0)
        logit = tl.load(x + likely)
        order = tl.where(side < COUNT, keys_of(saturate(logit, _MOST)).to(tl.int64), -(2**40))
        # A token's place is the number of those before it; `found` is by id.
        before = (order[None, :] > order[:, None]) | (
            (order[None, :] == order[:, None]) & (side[None, :] < side[:, None])
        )
        place = row * COUNT + tl.sum(before.to(tl.int32), 1)
        tl.store(top_ids + place, likely, mask=side < COUNT)
        tl.store(top_logprobs + place, (logit - highest) - log_sum, mask=side < COUNT)


def sample(logits_LV: torch.Tensor, args: SampleArgs) -> Sampled:
    """`Ops.sample` of f32 logits. `args` lies on the host."""
    rows, vocab = logits_LV.shape
    numbers = upload(_numbers(args), logits_LV.device)
    edited, x = edit(logits_LV, args)
    if args.typical_p is not None:
        typical_kernel[rows,](x, numbers, vocab, BLOCK=_BLOCK, num_warps=8)
    ids = torch.empty(rows, dtype=torch.int32, device=x.device)
    choose_kernel[rows,](x, numbers, ids, vocab, EDITED=edited, BLOCK=_BLOCK, num_warps=8)
    if args.num_logprobs is None:
        none = torch.empty(rows, 0, dtype=torch.float32, device=x.device)
        return Sampled(ids, none.flatten(), none.to(torch.int32), none)
    return score(logits_LV, ids, args.num_logprobs)


def score(logits_LV: torch.Tensor, ids_L: torch.Tensor, num_logprobs: int) -> Sampled:
    """`Ops.score`: ids i32 on the device."""
    rows, vocab = logits_LV.shape
    count = min(num_logprobs, vocab)
    side = triton.next_power_of_2(max(count, 16))
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits_LV.device)
    top_ids = torch.empty(rows, count, dtype=torch.int32, device=logits_LV.device)
    top_logprobs = torch.empty(rows, count, dtype=torch.float32, device=logits_LV.device)
    found = torch.empty(rows, side, dtype=torch.int32, device=logits_LV.device)
    score_kernel[rows,](
        logits_LV, ids_L, logprobs, top_ids, top_logprobs, found, vocab,
        COUNT=count, SIDE=side, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
    return Sampled(ids_L, logprobs, top_ids, top_logprobs)


def _numbers(args: SampleArgs) -> np.ndarray:
    """[L, 8] i32: what choose_kernel reads of each row."""
    rows = len(args.seeds)
    numbers = np.empty((rows, 8), np.int32)
    numbers[:, :2] = np.ascontiguousarray(args.seeds).view(np.int32).reshape(rows, 2)
    numbers[:, 2], numbers[:, 4] = args.positions, args.top_k
    ones = np.ones(rows, np.float32)
    typical_p = ones if args.typical_p is None else args.typical_p
    floats = (3, args.temperature), (5, args.top_p), (6, args.min_p), (7, typical_p)
    for column, values in floats:
        numbers[:, column] = np.ascontiguousarray(values, np.float32).view(np.int32)
    return numbers


_SIGNATURE = {"x": "*fp32", "numbers": "*i32", "vocab": "i32"}

COMPILED = [
    KernelCase("sample/typical", typical_kernel, _SIGNATURE, {"BLOCK": 1024}, 8),
    *(
        KernelCase(
            f"sample/choose{'/edited' * edited}",
            choose_kernel,
            _SIGNATURE | {"chosen": "*i32"},
            {"EDITED": edited, "BLOCK": 1024},
            8,
        )
        for edited in (False, True)
    ),
    *(
        KernelCase(
            f"sample/score/{count}",
            score_kernel,
            {
                **{"x": "*fp32", "ids": "*i32", "logprobs": "*fp32", "top_ids": "*i32"},
                **{"top_logprobs": "*fp32", "found": "*i32", "vocab": "i32"},
            },
            {"COUNT": count, "SIDE": max(16, 32 * (count > 16)), "BLOCK": 1024},
            8,
        )
        for count in (0, 20)
    ),
]
