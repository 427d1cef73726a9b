"""HostTensor and MappedFile: tensors as they lie in a mapped file, before packing.

Owns the table of stored element types. Knows no file format and no model.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from elinvar.base.errors import ModelError

if TYPE_CHECKING:
    from elinvar.weights.schemes.base import Matrix

BLOCKS: dict[str, tuple[int, int]] = {
    "F64": (1, 8),
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "I8": (1, 1),
    "I16": (1, 2),
    "I32": (1, 4),
    "I64": (1, 8),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "IQ4_NL": (32, 18),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ1_S": (256, 50),
    "IQ1_M": (256, 56),
    "IQ2_XXS": (256, 66),
    "IQ2_XS": (256, 74),
    "IQ2_S": (256, 82),
    "IQ3_XXS": (256, 98),
    "IQ3_S": (256, 110),
    "IQ4_XS": (256, 136),
    "TQ1_0": (256, 54),
    "TQ2_0": (256, 66),
    "MXFP4": (32, 17),
}
"""Stored type -> (elements a block, bytes a block). Types that can be loaded: quants.SUPPORTED."""


@dataclass(frozen=True, slots=True, eq=False)
class HostTensor:
    """A tensor in its stored type, usually a view of a mapped file."""

    name: str
    shape: tuple[int, ...]
    """numpy order: rows first, the contiguous dimension last."""
    dtype: str
    """A key of BLOCKS, or another type that a file names and nobody can load."""
    data: NDArray[np.uint8]
    """[rows, row_bytes] raw bytes; leading dimensions are flattened, a vector is one row."""
    matrix: Matrix | None = None
    """What its rows are made from, where several stored tensors make a matrix (weights.schemes):
    `data` then holds the numbers of the rows, as int64."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.data.nbytes if self.matrix is None else self.matrix.nbytes

    @property
    def row_numbers(self) -> NDArray[np.int64]:
        """Of a tensor with a `matrix`."""
        return self.data.view(np.int64)[:, 0]


class MappedFile:
    """A whole file mapped read-only. Raises ModelError when it cannot be read or is empty."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not path.is_file() and path.exists():  # opening a pipe would wait for ever
                raise ModelError(f"{path} is not a regular file; download it again.")
            with path.open("rb") as file:
                stat = os.fstat(file.fileno())
                self.size, self.mtime_ns = stat.st_size, stat.st_mtime_ns
                if self.size == 0:
                    raise ModelError(f"{path} is empty; download it again.")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read: {_reason(error)}.") from error
        self.view = memoryview(self._map)

    def array(self, start: int, nbytes: int) -> NDArray[np.uint8]:
        """Bytes start .. start + nbytes, which the caller has checked to lie in the file."""
        return np.frombuffer(self._map, np.uint8, nbytes, start)

    def release(self) -> None:
        """Gives the pages read so far back to the system; later reads fetch them again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def will_need(self) -> None:
        """Asks the system to read the file ahead."""
        if hasattr(mmap, "MADV_WILLNEED"):
            self._map.madvise(mmap.MADV_WILLNEED)

    def close(self) -> None:
        """Unmaps the file now, or when the last array that views it is gone."""
        try:
            self.view.release()
            self._map.close()
        except BufferError:
            pass


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).rstrip(".")
