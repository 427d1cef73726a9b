"""Small model files for the parsers' tests, written by the reference packages."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from elinvar.base.errors import ModelError
from elinvar.weights.gguf import StringArray
from elinvar.weights.tensor import BLOCKS, HostTensor


def random_blocks(dtype: str, rows: int, k: int, seed: int = 0) -> np.ndarray:
    """[rows, row_bytes] random blocks of a GGML type, with sane scales."""
    rng = np.random.default_rng(seed)
    if dtype in ("F32", "F16", "BF16"):
        return float_rows(dtype, rng.standard_normal((rows, k)).astype(np.float32))
    elements, size = BLOCKS[dtype]
    blocks = rng.integers(0, 256, (rows * k // elements, size), np.uint8)
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
    halves |= {"TQ1_0": (52,), "TQ2_0": (64,), "IQ1_M": (), "MXFP4": ()}
    default = (0, 2) if dtype in ("Q4_1", "Q5_1") else (0,)
    for at in halves.get(dtype, default):
        scale = rng.standard_normal((len(blocks), 1)).astype(np.float16) / np.float16(100)
        blocks[:, at : at + 2] = scale.view(np.uint8)
    if dtype == "IQ1_M":  # the f16's nibbles are the top ones of four numbers
        scale = (rng.standard_normal(len(blocks)) / 100).astype(np.float16).view(np.uint16)
        for i in range(4):
            top = (scale >> 4 * i & 15).astype(np.uint8) << 4
            blocks[:, 49 + 2 * i] = blocks[:, 49 + 2 * i] & 15 | top
    if dtype == "MXFP4":
        blocks[:, 0] = rng.integers(110, 130, len(blocks))
    if dtype == "Q8_0":
        blocks[:, 2:][blocks[:, 2:] == 128] = 127
    return blocks.reshape(rows, -1)


def float_rows(dtype: str, values: np.ndarray) -> np.ndarray:
    if dtype == "BF16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return values.astype({"F32": np.float32, "F16": np.float16}[dtype]).view(np.uint8)


def host_tensor(dtype: str, rows: int, k: int, seed: int = 0) -> HostTensor:
    return HostTensor("w", (rows, k), dtype, random_blocks(dtype, rows, k, seed))


def write_gguf(
    path: Path, tensors: dict[str, tuple[str, np.ndarray]], arch: str = "llama", **keys: object
) -> Path:
    """tensors: name -> (type, raw bytes [rows, row_bytes]); a single row is a vector."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        name = key.replace("__", ".")
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    for name, (dtype, raw) in tensors.items():
        data = raw[0] if len(raw) == 1 else raw
        if dtype in ("F32", "F16"):
            data = data.view(np.float32 if dtype == "F32" else np.float16)
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_or_model_error(read, *args) -> bool:
    """Whether it could be read; anything but success or a ModelError of one sentence fails."""
    try:
        read(*args)
    except ModelError as error:
        assert "\n" not in str(error)
        return False
    return True


def touch(metadata: dict, tensors: dict[str, HostTensor]) -> None:
    """Reads everything, so that a view outside the file would crash."""
    for value in metadata.values():
        if isinstance(value, StringArray):
            list(value)
    for tensor in tensors.values():
        tensor.data.sum()
