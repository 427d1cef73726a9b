"""pushed: a trainer's arrays as a checkpoint that never was a file, so that they are packed as one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elinvar.base.errors import ModelError
from elinvar.weights.checkpoint import Checkpoint
from elinvar.weights.rules import Rule, bind
from elinvar.weights.tensor import HostTensor

_TYPES = {"float32": "F32", "float16": "F16", "uint16": "BF16"}
"""numpy has no bfloat16: its bits."""
_LISTED = 3


def pushed(
    arrays: Mapping[str, NDArray[Any]],
    rules: Sequence[Rule],
    num_layers: int,
    present: Collection[str] = (),
) -> tuple[Checkpoint, list[Rule]]:
    """The arrays, and the rules that load them: `rules`, or where all names are canonical, rules that
    take each weight as it is. present: canonical names of what the model has; of these none may
    lack. Raises ModelError listing what is missing, unknown or of another shape or type."""
    own = as_they_are(rules)
    canonical = {binding.name for binding in bind(own, "safetensors", num_layers)}
    table = own if canonical.issuperset(arrays) else list(rules)
    bindings = bind(table, "safetensors", num_layers)
    shapes = {binding.source: binding.stored_shape for binding in bindings}
    needed = dict.fromkeys(b.source for b in bindings if not b.optional or b.name in present)
    missing = [name for name in needed if name not in arrays]
    return as_checkpoint(arrays, shapes, missing), table


def as_they_are(rules: Sequence[Rule]) -> list[Rule]:
    """Rules that take each weight by its canonical name, in its canonical form."""
    return [
        Rule(r.name, r.name, None, r.shape, optional=r.optional, layers=r.layers) for r in rules
    ]


def as_checkpoint(
    arrays: Mapping[str, NDArray[Any]],
    shapes: Mapping[str, tuple[int, ...] | None],
    missing: Sequence[str] = (),
    what_was_done: str = "nothing was changed",
) -> Checkpoint:
    """shapes: of all that may be there, by name; None: any. Raises ModelError as `pushed`."""
    problems = {
        "missing are": missing,
        "unknown are": [name for name in arrays if name not in shapes],
        "of another shape are": [
            f"{name} {list(array.shape)} for {list(expected)}"
            for name, array in arrays.items()
            if (expected := shapes.get(name)) is not None and tuple(array.shape) != expected
        ],
        f"not {', '.join(_TYPES)} (bfloat16's bits) are": [
            f"{name} ({array.dtype})"
            for name, array in arrays.items()
            if array.dtype.name not in _TYPES
        ],
    }
    if any(problems.values()):
        raise ModelError(
            "The pushed weights do not fit the model: "
            + "; ".join(f"{what} {_some(names)}" for what, names in problems.items() if names)
            + f"; {what_was_done}."
        )
    tensors = {name: _tensor(name, array) for name, array in arrays.items()}
    return Checkpoint(Path("pushed"), "safetensors", "pushed", {}, tensors, "")


def _tensor(name: str, array: NDArray[Any]) -> HostTensor:
    rows = array.shape[-1] if array.ndim > 1 else array.size
    data = np.ascontiguousarray(array).reshape(-1, max(rows, 1)).view(np.uint8)
    return HostTensor(name, array.shape, _TYPES[array.dtype.name], data)


def _some(names: Sequence[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
