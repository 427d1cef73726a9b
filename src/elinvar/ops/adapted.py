"""AdaptedOps: a provider whose products take LoRA adapters with them, row by row.

It stands around a provider, so that the blocks of nn/ and the families know nothing of adapters: a
matrix is adapted wherever it is multiplied. While no adapter is `applied`, calls are the inner
provider's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from elinvar.base.batch import ForwardBatch
from elinvar.base.config import Activation
from elinvar.ops.api import F32, I32, Ops
from elinvar.ops.arguments import Lora, LoraPair
from elinvar.ops.costs import COSTS
from elinvar.ops.layout import Weight

Pairs = Mapping[Weight, LoraPair]
"""An adapter: what it adds to which matrix."""


class AdaptedOps:
    """Adapters have numbers: those of ForwardBatch.adapters."""

    def __init__(self, inner: Ops) -> None:
        self.inner = inner
        self.version = 0
        """Another one whenever an adapter has come or gone: what was recorded with adapters before must
        not be run again, as its matrices may be gone."""
        self._adapters: dict[int, Pairs] = {}
        self._loras: dict[tuple[Weight, ...], Lora | None] = {}
        self._rows: dict[int, I32] | None = None
        for op in COSTS.keys() - {"linear", "gated_linear"}:
            if hasattr(inner, op):
                setattr(self, op, getattr(inner, op))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def set_adapter(self, number: int, pairs: Pairs | None) -> None:
        """None: there is no such adapter any more."""
        if pairs is None:
            del self._adapters[number]
        else:
            self._adapters[number] = pairs
        self._loras.clear()
        self.version += 1

    def release(self, weights: Iterable[Any]) -> None:
        self._loras.clear()  # those that are joined may lie where the ops run
        self.inner.release(weights)

    @contextmanager
    def applied(self, batch: ForwardBatch) -> Iterator[None]:
        """While the block runs, the products of a forward of `batch` are its adapters' too."""
        adapters_T = batch.adapters
        assert adapters_T is not None
        # A model multiplies all rows, or after its last attention those that need logits; where they
        # are as many, they are the same.
        self._rows = {len(batch.logit_rows): adapters_T[batch.logit_rows]}
        self._rows[len(adapters_T)] = adapters_T
        try:
            yield
        finally:
            self._rows = None

    def linear(self, x_TK: F32, weights: Sequence[Weight], bias_N: F32 | None = None) -> F32:
        y_TN = self.inner.linear(x_TK, weights, bias_N)
        if self._rows is not None and (lora := self._lora(tuple(weights))) is not None:
            self.inner.lora(y_TN, x_TK, self._rows[len(x_TK)], lora)
        return y_TN

    def gated_linear(self, x_TK: F32, gate: Weight, up: Weight, activation: Activation) -> F32:
        if self._rows is None or self._lora((gate, up)) is None:
            return self.inner.gated_linear(x_TK, gate, up, activation)
        return self.inner.gated(self.linear(x_TK, (gate, up)), activation)

    def _lora(self, weights: tuple[Weight, ...]) -> Lora | None:
        if weights not in self._loras:
            self._loras[weights] = self._join(weights)
        return self._loras[weights]

    def _join(self, weights: tuple[Weight, ...]) -> Lora | None:
        columns, pairs, at = [], [], 0
        adapters = [self._adapters.get(i, {}) for i in range(max(self._adapters, default=-1) + 1)]
        for w in weights:
            own = [adapter.get(w) for adapter in adapters]
            if any(own):
                columns.append(at)
                pairs.append(own)
            at += w.shape[0]
        return Lora(columns, pairs) if columns else None
