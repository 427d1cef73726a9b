"""Tunes the products with one matrix on the GPU that is here (tuning.py says how it is chosen)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from elinvar.ops.triton.configs import Config
from elinvar.ops.triton.linear import gated_linear, linear, quantised_linear
from elinvar.ops.triton.matrices import DeviceKind, Matrix
from elinvar.ops.triton.samples import random_matrix
from elinvar.ops.triton.timing import copies, seconds
from elinvar.ops.triton.tuning import ROWS, Choice, candidates, tune

LOOKED_AT = (1, 2, 3, 7, 16, 17, 33, 64, 129)
"""Numbers of rows at which bits are compared."""


def tune_matrix(
    kind: DeviceKind,
    shape: tuple[int, int],
    gated: bool,
    device: torch.device,
    rows: Sequence[int] = ROWS,
    progress: Callable[[float, str], None] = lambda done, right: None,
) -> Choice:
    """Of all products with a matrix like this; gated: gate above up, as `gated_linear` takes it.
    progress: told how many of the candidates were looked at."""
    n, k = shape
    first = random_matrix(kind, n, k, device)
    ws = [first, *(random_matrix(kind, n, k, device, i) for i in range(1, copies(first.nbytes)))]
    configs = candidates(kind, n, k)
    seen: set[Config] = set()

    def time(config: Config, count: int) -> float:
        seen.add(config)
        progress(len(seen), "")
        try:
            return seconds([_call(replace(w, tuned=config), count, gated) for w in ws])
        except Exception:  # too much shared memory, too many registers, no such instruction
            return math.inf

    def same(one: Config, other: Config) -> bool:
        return all(
            torch.equal(*(_call(replace(first, tuned=c), n, gated)() for c in (one, other)))
            for n in LOOKED_AT
        )

    return tune(configs, rows, time, same)


def _call(w: Matrix, rows: int, gated: bool) -> Callable[[], torch.Tensor]:
    generator = torch.Generator(w.codes.device).manual_seed(rows)
    x = torch.randn((rows, w.shape[1]), generator=generator, device=w.codes.device)
    if w.kind == "int8":
        scales = torch.full((rows,), 0.01, device=x.device)
        codes = (x * 32).clamp(-127, 127).to(torch.int8)
        return partial(quantised_linear, codes, scales, w, torch.bfloat16)
    x = x if w.kind == "f32" else x.to(torch.float16 if w.kind == "f16" else torch.bfloat16)
    return partial(gated_linear, x, w, "silu") if gated else partial(linear, x, [w])
