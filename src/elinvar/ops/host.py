"""What providers have in common that compute on the arrays of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from elinvar.base.batch import ForwardBatch
from elinvar.base.config import KVSpec, ModelConfig
from elinvar.ops.api import Progress
from elinvar.ops.caches import new_kv_layers
from elinvar.ops.pages import give_back


class HostOps:
    arithmetic = ""

    def kv_layers(self, spec: KVSpec, num_blocks: int) -> list[Any]:
        try:
            return new_kv_layers(spec, num_blocks)
        except OSError as error:  # what mmap says of it
            raise MemoryError(str(error)) from error

    def prepare(self, config: ModelConfig, weights: Mapping[str, Any]) -> None:
        """Matrices are bound at their first use."""

    def warm_up(
        self, run: Callable[[], object], weights: Iterable[Any], progress: Progress
    ) -> None:
        """They are here."""

    def exchange(
        self,
        config: ModelConfig,
        weights: Mapping[str, Any],
        pairs: Sequence[tuple[Any, Any]] | None,
    ) -> bool:
        """Recordings know addresses, and a forward is soon recorded again."""
        return False

    def release(self, weights: Iterable[Any]) -> None:
        give_back(weights)

    def available_memory(self) -> int | None:
        return None

    def upload(self, batch: ForwardBatch) -> ForwardBatch:
        return batch

    def download(self, batch: ForwardBatch) -> None:
        """It is there."""

    def graph_size(self, count: int) -> int:
        return count
