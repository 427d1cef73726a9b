"""Memory and time of loading large checkpoints of random weights: fresh (packing) and warm (mapped).

    .venv/bin/python benchmarks/loading.py --folder /tmp/big --gigabytes 3
    .venv/bin/python benchmarks/loading.py --folder /tmp/big --formats gptq q4_k

Each checkpoint has the shape of a Llama, is written tensor by tensor in shards of 1 GB, loaded in a
process of its own, and removed. Anonymous memory is what counts: pages of the checkpoint and of the
packed file are the page cache's, which the system takes back when it needs them (cgroups count
them as inactive_file). docs/design/012-loading.md holds figures.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from elinvar.weights.gguf import TENSOR_TYPES
from elinvar.weights.safetensors import INDEX, write_safetensors
from elinvar.weights.tensor import BLOCKS

Tensor = tuple[str, str, tuple[int, ...]]
"""Name, stored type, shape."""
DIM, FF_DIM, VOCAB = 4096, 14336, 128256
SHARD_BYTES = 1 << 30
SETTINGS: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "q4_k": None,
}
_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "F8_E4M3": 1}


def matrices(num_layers: int) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """(name in checkpoints, in GGUF files, shape)"""
    kv, layer = DIM // 4, "model.layers.{}.{}"
    for i in range(num_layers):
        for hf, gguf, n, k in (
            ("self_attn.q_proj", "attn_q", DIM, DIM),
            ("self_attn.k_proj", "attn_k", kv, DIM),
            ("self_attn.v_proj", "attn_v", kv, DIM),
            ("self_attn.o_proj", "attn_output", DIM, DIM),
            ("mlp.gate_proj", "ffn_gate", FF_DIM, DIM),
            ("mlp.up_proj", "ffn_up", FF_DIM, DIM),
            ("mlp.down_proj", "ffn_down", DIM, FF_DIM),
        ):
            yield layer.format(i, hf), f"blk.{i}.{gguf}", (n, k)


def tensors_of(format: str, num_layers: int) -> Iterator[Tensor]:
    """What a folder of this format holds."""
    for name in ("model.embed_tokens", "lm_head"):
        yield f"{name}.weight", "BF16", (VOCAB, DIM)
    for i in range(num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{i}.{norm}.weight", "BF16", (DIM,)
    yield "model.norm.weight", "BF16", (DIM,)
    for stem, _, (n, k) in matrices(num_layers):
        if format == "bf16":
            yield f"{stem}.weight", "BF16", (n, k)
        elif format == "fp8":
            yield f"{stem}.weight", "F8_E4M3", (n, k)
            yield f"{stem}.weight_scale_inv", "F32", (n // 128, k // 128)
        else:
            packed = (k // 8, n) if format == "gptq" else (k, n // 8)
            yield f"{stem}.qweight", "I32", packed
            yield f"{stem}.qzeros", "I32", (k // 128, n // 8)
            yield f"{stem}.scales", "F16", (k // 128, n)


def random_bytes(dtype: str, count: int) -> np.ndarray:
    """`count` elements; floats are small numbers."""
    rng = np.random.default_rng(count)
    raw = rng.integers(0, 256, count * _BYTES[dtype], np.uint8)
    if dtype == "I32":
        return raw
    if dtype == "F8_E4M3":
        raw &= 0xBF  # no NaN
        return raw
    high = raw.reshape(count, -1)[:, -1]
    high[:] = high & 0x83 | (0x3C if dtype != "F16" else 0x24)
    return raw


def write_folder(folder: Path, format: str, num_layers: int) -> None:
    shards: list[list[Tensor]] = [[]]
    room = SHARD_BYTES
    for tensor in tensors_of(format, num_layers):
        size = int(np.prod(tensor[2])) * _BYTES[tensor[1]]
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(tensor)
        room -= size
    names: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        kinds = {name: (dtype, int(np.prod(shape))) for name, dtype, shape in shard}
        write_safetensors(folder / file, shard, lambda name, of=kinds: random_bytes(*of[name]))
        names |= dict.fromkeys(kinds, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": DIM,
        "intermediate_size": FF_DIM,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": VOCAB,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "quantization_config": SETTINGS[format],
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_gguf(path: Path, dtype: str, num_layers: int) -> None:
    """Q4_K matrices, F32 gains, written one after the other."""
    codes = {name: code for code, name in TENSOR_TYPES.items()}
    infos: list[tuple[str, str, tuple[int, ...]]] = [("token_embd.weight", dtype, (VOCAB, DIM))]
    infos += [(f"{name}.weight", dtype, shape) for _, name, shape in matrices(num_layers)]
    norms = [f"blk.{i}.{norm}" for i in range(num_layers) for norm in ("attn_norm", "ffn_norm")]
    infos += [(f"{name}.weight", "F32", (DIM,)) for name in (*norms, "output_norm")]
    keys: dict[str, int | float | str] = {
        "general.architecture": "llama",
        "llama.embedding_length": DIM,
        "llama.block_count": num_layers,
        "llama.feed_forward_length": FF_DIM,
        "llama.attention.head_count": 32,
        "llama.attention.head_count_kv": 8,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.context_length": 8192,
    }

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def value(each: int | float | str) -> bytes:
        if isinstance(each, str):
            return struct.pack("<I", 8) + text(each)
        return struct.pack("<II", 4, each) if type(each) is int else struct.pack("<If", 6, each)

    header, at = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(keys)), 0
    header += b"".join(text(key) + value(each) for key, each in keys.items())
    sizes = []
    for name, kind, shape in infos:
        elements, size = BLOCKS[kind]
        sizes.append(int(np.prod(shape)) // elements * size)
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        header += text(name) + dims + struct.pack("<IQ", codes[kind], at)
        at += -(-sizes[-1] // 32) * 32
    with path.open("wb") as file:
        file.write(header + bytes(-len(header) % 32))
        for (_, kind, _), size in zip(infos, sizes, strict=True):
            if kind == "F32":
                data = np.ones(size // 4, np.float32).view(np.uint8)
            else:
                data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
                blocks = data.reshape(-1, BLOCKS[kind][1])
                blocks[:, :4] = np.full(2, 0.01, np.float16).view(np.uint8)
            file.write(data.tobytes() + bytes(-size % 32))


def anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) << 10


def measure(path: Path, cache: Path | None) -> dict[str, float]:
    """Loads in this process. Peaks are sampled every two milliseconds."""
    from elinvar.models.registry import find_family, read_config
    from elinvar.weights.checkpoint import open_checkpoint
    from elinvar.weights.load import load_weights

    before = peak = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.perf_counter()
    checkpoint = open_checkpoint(path)
    config = read_config(checkpoint)
    rules = find_family(checkpoint).rules(config)
    state = load_weights(checkpoint, rules, config, cache_dir=cache)
    seconds = time.perf_counter() - began
    done.set()
    thread.join()
    status = Path("/proc/self/status").read_text()
    return {
        "packed_MB": sum(value.nbytes for value in state.values()) / 1e6,
        "largest_tensor_MB": max(t.nbytes for t in checkpoint.tensors.values()) / 1e6,
        "peak_anonymous_MB": (peak - before) / 1e6,
        "kept_anonymous_MB": (anonymous() - before) / 1e6,
        "peak_resident_MB": int(status.split("VmHWM:")[1].split()[0]) / 1e3,
        "seconds": seconds,
    }


def in_a_process(path: Path, cache: Path | None) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", str(path), *([str(cache)] if cache else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written")
    parser.add_argument("--gigabytes", type=float, default=3, help="of the bf16 checkpoint")
    parser.add_argument("--formats", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--measure", nargs="+", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        cache = arguments.measure[1] if len(arguments.measure) > 1 else None
        print(json.dumps(measure(arguments.measure[0], cache)))
        return
    layer = sum(n * k for _, _, (n, k) in matrices(1)) * 2
    num_layers = max(1, round((arguments.gigabytes * 1e9 - 4 * VOCAB * DIM) / layer))
    for format in arguments.formats:
        folder, cache = arguments.folder / format, arguments.folder / "cache"
        folder.mkdir(parents=True)
        try:
            path = folder
            if format == "q4_k":
                path = folder / "model.gguf"
                write_gguf(path, "Q4_K", num_layers)
            else:
                write_folder(folder, format, num_layers)
            for run, kept in (("fresh", cache), ("warm", cache), ("no cache", None)):
                figures = " ".join(f"{k} {v:,.1f}" for k, v in in_a_process(path, kept).items())
                print(f"{format:5} {run:8} {figures}", flush=True)
        finally:
            shutil.rmtree(folder)
            shutil.rmtree(cache, ignore_errors=True)


if __name__ == "__main__":
    main()
