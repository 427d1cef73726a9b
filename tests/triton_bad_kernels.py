"""Kernels that are slow for reasons that can be seen, and what the compile check says of them: run as a
script, without TRITON_INTERPRET, it prints JSON (test_triton_compiled.py)."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import triton
import triton.language as tl

from elinvar.ops.triton.cases import TARGETS, KernelCase, source_of


@triton.jit
def hoards(x, y, SIZE: tl.constexpr):
    """Holds SIZE numbers in registers while it adds them."""
    at = tl.arange(0, SIZE)
    values = tl.load(x + at)
    tl.store(y + at, values * tl.sum(values))


@triton.jit
def multiplies(x, y, out, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    rows, k = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    a = tl.load(x + rows[:, None] * DEPTH + k[None, :])
    b = tl.load(y + k[:, None] * 64 + tl.arange(0, 64)[None, :])
    tl.store(out + rows[:, None] * 64 + tl.arange(0, 64)[None, :], tl.dot(a, b))


@triton.jit
def could_fuse(x, y):
    at = tl.arange(0, 128)
    values = tl.load(x + at)
    tl.store(y + at, values * values + tl.load(y + at))


def product(name: str, rows: int) -> KernelCase:
    types = {"x": "*bf16", "y": "*bf16", "out": "*fp32"}
    return KernelCase(name, multiplies, types, {"ROWS": rows, "DEPTH": 64}, wants="wgmma")


FLOATS = {"x": "*fp32", "y": "*fp32"}
CASES = [
    KernelCase("hoards", hoards, FLOATS, {"SIZE": 16384}, num_warps=1),
    product("low", 16),
    product("whole", 64),
]
FUSABLE = KernelCase("could_fuse", could_fuse, FLOATS)


def main() -> None:
    path = Path(__file__).parents[1] / "benchmarks/kernels/compile.py"
    spec = importlib.util.spec_from_file_location("compile_kernels", path)
    assert spec and spec.loader
    check = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = check
    spec.loader.exec_module(check)
    chip = TARGETS["sm_90"]
    launches = triton.compiler.make_backend(source_of(FUSABLE, chip).gpu).parse_options({})
    with TemporaryDirectory() as scratch:
        check._begin(scratch)
        told = {
            case.name: list(check.problems(case, chip, check.figures_of(case, chip)))
            for case in CASES
        }
        made = source_of(FUSABLE, chip)
        text = triton.compile(made.source, target=made.gpu, options=made.options).asm["ptx"]
    print(json.dumps({
        "told": told, "checked_fuse": "fma.rn" in text, "launched_fuse": launches.enable_fp_fusion,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
