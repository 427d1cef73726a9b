"""Every op's meaning (api), its oracle (ref) and the providers that implement it."""

from __future__ import annotations

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

PROVIDERS = ("cpu", "ref")


def load_provider(name: str, num_threads: int | None = None, simd: str | None = None) -> Ops:
    """The ops of provider `name`.

    num_threads: compute threads (None: the CPUs this process may use). simd: force an instruction
    set of the cpu provider ("scalar", "avx2", "avx512", "neon"; None: the widest here). Neither
    changes a result. Raises ElinvarError for an unknown provider or an instruction set that this
    machine lacks.
    """
    if name == "ref":
        from elinvar.ops.ref import RefOps

        return RefOps()
    if name == "cpu":
        from elinvar.ops.cpu import CpuOps

        return CpuOps(num_threads, simd)
    raise ElinvarError(f"Unknown provider {name!r}; choose one of {', '.join(PROVIDERS)}.")
