"""Pages of mapped files: what holds a file's bytes in memory without having allocated any."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elinvar.ops.layout import Weight


def give_back(weights: Iterable[Weight | NDArray[Any]]) -> None:
    """The pages of files that these are views of leave this process; whoever reads them again fetches
    them, of late from the system's page cache. What was allocated stays as it is."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    arrays = (w.data if isinstance(w, Weight) else w for w in weights)
    maps = {id(found): found for array in arrays if (found := _mapped_file(array)) is not None}
    for found in maps.values():
        found.madvise(mmap.MADV_DONTNEED)


def _mapped_file(array: NDArray[Any]) -> mmap.mmap | None:
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    # Of anonymous pages that were given back nobody would know what they held; those can be written.
    if isinstance(base, memoryview) and base.readonly and isinstance(base.obj, mmap.mmap):
        return base.obj
    return None
