"""save_state: weights to a Hugging Face folder, by the rules that load them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elinvar.base.errors import ModelError
from elinvar.ops.layout import Weight, unpack
from elinvar.weights.atomic import atomic_file
from elinvar.weights.fixes import f32_tensor, transpose
from elinvar.weights.rules import Binding, Rule, bind
from elinvar.weights.safetensors import SINGLE, write_safetensors
from elinvar.weights.tensor import BLOCKS, HostTensor


def save_state(
    state: Mapping[str, Weight | NDArray[np.float32]],
    rules: Sequence[Rule],
    num_layers: int,
    folder: Path,
    config: Mapping[str, Any],
) -> None:
    """Writes a Hugging Face folder: model.safetensors and config.json (`config` as given).

    Float matrices keep their type and bits, quantised ones are written as the float32 values
    they stand for, vectors as float32. Raises ModelError when a weight is missing or the folder
    cannot be written.
    """
    sources: dict[str, list[Binding]] = {}
    for binding in bind(rules, "safetensors", num_layers):
        if binding.name in state:
            sources.setdefault(binding.source, []).append(binding)
        elif not binding.optional:
            raise ModelError(f"{folder} cannot be written: the weight {binding.name} is missing.")
    entries = []
    for source, bindings in sources.items():
        first = state[bindings[0].name]
        shape = bindings[0].stored_shape or first.shape
        entries.append((source, _joint_dtype(state[b.name] for b in bindings), tuple(shape)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"{folder} cannot be made: {error.strerror}.") from error
    text = json.dumps(dict(config), indent=2).encode()
    with atomic_file(folder / "config.json", len(text)) as file:
        file.write(text)
    write_safetensors(
        folder / SINGLE, entries, lambda source: stored_tensor(sources[source], state).data
    )


def stored_tensor(
    bindings: Sequence[Binding], state: Mapping[str, Weight | NDArray[np.float32]]
) -> HostTensor:
    """What a file holds for the weights that share one of its tensors."""
    dtype = _joint_dtype(state[binding.name] for binding in bindings)
    source, transposed = bindings[0].source, bindings[0].transposed
    whole: HostTensor | None = None
    for binding in bindings:
        tensor = _host_tensor(source, state[binding.name], dtype)
        tensor = binding.fix.invert(tensor) if binding.fix else tensor
        if binding.part is None:
            whole = tensor
            break
        row = math.prod(tensor.shape[1:]) * BLOCKS[dtype][1]
        if whole is None:
            size = math.prod(binding.part.of) * BLOCKS[dtype][1]
            whole = HostTensor(
                source, binding.part.of, dtype, np.zeros((size // row, row), np.uint8)
            )
        rows = binding.part.rows(np.arange(tensor.shape[0]))
        whole.data.reshape(-1, row)[rows] = tensor.data.reshape(-1, row)
    assert whole is not None
    return transpose(whole) if transposed else whole


_SAVED_DTYPES = {"f16": "F16", "bf16": "BF16"}


def _joint_dtype(values: Iterable[Weight | NDArray[np.float32]]) -> str:
    """The type in which all parts of one stored tensor are written."""
    kinds = {
        _SAVED_DTYPES.get(value.kind, "F32") if isinstance(value, Weight) else "F32"
        for value in values
    }
    return kinds.pop() if len(kinds) == 1 else "F32"


def _host_tensor(name: str, value: Weight | NDArray[np.float32], dtype: str) -> HostTensor:
    if not isinstance(value, Weight):
        return f32_tensor(name, value)
    w: NDArray[Any] = unpack(value)
    if dtype == "F16":
        w = w.astype("<f2")
    elif dtype == "BF16":
        # Exact: the values came from bf16, so the low half of each is zero.
        w = (w.view(np.uint32) >> 16).astype("<u2")
    # A matrix that does not fill its last panel comes as a view of one that does.
    return HostTensor(name, value.shape, dtype, np.ascontiguousarray(w).view(np.uint8))
