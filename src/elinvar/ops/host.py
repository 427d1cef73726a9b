"""What providers have in common that compute on the arrays of this process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elinvar.base.batch import ForwardBatch
from elinvar.base.config import KVSpec, ModelConfig
from elinvar.ops.caches import new_kv_layers


class HostOps:
    arithmetic = ""

    def kv_layers(self, spec: KVSpec, num_blocks: int) -> list[Any]:
        return new_kv_layers(spec, num_blocks)

    def prepare(self, config: ModelConfig, weights: Mapping[str, Any]) -> None:
        """Matrices are bound at their first use."""

    def available_memory(self) -> int | None:
        return None

    def upload(self, batch: ForwardBatch) -> ForwardBatch:
        return batch

    def download(self, batch: ForwardBatch) -> None:
        """It is there."""

    def graph_size(self, count: int) -> int:
        return count
