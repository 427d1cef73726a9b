"""The kernels for GPUs, compiled ahead of time (benchmarks/kernels/compile.py)."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from elinvar.ops.triton.cases import TARGETS, KernelCase

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[1] / "benchmarks/kernels/compile.py"
CHIPS = ("sm_90", "gfx942")
"""All for the first and a case of each kernel for the other maker's: all for all four would take too
long here, and is what `make kernels` does."""


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compile_kernels", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kernels = load()
PTX = """
cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
@%p1 ld.global.v4.b32 { %r3, %r4, %r5, %r6 }, [ %rd2 + 0 ];
ld.global.L1::evict_last.b16 { %rs1 }, [ %rd3 + 0 ];
wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1}, %rd4, %rd5, p, 1, 1, 0, 0;
"""
LOG = """ptxas info    : Function properties for mm
    0 bytes stack frame, {} bytes spill stores, {} bytes spill loads
ptxas info    : Used 103 registers, used 1 barriers
"""
GCN = """
	buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
	global_load_ushort v1, v[2:3], off
	v_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
.private_segment_fixed_size: 92
.vgpr_count:     144
.vgpr_spill_count: 38
"""


def test_figures_are_read_from_what_compilers_write() -> None:
    found = kernels.read(TARGETS["sm_90"], {"ptx": PTX}, 98304, LOG.format(8, 12))
    assert found == {
        "copies": {"16": 1}, "loads": {"16": 1, "2": 1}, "registers": 103, "shared": 98304,
        "spills": 12, "wgmma": 1,
    }  # fmt: skip
    found = kernels.read(TARGETS["gfx942"], {"amdgcn": GCN}, 24576, "")
    assert found == {
        "loads": {"16": 1, "2": 1}, "mfma": 1, "registers": 144, "scratch": 92, "shared": 24576,
        "spills": 152,
    }  # fmt: skip


GOOD: dict[str, Any] = {"registers": 100, "shared": 1000, "spills": 0, "wgmma": 4}


@pytest.mark.parametrize(
    "other, told",
    [
        ({}, []),
        ({"spills": 64}, ["k on sm_90 spills 64 bytes a thread."]),
        ({"shared": 232449}, ["k on sm_90 takes 232,449 bytes of shared memory of 232,448."]),
        ({"wgmma": 0, "mma": 8}, ["k on sm_90 lost its wgmma instructions."]),
        ({"serialized": True}, ["k on sm_90 waits for each of its wgmma instructions: they are "
                                "serialized."]),
        ({"error": "ValueError: no"}, ["k on sm_90 is not compiled: ValueError: no"]),
    ],
)  # fmt: skip
def test_each_way_to_lose_speed_is_told(other: dict[str, Any], told: list[str]) -> None:
    figures = {
        key: value for key, value in {**GOOD, **other}.items() if value != 0 or key == "spills"
    }
    case = KernelCase("k", None, {}, wants="wgmma")
    assert list(kernels.problems(case, TARGETS["sm_90"], figures)) == told


def test_a_case_that_wants_any_matrix_instruction_is_told_of_none() -> None:
    case, chip = KernelCase("k", None, {}, wants="mma"), TARGETS["sm_80"]
    assert not list(kernels.problems(case, chip, {"spills": 0, "shared": 0, "mma": 4}))
    assert list(kernels.problems(case, chip, {"spills": 0, "shared": 0})) == [
        "k on sm_80 has no matrix instructions."
    ]


def test_what_changed_is_told() -> None:
    old = {"k": {"sm_90": GOOD}, "gone": {"sm_90": GOOD}}
    new = {"k": {"sm_90": {**GOOD, "registers": 120}, "sm_80": GOOD}, "new": {"sm_90": GOOD}}
    assert kernels.changes(old, new) == ["k on sm_90: registers 100 -> 120"]


def test_kernels_compile_without_spills_and_with_the_instructions_meant() -> None:
    """In a process of its own: nothing is compiled of what TRITON_INTERPRET decorated."""
    import triton

    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        str(SCRIPT),
        "--targets",
        ",".join(CHIPS),
        "--brief",
        "--jobs",
        "2",
        "--json",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert not result["problems"], "\n".join(result["problems"])
    committed = json.loads(kernels.COMMITTED.read_text()).get(triton.__version__)
    if committed is not None:  # of another version of Triton nothing is committed to compare with
        new = result["figures"].keys() - committed.keys()
        assert not new, f"run 'make kernels' and commit what it keeps: nothing is kept of {new}"


def test_attention_has_one_kind_of_matrix_instructions_for_all_heights() -> None:
    """What shares splits, what walks them all, and taller tiles: as many of each in the code."""
    for table in json.loads(kernels.COMMITTED.read_text()).values():
        seen = 0
        for name, chips in table.items():
            low = name.replace("/splits", "").replace("x128/128", "x128")
            if not name.startswith("attention/") or low == name or low not in table:
                continue
            for chip, figures in chips.items():
                counts = [
                    {k: f[k] for k in kernels.MATRIX if k in f} for f in (figures, table[low][chip])
                ]
                assert counts[0] and counts[0] == counts[1], (name, chip)
                seen += 1
        assert seen >= 8


def test_bad_kernels_are_told_and_compiled_as_they_are_launched() -> None:
    """Made to spill, and with a tile too low for wgmma; and nothing is fused, neither where kernels are
    checked nor where they are launched, whatever the environment says."""
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("triton_bad_kernels.py"))]
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    (spills,) = result["told"]["hoards"]
    assert re.fullmatch(r"hoards on sm_90 spills \d{4} bytes a thread\.", spills)
    assert result["told"]["low"] == ["low on sm_90 lost its wgmma instructions."]
    assert result["told"]["whole"] == []
    assert not result["checked_fuse"] and not result["launched_fuse"]
