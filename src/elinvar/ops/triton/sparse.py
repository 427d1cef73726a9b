"""Attention to the keys that were chosen for each token (DeepSeek-AI, 2025): `sparse_attention` of
ops/api.py for a GPU.

Legend: T tokens, H heads, R dims of a latent, K keys chosen, B blocks.

The kernel is that of latent attention. A small one before it makes a sequence of each token, in whose
table the chosen keys have their slots side by side; so where all keys were chosen the bits are those of
latent attention.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from elinvar.base.config import BLOCK_SIZE
from elinvar.ops.triton.attention import find_tile
from elinvar.ops.triton.caches import KVLayer
from elinvar.ops.triton.cases import KernelCase
from elinvar.ops.triton.latent import latent_attention

_BLOCK = tl.constexpr(BLOCK_SIZE)
_KEYS = 1024
"""That a program looks at together."""


# starts [R + 1], table [R, B], chosen [T, K] -> starts of sequences of one token own [T + 1], slots [T, K],
# and of each token the number of its last key, last [T]. Must move 8 bytes a key.
@triton.jit(do_not_specialize=["num_sequences", "num_tokens", "num_chosen", "stride_table"])
def slot_kernel(
    starts, table, chosen, own, slots, last, num_sequences, num_tokens, num_chosen, stride_table,
    KEYS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    if tile <= num_tokens:  # tokens that only fill the batch up are nobody's
        tl.store(own + tile, tl.minimum(tile, tl.load(starts + num_sequences)))
    sequence, nth, begin, count = find_tile(tile, starts, num_sequences, 1)
    if nth >= count:
        return
    table += sequence.to(tl.int64) * stride_table
    row = (begin + nth).to(tl.int64) * num_chosen
    found = tl.zeros_like(num_chosen)
    for start in range(0, num_chosen, KEYS):
        i = start + tl.arange(0, KEYS)
        position = tl.load(chosen + row + i, mask=i < num_chosen, other=-1)
        there = position >= 0
        block = tl.load(table + position // _BLOCK, mask=there, other=0)
        tl.store(slots + row + i, block * _BLOCK + position % _BLOCK, mask=there)
        found += tl.sum(there.to(tl.int32))
    tl.store(last + begin + nth, found - 1)


def sparse_attention(
    q_THD: torch.Tensor,
    kv: KVLayer,
    query_start_loc: torch.Tensor,
    block_table_RB: torch.Tensor,
    chosen_TK: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """`Ops.sparse_attention` -> [T, H, R]."""
    num_tokens, num_chosen = chosen_TK.shape
    own, last = chosen_TK.new_empty(num_tokens + 1), chosen_TK.new_empty(num_tokens)
    slots = torch.empty_like(chosen_TK)
    slot_kernel[num_tokens + len(block_table_RB),](
        query_start_loc, block_table_RB, chosen_TK, own, slots, last,
        len(block_table_RB), num_tokens, num_chosen, block_table_RB.stride(0), KEYS=_KEYS,
    )  # fmt: skip
    return latent_attention(q_THD, kv, own, slots, last, scale, of_slots=True)


COMPILED = [
    KernelCase(
        "sparse/slots",
        slot_kernel,
        {
            **dict.fromkeys(("starts", "table", "chosen", "own", "slots", "last"), "*i32"),
            **dict.fromkeys(("num_sequences", "num_tokens", "num_chosen", "stride_table"), "i32"),
        },
        {"KEYS": _KEYS},
    )
]
