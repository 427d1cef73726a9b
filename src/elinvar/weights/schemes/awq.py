"""AWQ in its "gemm" layout: everything is packed along the rows of w, eight codes to a word.

X.qweight I32 [K, N / 8], X.qzeros I32 [S, N / 8], X.scales [S, N]. A word holds the rows 0, 2, 4, 6,
1, 3, 5, 7 of its eight, the lowest bits first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from elinvar.weights.schemes.base import FLOATS, Matrix, Parts, elements
from elinvar.weights.schemes.integers import Integers, across, all_equal, columns, even_groups
from elinvar.weights.tensor import HostTensor

BITS = 4
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in its word each of eight rows lies."""


def find(parts: Parts, settings: Mapping[str, Any]) -> Iterator[Matrix]:
    parts.only(settings, "bits", BITS)
    parts.only(settings, "version", "gemm", "GEMM")
    parts.only(settings, "zero_point", True)
    whole = settings.get("group_size", 128) == -1
    size = 0 if whole else parts.count(settings, "group_size", 128)
    for stem in parts.stems(".qweight", "I32"):
        qweight = parts.take(stem + ".qweight", ("I32",))
        k, words = qweight.shape if len(qweight.shape) == 2 else (0, 0)
        n, group = words * 8, size or max(k, 1)
        scales = parts.take(stem + ".scales", FLOATS, (-(-k // group), n))
        qzeros = parts.take(stem + ".qzeros", ("I32",), (-(-k // group), words))
        yield _matrix(stem, (n, k), group, qweight, scales, qzeros)


def _matrix(
    stem: str,
    shape: tuple[int, int],
    group: int,
    qweight: HostTensor,
    scales: HostTensor,
    qzeros: HostTensor,
) -> Matrix:
    zeros = across(qzeros, BITS, _PLACES)
    return Integers(
        name=stem + ".weight",
        label=f"AWQ int4 g{group}",
        shape=shape,
        nbytes=qweight.nbytes + scales.nbytes + qzeros.nbytes,
        bits=BITS,
        scale=scales,
        all_codes=across(qweight, BITS, _PLACES),
        all_scales=columns(scales),
        all_zeros=lambda rows: zeros(rows).astype(np.int16),
        groups=even_groups(shape[1], group),
        symmetric=lambda: all_equal(elements(qzeros), 1 << (BITS - 1), BITS),
    )
