"""Loading is bounded: besides the packed weights, memory holds the rows of one chunk, whatever the
size and the scheme of the checkpoint. Counted, never timed."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elinvar.weights import load
from elinvar.weights.checkpoint import Checkpoint, open_checkpoint
from elinvar.weights.fixes import TransposeHeads, UnpermuteRows
from elinvar.weights.load import load_weights
from elinvar.weights.rules import Part, Rule
from elinvar.weights.safetensors import SINGLE, write_safetensors
from model_files import host_tensor, write_gguf
from test_rules import CONFIG

CHUNK = 1 << 16
"""Elements, in place of the 2^20 of everyday: the bound below is in proportion."""
MOST = 32 * CHUNK
"""Bytes of temporaries: 32 an element of the chunk (32 MB of everyday)."""
N, K = 4096, 2048
"""A matrix of 8 M elements: each of its stored forms is larger than MOST."""


def peak(checkpoint: Checkpoint, rules: list[Rule], cache: Path | None) -> tuple[int, int]:
    """Bytes allocated at most while loading, and bytes packed."""
    tracemalloc.start()
    try:
        state = load_weights(checkpoint, rules, CONFIG, cache_dir=cache)
        return tracemalloc.get_traced_memory()[1], sum(value.nbytes for value in state.values())
    finally:
        tracemalloc.stop()


def assert_bounded(path: Path, rules: list[Rule], tmp_path: Path) -> None:
    fresh, packed = peak(open_checkpoint(path), rules, tmp_path / "cache")
    assert packed > 2 * MOST and fresh < MOST
    warm, _ = peak(open_checkpoint(path), rules, tmp_path / "cache")
    assert warm < MOST / 8
    in_memory, _ = peak(open_checkpoint(path), rules, None)
    assert packed < in_memory < packed + MOST


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_CHUNK_ELEMENTS", CHUNK)


PLAIN: dict[str, list[Rule]] = {
    "rows": [Rule("w", "w", "w", (N, K))],
    "reordered": [Rule("w", "w", "w", (N, K), UnpermuteRows(4), UnpermuteRows(4))],
    "transposed": [Rule("w", "w", None, (K, N), hf_transposed=True)],
    "heads": [
        Rule(
            "w",
            "w",
            "w",
            (K * 128, N // 128),
            *(TransposeHeads(128), TransposeHeads(128)),
            hf_part=Part((N, K)),
            gguf_part=Part((N, K)),
        )
    ],
    "merged": [
        Rule(name, "w", "w", (N // 2, K), hf_part=part, gguf_part=part)
        for name, part in (("q", Part((N, K), 0, 64, 128)), ("k", Part((N, K), 64, 64, 128)))
    ],
    "experts": [
        Rule(
            f"{e}.{i}",
            "w",
            None,
            (K // 2, N // 8),
            hf_part=Part((8, K, N // 8), K * e + i, 1, 2),
            hf_transposed=True,
        )
        for e in range(8)
        for i in range(2)
    ],
}


@pytest.mark.parametrize("case", PLAIN)
def test_floats(case: str, tmp_path: Path) -> None:
    shape = (8, N // 8, K) if case == "experts" else (N, K)
    write_safetensors(
        tmp_path / SINGLE, [("w", "BF16", shape)], lambda name: np.zeros(N * K, np.uint16)
    )
    (tmp_path / "config.json").write_text('{"architectures": ["X"]}')
    assert_bounded(tmp_path, PLAIN[case], tmp_path)


@pytest.mark.parametrize("case", ["rows", "reordered", "heads", "merged"])
@pytest.mark.parametrize("dtype", ["Q4_K", "Q8_0"])
def test_blocks(dtype: str, case: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"w": (dtype, host_tensor(dtype, N, K).data)})
    assert_bounded(path, PLAIN[case], tmp_path)


def stored(scheme: str) -> tuple[dict[str, Any], dict[str, tuple[str, tuple[int, ...]]]]:
    """Settings, and the tensors of a matrix w [N, K]: type and shape."""
    ct = {"quant_method": "compressed-tensors"}
    ints = {"bits": 4, "group_size": 128}
    return {
        "gptq": (
            {"quant_method": "gptq", **ints},
            {
                "w.qweight": ("I32", (K // 8, N)),
                "w.qzeros": ("I32", (K // 128, N // 8)),
                "w.scales": ("F16", (K // 128, N)),
            },
        ),
        "awq": (
            {"quant_method": "awq", **ints},
            {
                "w.qweight": ("I32", (K, N // 8)),
                "w.qzeros": ("I32", (K // 128, N // 8)),
                "w.scales": ("F16", (K // 128, N)),
            },
        ),
        "hqq": (
            {"quant_method": "hqq"},
            {
                "w.W_q": ("U8", (N * K // 128, 64)),
                "w.scale": ("F16", (N * K // 64, 1)),
                "w.zero": ("F16", (N * K // 64, 1)),
                "w.shape": ("I64", (2,)),
                **dict.fromkeys(("w.nbits", "w.group_size", "w.axis"), ("I32", ())),
            },
        ),
        "w8a8": (ct, {"w.weight": ("I8", (N, K)), "w.weight_scale": ("F32", (N, 1))}),
        "fp8": (
            {"quant_method": "fp8"},
            {"w.weight": ("F8_E4M3", (N, K)), "w.weight_scale_inv": ("F32", (N // 128, K // 128))},
        ),
        "nvfp4": (
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
            {
                "w.weight": ("U8", (N, K // 2)),
                "w.weight_scale": ("F8_E4M3", (N, K // 16)),
                "w.weight_scale_2": ("F32", ()),
            },
        ),
        "mxfp4-stack": (
            {"quant_method": "mxfp4"},
            {
                "w.weight_blocks": ("U8", (8, N // 8, K // 32, 16)),
                "w.weight_scales": ("U8", (8, N // 8, K // 32)),
            },
        ),
    }[scheme]


@pytest.mark.parametrize("scheme", ["gptq", "awq", "hqq", "w8a8", "fp8", "nvfp4", "mxfp4-stack"])
def test_schemes(scheme: str, tmp_path: Path) -> None:
    settings, tensors = stored(scheme)
    entries = [(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
    sizes = {"I64": 8, "I32": 4, "F16": 2, "F32": 4}
    numbers = {"w.shape": (N, K), "w.nbits": 4, "w.group_size": 64, "w.axis": 1}

    def data(name: str) -> np.ndarray:
        dtype, shape = tensors[name]
        if name in numbers:
            return np.array(numbers[name], {"I64": np.int64, "I32": np.int32}[dtype])
        return np.zeros(int(np.prod(shape)) * sizes.get(dtype, 1), np.uint8)

    write_safetensors(tmp_path / SINGLE, entries, data)
    config = {"architectures": ["X"], "quantization_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rules = [Rule("w", "w.weight", None, (N, K))]
    if scheme == "mxfp4-stack":
        rules = [
            Rule(str(e), "w.weight", None, (N // 8, K), hf_part=Part((8, N // 8, K), e * (N // 8)))
            for e in range(8)
        ]
    assert_bounded(tmp_path, rules, tmp_path)


MEASURE = """
import sys
from pathlib import Path
from elinvar.weights.checkpoint import open_checkpoint
from elinvar.weights.load import load_weights
from elinvar.weights.rules import Rule
from test_rules import CONFIG

def kilobytes(key):
    return int(Path("/proc/self/status").read_text().split(key)[1].split()[0])

before = kilobytes("VmRSS:")
state = load_weights(
    open_checkpoint(Path(sys.argv[1])), [Rule("w", "w", None)], CONFIG, cache_dir=Path(sys.argv[2])
)
assert state["w"].nbytes == 128 << 20
print((kilobytes("VmHWM:") - before) / 1024)
"""


def test_what_the_system_counts(tmp_path: Path) -> None:
    """128 MB in one matrix; the peak of all resident memory, pages of mapped files among it."""
    write_safetensors(
        tmp_path / SINGLE, [("w", "F16", (32768, 2048))], lambda name: np.zeros(1 << 26, np.uint16)
    )
    (tmp_path / "config.json").write_text('{"architectures": ["X"]}')
    for _ in ("fresh", "warm"):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, tmp_path, tmp_path / "cache"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
        )
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) < 48
