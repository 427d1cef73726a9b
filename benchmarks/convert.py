"""Makes the weights that peers need where they cannot read the GGUF file itself. Runs in the
environment of onnxruntime-genai, with torch, transformers, accelerate, gguf, onnx and onnx-ir there:

    path/to/venv/bin/python benchmarks/convert.py model.gguf --llama-cpp path/to/llama.cpp/build

writes build/peers/MODEL/hf (a Hugging Face folder in float32, by transformers), onnx-int4 (4-bit
groups of 32, round to nearest, the head too, by onnxruntime-genai's model builder) and Q4_0.gguf
(by llama-quantize: llama.cpp's fastest 4-bit format). What exists is left alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from sidebyside.finding import CONVERTED, llama_cpp_folder


def to_hf(model: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    loaded = AutoModelForCausalLM.from_pretrained(
        model.parent,
        gguf_file=model.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    # It still counts as quantised, and would be saved so.
    loaded.hf_quantizer = None  # type: ignore[assignment]
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    loaded.save_pretrained(out)
    AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name).save_pretrained(out)


def to_onnx(hf: Path, out: Path) -> None:
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(hf)]
    command += ["-o", str(out), "-p", "int4", "-e", "cpu"]
    command += ["--extra_options", "int4_block_size=32", "int4_algo_config=rtn"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def to_q4_0(tool: Path, model: Path, out: Path) -> None:
    command = [str(tool), "--allow-requantize", str(model), str(out), "Q4_0"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def whole(out: Path, make: Callable[[Path], None]) -> None:
    """Makes `out` under another name first, so that half of it never counts as there."""
    if out.exists():
        print(f"{out} exists")
        return
    partial = out.with_name(f"partial-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    make(partial)
    os.replace(partial, out)
    print(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(".")[0])
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--llama-cpp", type=Path, metavar="FOLDER", help="a build of it")
    parser.add_argument("--out", type=Path, default=CONVERTED)
    args = parser.parse_args()
    folder = args.out / args.model.stem
    try:
        whole(folder / "hf", lambda out: to_hf(args.model, out))
        whole(folder / "onnx-int4", lambda out: to_onnx(folder / "hf", out))
        if args.llama_cpp:
            tool = llama_cpp_folder(args.llama_cpp, ("llama-quantize",)) / "llama-quantize"
            whole(folder / "Q4_0.gguf", lambda out: to_q4_0(tool, args.model, out))
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"The conversion failed: {error}")


if __name__ == "__main__":
    main()
