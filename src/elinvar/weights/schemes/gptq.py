"""GPTQ (AutoGPTQ, GPTQModel): codes packed along the columns, zeros along the rows.

X.qweight I32 [K / c, N], X.qzeros I32 [S, N / c], X.scales [S, N] and perhaps X.g_idx I32 [K], the
group of each column, where a word holds c codes, the lowest bits first. Version 1 of the format
stores each zero less one; version 2 ("gptq_v2") as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from elinvar.weights.schemes.base import FLOATS, Matrix, Parts, elements
from elinvar.weights.schemes.integers import (
    Integers,
    across,
    all_equal,
    columns,
    even_groups,
    listed_groups,
    unpack_words,
)


def find(parts: Parts, settings: Mapping[str, Any]) -> Iterator[Matrix]:
    parts.only(settings, "bits", 2, 4, 8)
    bits = parts.count(settings, "bits", 4)
    parts.only(settings, "checkpoint_format", "gptq", "gptq_v2")
    parts.only(settings, "is_marlin_format", False)
    whole = settings.get("group_size", 128) == -1
    size = 0 if whole else parts.count(settings, "group_size", 128)
    dynamic = settings.get("dynamic") or {}
    if not isinstance(dynamic, dict) or not all(key.startswith("-:") for key in dynamic):
        parts.only(settings, "dynamic")  # other bits for some modules
    stored_less = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    for stem in parts.stems(".qweight", "I32"):
        yield _matrix(parts, stem, bits, size, stored_less)


def _matrix(parts: Parts, stem: str, bits: int, size: int, stored_less: int) -> Matrix:
    each = 32 // bits
    qweight = parts.take(stem + ".qweight", ("I32",))
    words, n = qweight.shape if len(qweight.shape) == 2 else (0, 0)
    k = words * each
    size = size or max(k, 1)
    num_groups = -(-k // size)
    scales = parts.take(stem + ".scales", FLOATS, (num_groups, n))
    qzeros = parts.take(stem + ".qzeros", ("I32",), (num_groups, -(-n // each)))
    g_idx = parts.take_if_there(stem + ".g_idx", ("I32",), (k,))
    zeros = across(qzeros, bits)
    half = 1 << (bits - 1)
    return Integers(
        name=stem + ".weight",
        label=f"GPTQ int{bits} g{size}",
        shape=(n, k),
        nbytes=sum(t.nbytes for t in (qweight, scales, qzeros, g_idx) if t),
        bits=bits,
        scale=scales,
        all_codes=lambda rows: unpack_words(elements(qweight).T[rows], bits),
        all_scales=columns(scales),
        all_zeros=lambda rows: zeros(rows).astype(np.int16) + np.int16(stored_less),
        groups=listed_groups(g_idx, num_groups) if g_idx else even_groups(k, size),
        symmetric=lambda: all_equal(elements(qzeros), half - stored_less, bits),
    )
