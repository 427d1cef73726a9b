"""Every op's meaning (api), its oracle (ref) and the providers that implement it."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from elinvar.base.config import Device
from elinvar.base.errors import ElinvarError
from elinvar.ops.api import Ops
from elinvar.ops.arguments import Biases, Penalties, SampleArgs, SampleResult
from elinvar.ops.caches import KVLayer, LayerCache
from elinvar.ops.layout import Weight

__all__ = [
    "Biases",
    "KVLayer",
    "LayerCache",
    "Ops",
    "Penalties",
    "SampleArgs",
    "SampleResult",
    "Weight",
    "load_provider",
]


def load_provider(
    device: Device,
    num_threads: int | None = None,
    simd: str | None = None,
    cache: Path | None = None,
) -> Ops:
    """The ops of the provider for `device`: `cpu`, `triton` for cuda, or `ref`.

    num_threads: compute threads (None: the CPUs this process may use). simd: force an instruction
    set of the cpu provider ("scalar", "avx2", "avx512", "neon"; None: the widest here). Neither
    changes a result. Raises ElinvarError for an instruction set or a device that this machine lacks.

    cache: the folder in which `elinvar tune` keeps what it measured of GPUs, and kernels for them are
    kept compiled; None: nothing is known."""
    if device == "ref":
        from elinvar.ops.ref import RefOps

        return RefOps()
    if device == "cuda":
        return _load_triton(cache)
    from elinvar.ops.cpu import CpuOps

    return CpuOps(num_threads, simd)


def _load_triton(cache: Path | None) -> Ops:
    try:
        from elinvar.ops.triton.provider import TritonOps
    except ImportError as error:
        raise ElinvarError(
            f"A GPU needs torch and triton ({error}); install them with pip install 'elinvar[gpu]', "
            "or run on the CPU."
        ) from error
    return cast("Ops", TritonOps(cache=cache))
