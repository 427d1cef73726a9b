"""What the schemes share: taking a matrix's tensors from a folder, and number formats as float32.

Legend: N rows (outputs), K columns (inputs), n rows of this call, S scales a row.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elinvar.base.errors import ModelError
from elinvar.ops.layout import GROUP, StoredParts, WeightKind
from elinvar.ops.stored import TABLES
from elinvar.weights.quants import Codes, requantize
from elinvar.weights.tensor import HostTensor

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
Rows = NDArray[np.int64]
"""Numbers of the rows wanted, in the order wanted."""
Shape = tuple[int, ...]

FLOATS = ("F32", "F16", "BF16")


@dataclass(slots=True, eq=False)
class Matrix(ABC):
    """A matrix [..., K] that is made of several stored tensors; leading dimensions count as rows."""

    name: str
    label: str
    """How it is stored, as a user reads it: "GPTQ int4 g128"."""
    shape: Shape
    nbytes: int
    """Of all of its tensors as stored."""

    def __post_init__(self) -> None:
        if self.shape[-1] % GROUP:
            raise ModelError(
                f"The {self.label} matrix {self.name} has {self.shape[-1]} inputs, and quantised "
                f"matrices need a multiple of {GROUP}; use the unquantised model."
            )

    @abstractmethod
    def plan(self) -> tuple[WeightKind, str]:
        """The kind that `codes` gives, and in words what is lost ("" for nothing)."""

    @abstractmethod
    def codes(self, rows: Rows) -> Codes:
        """Those rows in the kind of `plan`."""

    @abstractmethod
    def dequantize(self, rows: Rows) -> F32:
        """Those rows as the format defines them: [n, K]."""

    def stored_kind(self) -> WeightKind | None:
        """Of ops.stored, which holds it as it is; None: none does."""
        return None

    def stored_parts(self, rows: Rows) -> StoredParts:
        """Those rows in that kind, as ops.layout packs them; not asked where it is None."""
        raise NotImplementedError(f"{self.label} has no stored kind")

    def fits_panels(self, rows: Rows) -> bool:
        """Whether that kind can hold these rows, of which each 16 make a panel."""
        return True

    def requantized(self, rows: Rows) -> Codes:
        groups = self.dequantize(rows).reshape(-1, GROUP)
        codes, scales = requantize(groups)
        return Codes("q8", codes.reshape(len(rows), -1), scales.reshape(len(rows), -1))

    def tensor(self) -> HostTensor:
        """The matrix as a tensor whose bytes are row numbers, so that whoever reorders or cuts
        its rows need not know what they are made of."""
        numbers = np.arange(math.prod(self.shape[:-1]), dtype=np.int64)
        return HostTensor(self.name, self.shape, self.label, numbers[:, None].view(np.uint8), self)


class Requantised(Matrix):
    """Values that no kernel's codes hold: rounded to int8 over groups of 32."""

    def plan(self) -> tuple[WeightKind, str]:
        return "q8", "requantised"

    def codes(self, rows: Rows) -> Codes:
        return self.requantized(rows)


class Parts:
    """The tensors of a folder, from which a scheme takes those that its matrices are made of."""

    def __init__(self, folder: Path, method: str, tensors: Mapping[str, HostTensor]) -> None:
        self.folder, self.method = folder, method
        self.left = dict(tensors)
        """Neither taken nor dropped."""

    def stems(self, ending: str, *dtypes: str) -> list[str]:
        """What stands before `ending` in the names of the tensors that have one of `dtypes`."""
        found = [t for t in self.left.values() if t.name.endswith(ending) and t.dtype in dtypes]
        return [tensor.name.removesuffix(ending) for tensor in found]

    def take(self, name: str, dtypes: Sequence[str], shape: Shape | None = None) -> HostTensor:
        """Removes and returns a tensor. Raises ModelError when it is missing or misshapen."""
        tensor = self.left.pop(name, None)
        if tensor is None:
            raise ModelError(
                f"{self.folder} lacks the tensor {name}, and it is quantised with {self.method}, "
                "which needs it; download the model again."
            )
        if tensor.dtype not in dtypes or (shape is not None and tensor.shape != shape):
            wanted = " or ".join(dtypes) + ("" if shape is None else f" {list(shape)}")
            raise ModelError(
                f"Tensor {name} of {self.folder} is {tensor.dtype} {list(tensor.shape)}, and "
                f"{self.method} needs {wanted} there."
            )
        return tensor

    def take_if_there(
        self, name: str, dtypes: Sequence[str], shape: Shape | None = None
    ) -> HostTensor | None:
        return self.take(name, dtypes, shape) if name in self.left else None

    def only(self, settings: Mapping[str, Any], key: str, *supported: Any) -> Any:
        """settings[key], None where it is missing; refuses what is neither None nor supported."""
        value = settings.get(key)
        if value is not None and not any(type(value) is type(s) and value == s for s in supported):
            choices = " or ".join(map(str, supported)) or "null"
            raise ModelError(
                f"{self.folder} is quantised with {self.method} and {key} = {short(value)}, and "
                f"only {choices} is supported; use another quantisation of this model."
            )
        return value

    def count(self, settings: Mapping[str, Any], key: str, default: int) -> int:
        """settings[key], which must be a whole number from 1 up."""
        value = settings.get(key, default)
        if type(value) is not int or value < 1:
            raise ModelError(
                f"{self.folder} is quantised with {self.method} and {key} = {short(value)}, "
                "which must be a whole number from 1 up; download the model again."
            )
        return value


def short(value: Any) -> str:
    """What a file says, for an error."""
    try:
        return str(value)[:60]
    except RecursionError:  # just within what the reader of JSON takes
        return f"a {type(value).__name__}"


def elements(tensor: HostTensor) -> NDArray[Any]:
    """The stored elements in the tensor's shape: bf16 as uint16, FP8 as uint8, I32 as uint32."""
    return tensor.data.reshape(-1).view(_BITS[tensor.dtype]).reshape(tensor.shape)


def rows_in(tensor: HostTensor) -> Callable[[Rows], NDArray[Any]]:
    """The stored elements of some rows of a matrix."""
    return lambda rows: elements(tensor)[rows]


def as_f32(dtype: str, bits: NDArray[Any]) -> F32:
    """Elements of a stored type, as `elements` gives them, in float32."""
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if dtype in TABLES:
        return TABLES[dtype][bits]
    return bits.astype(np.float32)


def finite(tensor: HostTensor, values: F32) -> F32:
    """`values`, which scale a matrix. Raises ModelError for NaN and infinity."""
    if not np.isfinite(values).all():
        raise ModelError(
            f"Tensor {tensor.name} holds scales that are not finite: the file is corrupt, "
            "download it again."
        )
    return values


def nibbles(packed: U8) -> U8:
    """[..., n] -> [..., 2n], the low half of each byte first."""
    both = np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)
    return both.reshape(*packed.shape[:-1], -1)


_BITS = {
    **{"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<u4", "I8": "i1"},
    **{"U8": "u1", "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1"},
}
