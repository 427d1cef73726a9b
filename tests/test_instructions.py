"""The kernels' instruction counts do not grow unnoticed (benchmarks/instructions.py)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest


def load() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks/instructions.py"
    spec = importlib.util.spec_from_file_location("instructions", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


instructions = load()


def test_growth_beyond_the_tolerance_is_named() -> None:
    old = {"avx2": {"a": 1000, "b": 1000, "c": 1000, "gone": 1}}
    new = {"avx2": {"a": 1019, "b": 1031, "c": 900, "new": 5}}
    worse, better = instructions.compare(old, new)
    assert [line.split(":")[0] for line in worse] == ["avx2, b", "avx2, new", "avx2, gone"]
    assert worse[0] == "avx2, b: 1,031 instructions, 1,000 before (+3.1%)."
    assert len(better) == 1 and "(-10.0%)" in better[0]


def test_kernels_need_no_more_instructions_than_committed() -> None:
    if reason := instructions.why_not():
        pytest.skip(reason)
    committed = json.loads(instructions.COUNTS.read_text())
    key = instructions.compiler_key()
    if key not in committed:
        pytest.skip(f"no counts of {key} are committed, only of {', '.join(committed)}")
    counts = instructions.measure()
    assert {level: len(kernels) for level, kernels in counts.items()} == {"avx2": 25, "scalar": 25}
    worse, _ = instructions.compare(committed[key], counts)
    assert not worse, "\n".join(
        [*worse, "Where that is meant: benchmarks/instructions.py --update"]
    )
