"""What providers have in common that compute on the arrays of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elinvar.base.batch import ForwardBatch
from elinvar.base.config import KVDtype, KVSpec
from elinvar.ops.api import Progress
from elinvar.ops.arguments import F32, I32
from elinvar.ops.caches import new_kv_layers
from elinvar.ops.layout import Kinds
from elinvar.ops.pages import give_back


class HostOps:
    arithmetic = ""
    full_batch = 2048
    """Enough to read weights seldom, few enough for activations to stay in the caches."""
    stored: Kinds = frozenset()
    widest_kv: KVDtype = "f32"

    def kv_layers(self, spec: KVSpec, num_blocks: int) -> list[Any]:
        try:
            return new_kv_layers(spec, num_blocks)
        except OSError as error:  # what mmap says of it
            raise MemoryError(str(error)) from error

    def prepare(self, weights: Mapping[str, Any], beside: bool = False) -> None:
        """Matrices are bound at their first use."""

    def warm_up(
        self, run: Callable[[], object], weights: Iterable[Any], progress: Progress
    ) -> None:
        """They are here."""

    def exchange(self, weights: Mapping[str, Any], pairs: Sequence[tuple[Any, Any]] | None) -> bool:
        """Recordings know addresses, and a forward is soon recorded again."""
        return False

    def release(self, weights: Iterable[Any]) -> None:
        give_back(weights)

    def available_memory(self) -> int | None:
        return None

    def upload(self, batch: ForwardBatch) -> ForwardBatch:
        return batch

    def place(self, array: NDArray[Any]) -> Any:
        return array

    def fetch(self, x: F32) -> F32:
        return x

    def columns(self, x_TN: F32, start: int, stop: int) -> F32:
        return np.ascontiguousarray(x_TN[:, start:stop])

    def stack(self, parts_TD: Sequence[F32]) -> F32:
        return np.concatenate(parts_TD)

    def spread(self, x_LC: F32, columns_V: I32) -> F32:
        logits_LV = x_LC.take(columns_V, axis=1, mode="clip")
        logits_LV[:, columns_V < 0] = -np.inf
        return logits_LV

    def download(self, batch: ForwardBatch) -> None:
        """It is there."""

    def graph_size(self, count: int) -> int:
        return count
