"""What a family's file says of itself, and what the runner sees of the model it builds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from elinvar.base.batch import ForwardBatch
from elinvar.base.config import KVDtype, KVSpec, ModelConfig
from elinvar.models.mtp import MTPNames
from elinvar.nn.decoder import ByLayer
from elinvar.nn.encoder import Encoder
from elinvar.ops.api import F32, Ops
from elinvar.ops.caches import LayerCache
from elinvar.weights.rules import Rule
from elinvar.weights.tensor import HostTensor


class Model(Protocol):
    """What the runner sees of any family."""

    config: ModelConfig
    weights: Mapping[str, Any]
    """By their canonical names."""

    def kv_specs(self, kv_dtype: KVDtype) -> tuple[KVSpec, ...]:
        """The cache it needs, one spec a layer kind, "full" first; the batch's block tables and
        slot mappings come in this order."""
        ...

    def forward(self, batch: ForwardBatch, kv: Sequence[LayerCache]) -> F32:
        """Logits [L, V] of batch.logit_rows; kv holds one cache a layer and is written to."""
        ...

    def hidden(
        self, batch: ForwardBatch, kv: Sequence[LayerCache], all_tokens: bool = False
    ) -> F32:
        """The same up to the head -> [L, D], or [T, D] of all tokens."""
        ...

    def hidden_by_layer(
        self, batch: ForwardBatch, kv: Sequence[LayerCache], all_tokens: bool = False
    ) -> ByLayer:
        """`hidden` that pauses between layers, and leaves nothing of it anywhere else."""
        ...

    def logits(self, h_LD: F32) -> F32:
        """The head, of any rows of `hidden`."""
        ...


Built = TypeVar("Built", bound=Model | Encoder, covariant=True)


@dataclass(frozen=True, slots=True)
class Family(Generic[Built]):
    """A family's file: how its configuration is read, its weights named, its model built."""

    name: str
    models: str
    """Those that people know, for the table of what is supported."""
    hf_architectures: tuple[str, ...]
    gguf_architectures: tuple[str, ...]
    config_from_hf: Callable[[Mapping[str, Any]], ModelConfig]
    config_from_gguf: Callable[[Mapping[str, Any], Mapping[str, HostTensor]], ModelConfig] | None
    """None: there are no GGUF files of it, or another family reads them."""
    rules: Callable[[ModelConfig], list[Rule]]
    build: Callable[[ModelConfig, Mapping[str, Any], Ops], Built]
    mtp: MTPNames | None = None
    """Where checkpoints hold heads that predict further tokens; None: they have none."""
    tested: str = "random weights against transformers"
