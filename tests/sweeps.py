"""What sweeps of ops share: the cpu provider on every instruction set of this machine and the oracle,
random inputs, and how outputs are compared. Each op is close to `ref`, and equal to the bit across
instruction sets, threads, and the rows that share a call."""

from __future__ import annotations

import numpy as np

from elinvar import _cpu
from elinvar.base.config import KVSpec
from elinvar.ops import load_provider
from elinvar.ops.layout import QUANTISED, Weight, WeightKind, pack_float, pack_q4, pack_q5, pack_q8

LEVELS = _cpu.available()
REF = load_provider("ref")
CPUS = {
    (level, n): load_provider("cpu", n, level)
    for level, n in [(level, 1) for level in LEVELS] + [(LEVELS[0], 2), (LEVELS[0], 4)]
}
BASE = CPUS[LEVELS[0], 1]
ROWS = [*range(1, 9), 12, 17, 97]  # every height of a tile, alone and after full ones
KINDS: list[WeightKind] = ["q4", "q5", "q8", "f16", "bf16", "f32"]


def weight(rng: np.random.Generator, kind: WeightKind, n: int, k: int) -> Weight:
    if kind in QUANTISED:
        scales = rng.uniform(0.001, 0.02, (n, k // 32)).astype(np.float16)
        if kind == "q8":
            return pack_q8(rng.integers(-127, 128, (n, k)).astype(np.int8), scales)
        mins = rng.normal(0, 0.05, (n, k // 32)).astype(np.float16)
        pack, codes = (pack_q4, 16) if kind == "q4" else (pack_q5, 32)
        return pack(rng.integers(0, codes, (n, k)).astype(np.uint8), scales, mins)
    w = rng.normal(0, 0.05, (n, k)).astype(np.float32)
    if kind == "bf16":
        return pack_float(kind, (w.view(np.uint32) >> 16).astype(np.uint16))
    return pack_float(kind, w.astype(np.float16) if kind == "f16" else w)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(0, 1, shape).astype(np.float32)


def close(a: np.ndarray, b: np.ndarray, tolerance: float = 2e-6) -> None:
    scale = np.abs(b).max() + 1e-6
    assert np.abs(a - b).max() <= tolerance * scale


def same(outputs: list[np.ndarray]) -> None:
    for other in outputs[1:]:
        assert outputs[0].tobytes() == other.tobytes()


def spec(dim: int, dtype: str, kv_heads: int = 2, window: int | None = None) -> KVSpec:
    return KVSpec("full", (0,), kv_heads, dim, dtype, window)  # type: ignore[arg-type]
