"""One C++ program, compiled for each instruction set, compiler and CPU at hand, must print the
same hashes of its output bits. The NEON path runs under an emulator where one is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from elinvar import _cpu

ROOT = Path(__file__).parents[1]
FLAGS = ["-std=c++20", "-O2", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi"]
LEVEL_FLAGS = {
    "scalar": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni",
    "neon": "-march=armv8.2-a+dotprod",
}


def build(compiler: str, levels: list[str], out: Path) -> Path:
    """The program with the given instruction sets."""
    objects = []
    for level in levels:
        target = out / f"{level}.o"
        defines = [f"-DELINVAR_{level.upper()}=1", f"-DELINVAR_LEVEL={level}"]
        subprocess.run(
            [compiler, *FLAGS, *LEVEL_FLAGS[level].split(), *defines,
             f"-DELINVAR_ISA=elinvar::{level}", "-c", ROOT / "csrc/kernels.cpp", "-o", target],
            check=True, capture_output=True,
        )  # fmt: skip
        objects.append(target)
    others = {ROOT / "csrc/kernels.cpp", *(ROOT / "csrc").glob("bind*.cpp")}
    sources = [path for path in (ROOT / "csrc").glob("*.cpp") if path not in others]
    program = out / "bits"
    subprocess.run(
        [compiler, *FLAGS, "-static", "-pthread", f"-I{ROOT / 'csrc'}",
         ROOT / "tests/cpp/bits.cpp", *sources, *objects, "-o", program],
        check=True, capture_output=True,
    )  # fmt: skip
    return program


def lines(*command: object) -> str:
    return subprocess.run(
        [str(c) for c in command], check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++") or shutil.which("clang++")
    assert compiler, "the package itself needs a C++ compiler"
    levels = ["neon", "scalar"] if "neon" in _cpu.available() else ["scalar", "avx2", "avx512"]
    return build(compiler, levels, tmp_path_factory.mktemp("native"))


def test_instruction_sets_and_threads(native: Path) -> None:
    """Built at -O2 by the plain compiler: not even the optimiser's choices show."""
    expected = lines(native, "scalar", 1)
    assert expected.count("\n") > 40
    for level in _cpu.available():
        for threads in (1, 3):
            assert lines(native, level, threads) == expected


def test_neon_under_emulation(native: Path, tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: qemu-user)")
    program = build(compiler, ["scalar", "neon"], tmp_path)
    expected = lines(native, "scalar", 1)
    assert lines(emulator, "-cpu", "max", program, "neon", 1) == expected
    assert lines(emulator, "-cpu", "max", program, "scalar", 1) == expected
