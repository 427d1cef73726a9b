"""benchmarks/gpu.py where there is no GPU: its ways can be gone, and a part that crashes takes none along."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[1] / "benchmarks/gpu.py"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_gpu", SCRIPT)
    assert spec and spec.loader
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_small_shapes_under_the_interpreter(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    parts = "bits,products,rows,attention,sampling,recurrent,texts,chosen"
    command = [sys.executable, str(SCRIPT), "--small", "--only", parts, "--out", str(out)]
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    report = json.loads(out.read_text())
    assert report["device"] == "interpreter" and report["small"]
    found = report["parts"]
    assert list(found) == ["bits", "ceilings", *parts.split(",")[1:]]
    assert found["bits"]["products"]["q4"]["plain_is_ptx"]
    assert found["bits"]["products"]["q4"]["seen"]["dense"] == "equal"
    assert found["bits"]["attention"]["int8"] == {"invariant": True}
    assert found["products"]["right"]["q4"]["invariant"]
    assert found["products"]["speed"]["bf16"]["qkv"]["1"]["of_copy"] > 0
    assert found["attention"]["right"]["decode_is_prefill"]
    assert found["chosen"]["right"]["all_keys_is_dense"] and found["chosen"]["shares"]["right"]
    assert set(found["recurrent"]["right"].values()) == {True}
    assert found["recurrent"]["speed"]["2x3"]["delta_rule"]["us_per_token"] > 0
    assert found["texts"]["right"] == {"finite": True, "alone_as_in_a_batch": True}
    assert found["sampling"]["top"]["3"] == {"right": True, "invariant": True}


SCRIPTS = {
    "raises": "raise SystemExit('the driver went away')",
    "dies": "import os; os.abort()",
    "hangs": "import time; time.sleep(60)",
}


@pytest.mark.parametrize("how", SCRIPTS)
def test_what_was_measured_before_a_part_ended_is_kept(
    gpu: Any, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "part.py"
    script.write_text(
        "import sys\nout = sys.argv[sys.argv.index('--out') + 1]\n"
        "open(out, 'w').write('{\"speed\": {\"us\": 3.5}}')\n" + SCRIPTS[how]
    )
    monkeypatch.setattr(gpu, "__file__", str(script))
    found = gpu.run_part("products", tmp_path, 1 if how != "hangs" else -8, small=True)
    assert found["speed"] == {"us": 3.5}
    told = {"raises": "driver went away", "dies": "ended with -6", "hangs": "stopped after"}
    assert told[how] in found["error"]


def test_targets_are_told_as_reached_or_not(gpu: Any) -> None:
    parts = {
        "attention": {
            "decode": {"bf16": {"1x4096": {"of_copy": 0.9}, "8x8192": {"of_copy": 0.79}}},
            "prefill": {"flops": 4.1e14},
        },
        "llama": {"decode": {"128": {"tokens_per_s": 9000.0}}, "plan": {"of_taken": 1.02}},
        "transformers": {"decode": {"128": {"tokens_per_s": 4000.0}}},
        "cost": {"bf16": {"forward": {"1": 1.01, "8192": 1.06}}},
        "products": {"speed": {"q4": {"o": {"1": {"of_copy": 0.8}, "16": {"error": "no"}}}}},
    }
    told = {row["what"]: (row["measured"], row["reached"]) for row in gpu.reached(parts)}
    assert list(told.values()) == [
        ("79.0 %", "no"),
        ("not measured", "-"),
        ("410.0 TFLOP/s", "yes"),
        ("not measured", "-"),
        ("not measured", "-"),
        ("not measured", "-"),
        ("2.2 x", "no"),
        ("not measured", "-"),
        ("6.0 %", "no"),
        ("2.0 %", "yes"),
    ]


def test_what_failed_is_told_with_where(gpu: Any) -> None:
    report = {
        "parts": {
            "a": {"right": {"bf16": {"right": True, "invariant": False}}, "seconds": 1},
            "b": {"error": "Traceback\nRuntimeError: CUDA error", "x": {"us": 1.0}},
        }
    }
    assert gpu.errors(report["parts"]) == [
        "/a/right/bf16: invariant is false",
        "/b: RuntimeError: CUDA error",
    ]
