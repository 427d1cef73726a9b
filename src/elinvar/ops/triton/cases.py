"""What is compiled ahead of time to check it: kernels with the arguments that real shapes give them.

Each module of kernels ends with `COMPILED: list[KernelCase]`. No GPU is needed. Kernels that were
decorated while TRITON_INTERPRET was set cannot be compiled: the check has a process of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
    num_stages: int = 3
    wants: Want = ""
    """"mma": matrix instructions of any kind. "wgmma": those of whole warp groups where a chip has
    them (wgmma on sm_90, tcgen05 on sm_100), any other's elsewhere: tiles of 64 rows and more."""
    max_spills: int = 0
    """Bytes of registers that a thread may spill to memory."""
    on_amd: Mapping[str, Any] = field(default_factory=dict)
    """What is launched otherwise there: constexprs, num_warps, num_stages."""
    targets: tuple[str, ...] = tuple(TARGETS)


def spills_elsewhere(*cases: KernelCase) -> list[KernelCase]:
    """The cases, tiles of which were chosen to fill the registers of sm_90: other chips have fewer, or
    a compiler that makes less of them, and may spill."""
    chips = tuple(name for name in TARGETS if name != "sm_90")
    strict = [replace(case, targets=("sm_90",)) for case in cases]
    return strict + [
        replace(case, name=f"{case.name}/elsewhere", targets=chips, max_spills=1024)
        for case in cases
    ]


def compile_case(case: KernelCase, target: Target) -> Any:
    """Triton's CompiledKernel of it: `asm` by stage, `metadata` with the shared memory.

    Raises what Triton's compiler raises, and TypeError for a kernel that TRITON_INTERPRET made.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from triton.runtime import JITFunction

    if not isinstance(case.kernel, JITFunction):
        raise TypeError(f"{case.name}: unset TRITON_INTERPRET, under which nothing is compiled.")
    launch: dict[str, Any] = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    other = dict(case.on_amd) if target.backend == "hip" else {}
    launch |= {option: other.pop(option) for option in tuple(launch) if option in other}
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
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    return compile(source, target=gpu, options=launch)
