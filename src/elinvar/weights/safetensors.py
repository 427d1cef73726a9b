"""Reads and writes safetensors: one file, or shards listed in model.safetensors.index.json.

Format: https://github.com/huggingface/safetensors#format (u64 header length, JSON header, data).
Files are mapped; header, offsets and shapes are checked against each other and against the file
size, so a truncated or corrupt file is a ModelError and nothing else.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from elinvar.base.errors import ModelError
from elinvar.weights.atomic import atomic_file
from elinvar.weights.tensor import HostTensor, MappedFile

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000
"""Bytes; the format's own limit."""
MAX_DIMS = 8

_SIZES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U64": 8, "I32": 4, "U32": 4},
    **{"I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1},
    "F8_E8M0": 1,
}
"""Bytes an element of the types that are stepped over; quants.SUPPORTED says which ones load."""


def read_safetensors(folder: Path) -> tuple[list[MappedFile], dict[str, HostTensor]]:
    """The mapped shards of a Hugging Face folder and all their tensors.

    Raises ModelError when a shard is missing, truncated or corrupt, or when it is not clear
    which files belong to the model.
    """
    index = folder / INDEX
    if index.exists():
        weight_map = _read_index(index)
        names = sorted(set(weight_map.values()))
    else:
        weight_map, names = {}, [_only_file(folder)]
    files: list[MappedFile] = []
    tensors: dict[str, HostTensor] = {}
    try:
        for name in names:
            path = folder / name
            if not os.path.exists(path):  # unlike Path.exists, never raises
                raise ModelError(
                    f"{path} is missing, though {INDEX} names it; download the model again."
                )
            files.append(MappedFile(path))
            found = {tensor.name: tensor for tensor in _parse(files[-1])}
            for tensor_name in found:
                if tensor_name in tensors:
                    raise ModelError(f"{path} holds {tensor_name}, and so does another shard.")
            for tensor_name, shard in weight_map.items():
                if shard == name and tensor_name not in found:
                    raise ModelError(
                        f"{path} does not hold {tensor_name}, though {INDEX} says so; download "
                        "the model again."
                    )
            tensors |= found
    except ModelError:
        tensors.clear()
        for file in files:
            file.close()
        raise
    return files, tensors


def read_file(path: Path) -> tuple[MappedFile, dict[str, HostTensor]]:
    """One file by itself. Raises ModelError when it is truncated or corrupt."""
    file = MappedFile(path)
    try:
        return file, {tensor.name: tensor for tensor in _parse(file)}
    except ModelError:
        file.close()
        raise


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelError when it cannot be read or is another thing."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise ModelError(f"{path} is not a regular file; download it again.")
        if path.stat().st_size > MAX_HEADER:
            raise ModelError(f"{path} is larger than {MAX_HEADER:,} bytes; download it again.")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON; download it again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object, and holds a {type(value).__name__}.")
    return value


def write_safetensors(
    path: Path,
    entries: Sequence[tuple[str, str, tuple[int, ...]]],
    data: Callable[[str], NDArray[Any]],
) -> None:
    """Writes tensors (name, type as the format has it, shape); `data(name)` gives each one's
    array when its turn comes, so that one at a time is in memory. Raises ModelError when the
    file cannot be written."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in entries:
        end = at + math.prod(shape) * _SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path, len(text) + 8 + at) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, _, _ in entries:
            file.write(np.ascontiguousarray(data(name)).reshape(-1).view(np.uint8).data)


def _only_file(folder: Path) -> str:
    if (folder / SINGLE).exists():
        return SINGLE
    names = sorted(p.name for p in folder.glob("*.safetensors"))
    if len(names) == 1:
        return names[0]
    if names:
        raise ModelError(
            f"{folder} holds {len(names)} safetensors files and no {INDEX}; download the model "
            "again with its index."
        )
    raise ModelError(f"{folder} holds no *.safetensors file; give a folder with the weights.")


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path} has no weight_map; download it again.")
    for shard in weight_map.values():
        # A plain file name: an index must not reach outside its folder.
        plain = isinstance(shard, str) and shard not in ("", ".", "..") and "\0" not in shard
        if not plain or "/" in shard or "\\" in shard:
            raise ModelError(f"{path} names the shard {shard!r}, which is not a plain file name.")
        if not shard.endswith(".safetensors"):
            raise ModelError(f"{path} names the shard {shard!r}, which is no *.safetensors file.")
    return weight_map


def _parse(file: MappedFile) -> list[HostTensor]:
    if file.size < 8:
        _fail(file, "it is shorter than a header")
    (length,) = struct.unpack_from("<Q", file.view)
    if length > min(MAX_HEADER, file.size - 8):
        _fail(file, f"its header is said to take {length} bytes")
    try:
        header = json.loads(bytes(file.view[8 : 8 + length]), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError):
        _fail(file, "its header is not valid JSON")
    if not isinstance(header, dict):
        _fail(file, "its header is not a JSON object")
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = []
    end = 0
    infos = [(name, *_read_info(file, name, info)) for name, info in header.items()]
    for name, dtype, shape, begin, nbytes in sorted(infos, key=lambda info: info[3:]):
        if begin != end:
            _fail(file, f"tensor {name!r} begins at byte {begin} and not at {end}")
        end = begin + nbytes
        if start + end > file.size:
            _fail(file, f"tensor {name!r} lies outside the file")
        data = file.array(start + begin, nbytes)
        rows = math.prod(shape[:-1]) if nbytes else 1
        tensors.append(HostTensor(name, shape, dtype, data.reshape(rows, -1)))
    if start + end != file.size:
        _fail(file, f"its tensors take {end} bytes of {file.size - start}")
    return tensors


def _read_info(file: MappedFile, name: str, info: object) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, first byte and number of bytes."""
    if not isinstance(info, dict):
        _fail(file, f"tensor {name!r} has no description")
    dtype: Any = info.get("dtype")
    shape: Any = info.get("shape")
    offsets: Any = info.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise ModelError(
            f"Tensor {name!r} of {file.path} has type {dtype}, which is not supported; use a model "
            "in F32, F16 or BF16."
        )
    if not _naturals(shape, MAX_DIMS) or not _naturals(offsets, 2) or len(offsets) != 2:
        _fail(file, f"tensor {name!r} has shape {shape!r} and offsets {offsets!r}")
    begin, end = offsets
    nbytes = math.prod(shape) * _SIZES[dtype]
    if end - begin != nbytes:
        _fail(file, f"tensor {name!r} takes {end - begin} bytes where its shape needs {nbytes}")
    return dtype, tuple(shape), begin, nbytes


def _naturals(value: Any, most: int) -> bool:
    """Whether it is a list of at most `most` integers that fit in 63 bits."""
    if not isinstance(value, list) or len(value) > most:
        return False
    return all(type(v) is int and 0 <= v < 2**63 for v in value)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    merged = dict(pairs)
    if len(merged) != len(pairs):
        raise ValueError("a key appears twice")
    return merged


def _fail(file: MappedFile, what: str) -> NoReturn:
    raise ModelError(f"{file.path} is truncated or corrupt ({what}); download it again.")
