"""What is compiled ahead of time to check it: kernels with the arguments that real shapes give them.

Each module of kernels ends with `COMPILED: list[KernelCase]`. No GPU is needed. Kernels that were
decorated while TRITON_INTERPRET was set cannot be compiled: the check has a process of its own.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

Want = Literal["", "mma", "wgmma"]


@dataclass(frozen=True, slots=True)
class Target:
    """A chip, and what one block of a kernel may have of it."""

    name: str
    backend: Literal["cuda", "hip"]
    arch: int | str
    warp_size: int
    max_shared: int
    """Bytes of shared memory of one block."""


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 166_912),
        Target("sm_90", "cuda", 90, 32, 232_448),
        Target("sm_100", "cuda", 100, 32, 232_448),
        Target("gfx942", "hip", "gfx942", 64, 65_536),
    )
}


@dataclass(frozen=True, slots=True)
class KernelCase:
    """One kernel as one real shape launches it."""

    name: str
    """Unique among all cases: the kernel, its shape and formats, as "linear/bf16/prefill"."""
    kernel: Any
    """What `@triton.jit` made."""
    signature: Mapping[str, str]
    """Type of each argument that is not a constexpr: "*bf16", "*u8", "fp32", "i32", "i64". A
    pointer is 16-byte aligned, as launches find it, unless it says "*bf16:1". An integer that is
    always a multiple of 16 says so: "i32:16"."""
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    """None for an optional pointer that this case goes without."""
    num_warps: int = 4
    num_stages: int | None = None
    """None: what the compiler takes where a launch says nothing, another number by chip."""
    wants: Want = ""
    """"mma": matrix instructions of any kind. "wgmma": those of whole warp groups where a chip has
    them (wgmma on sm_90, tcgen05 on sm_100), any other's elsewhere: tiles of 64 rows and more."""
    max_spills: int = 16
    """Bytes that a thread may spill to memory. Now and then ptxas spills one register or two of
    kernels that use few, which costs nothing; what does not fit spills hundreds."""
    on_amd: Mapping[str, Any] = field(default_factory=dict)
    """What is launched otherwise there: constexprs, num_warps, num_stages."""
    targets: tuple[str, ...] = tuple(TARGETS)


def spills_elsewhere(*cases: KernelCase) -> list[KernelCase]:
    """The cases, tiles of which were chosen to fill the registers of sm_90: other chips have fewer, or
    a compiler that makes less of them, and may spill."""
    chips = tuple(name for name in TARGETS if name != "sm_90")
    strict = [replace(case, targets=("sm_90",)) for case in cases]
    return strict + [
        replace(case, name=f"{case.name}/elsewhere", targets=chips, max_spills=2048)
        for case in cases
    ]


@dataclass(frozen=True, slots=True)
class Source:
    """What Triton's compiler is called with: `compile(source, target=gpu, options=options)`."""

    source: Any
    gpu: Any
    options: dict[str, Any]
    """As launches have them: nothing is fused that a kernel does not write as an FMA."""

    def key(self, triton_version: str) -> str:
        """Changes with the kernel, what it calls, its arguments, the chip and the compiler."""
        parts = f"{triton_version} {self.source.hash()} {self.gpu} {sorted(self.options.items())}"
        return sha256(parts.encode()).hexdigest()


def source_of(case: KernelCase, target: Target) -> Source:
    """Raises TypeError for a kernel that was decorated under TRITON_INTERPRET."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime import JITFunction

    if not isinstance(case.kernel, JITFunction):
        raise TypeError(f"{case.name}: unset TRITON_INTERPRET, under which nothing is compiled.")
    options: dict[str, Any] = {"num_warps": case.num_warps, "enable_fp_fusion": False}
    if case.num_stages is not None:
        options["num_stages"] = case.num_stages
    other = dict(case.on_amd) if target.backend == "hip" else {}
    options |= {name: other.pop(name) for name in tuple(options) if name in other}
    constexprs = {**case.constexprs, **other}
    types, attrs = {}, {}
    for place, name in enumerate(case.kernel.arg_names):
        if name in constexprs:
            types[name] = "constexpr"
            continue
        kind, _, multiple = case.signature[name].partition(":")
        types[name] = kind
        if multiple == "16" or (kind.startswith("*") and not multiple):
            attrs[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, types, constexprs, attrs)
    return Source(source, GPUTarget(target.backend, target.arch, target.warp_size), options)


def collect() -> list[KernelCase]:
    """COMPILED of every module of this package, in the order of their names."""
    cases: list[KernelCase] = []
    for module in sorted(
        entry.name for entry in pkgutil.iter_modules([str(Path(__file__).parent)])
    ):
        cases += getattr(importlib.import_module(f"{__package__}.{module}"), "COMPILED", [])
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), f"two cases of one name among {sorted(names)}"
    return cases
