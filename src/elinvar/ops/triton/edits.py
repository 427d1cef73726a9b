"""Edits of logits before a token is chosen (ops/api.py `sample`): penalties, biases, masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from elinvar.ops.arguments import SampleArgs
from elinvar.ops.triton.cases import KernelCase
from elinvar.ops.triton.numbers import saturate

_MOST = tl.constexpr(3.4028234663852886e38)
_BLOCK = 1024


# Reference: the counts of ref_sample._penalise. Tokens of each row's history -> seen [L, V] i32, zeroed
# before: bit 0 where the token was there, and from bit 1 on how often it was in the answer.
@triton.jit
def count_kernel(starts, history, prompt_lens, seen, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first, stop = tl.load(starts + row), tl.load(starts + row + 1)
    answer = first + tl.load(prompt_lens + row)
    for start in range(first, stop, BLOCK):
        at = start + tl.arange(0, BLOCK)
        place = seen + row * vocab + tl.load(history + at, mask=at < stop, other=0)
        tl.atomic_or(place, 1, mask=at < stop)
        tl.atomic_add(place, 2, mask=(at >= answer) & (at < stop))


# Reference: ref_sample.edited. logits [L, V] -> out [L, V]: finite, or -inf where a token may not be
# chosen; any_left [L] counts the others. LENIENT: again for rows that had none, where biases of -inf
# do not count. Must move 8 bytes a logit, 12 with penalties.
@triton.jit
def edit_kernel(
    logits, out, any_left, vocab, seen, repetition, presence, frequency,
    bias_starts, bias_ids, biases, masks, mask_rows, num_masks, num_words,
    LENIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if LENIENT:  # noqa: SIM102
        if tl.load(any_left + row) > 0:
            return
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = ids < vocab
    x = saturate(tl.load(logits + row * vocab + ids, mask=inside, other=0), _MOST)
    if seen is not None:
        history = tl.load(seen + row * vocab + ids, mask=inside, other=0)
        factor = tl.load(repetition + row) + tl.zeros_like(x)
        penalised = saturate(tl.where(x > 0, tl.div_rn(x, factor), x * factor), _MOST)
        x = tl.where(history > 0, penalised, x)
        count = (history >> 1).to(tl.float32)
        penalised = (x - tl.load(frequency + row) * count) - tl.load(presence + row)
        x = tl.where(history > 1, saturate(penalised, _MOST), x)
    if bias_starts is not None:
        for i in range(tl.load(bias_starts + row), tl.load(bias_starts + row + 1)):
            bias = tl.load(biases + i)
            biased = saturate(x + bias, _MOST)
            if LENIENT:
                biased = tl.where(bias == float("-inf"), x, biased)
            else:
                biased = tl.where(bias == float("-inf"), float("-inf"), biased)
                biased = tl.where(x == float("-inf"), float("-inf"), biased)
            x = tl.where(ids == tl.load(bias_ids + i), biased, x)
    if masks is not None:
        for m in range(num_masks):
            if tl.load(mask_rows + m) == row:
                at = m * num_words + ids // 32
                word = tl.load(masks + at, mask=inside, other=0)
                x = tl.where((word >> (ids % 32)) & 1 == 1, x, float("-inf"))
    tl.store(out + row * vocab + ids, x, mask=inside)
    if not LENIENT:
        tl.atomic_add(any_left + row, tl.sum((inside & (x > float("-inf"))).to(tl.int32)))


def edit(logits_LV: torch.Tensor, args: SampleArgs) -> tuple[bool, torch.Tensor]:
    """Whether logits are edited, and what to choose from: new ones, which may be written to, or those
    that came."""
    p, b = args.penalties, args.biases
    edits = (args.typical_p, p, b, args.masks)
    if all(part is None for part in edits):
        return False, logits_LV
    rows, vocab = logits_LV.shape
    device = logits_LV.device
    seen = masks = mask_rows = None
    penalties: list[Any] = [None] * 3
    biases: list[Any] = [None] * 3
    if p is not None:
        seen = torch.zeros(rows, vocab, dtype=torch.int32, device=device)
        history = [upload(x, device) for x in (p.starts, p.token_ids, p.prompt_lens)]
        count_kernel[rows,](*history, seen, vocab, BLOCK=_BLOCK)
        penalties = [upload(x, device) for x in (p.repetition, p.presence, p.frequency)]
    if b is not None:
        biases = [upload(x, device) for x in (b.starts, b.ids, b.values)]
    if args.masks is not None and args.mask_rows is not None:
        masks, mask_rows = upload(args.masks.view(np.int32), device), upload(args.mask_rows, device)
    out = torch.empty_like(logits_LV)
    any_left = torch.zeros(rows, dtype=torch.int32, device=device)
    for lenient in (False, True):
        edit_kernel[rows, -(-vocab // _BLOCK)](
            logits_LV, out, any_left, vocab, seen, *penalties,
            *biases, masks, mask_rows,
            0 if masks is None else len(masks), -(-vocab // 32),
            LENIENT=lenient, BLOCK=_BLOCK,
        )  # fmt: skip
    return True, out


def upload(array: NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """A copy on the device, by way of memory from which that needs nobody to wait."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    host = host.clone() if device.type == "cpu" else host.pin_memory()
    return host.to(device, non_blocking=True)


COMPILED = [
    KernelCase(
        "sample/count",
        count_kernel,
        dict.fromkeys(("starts", "history", "prompt_lens", "seen"), "*i32") | {"vocab": "i32"},
        {"BLOCK": _BLOCK},
    ),
    *(
        KernelCase(
            f"sample/edit{'/lenient' * lenient}",
            edit_kernel,
            {
                **dict.fromkeys(("logits", "out", "repetition", "presence", "frequency"), "*fp32"),
                **dict.fromkeys(("any_left", "seen", "bias_starts", "bias_ids"), "*i32"),
                **{"biases": "*fp32", "masks": "*i32", "mask_rows": "*i32"},
                **dict.fromkeys(("vocab", "num_masks", "num_words"), "i32"),
            },
            {"LENIENT": lenient, "BLOCK": _BLOCK},
        )
        for lenient in (False, True)
    ),
]
