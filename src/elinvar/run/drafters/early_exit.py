"""Early exit: the target's own first layers, its last norm and its head draft (self-speculation: Zhang et
al., 2024; Elhoushi et al., 2024).

Owns nothing but recordings: keys and values of those layers are the target's own. What is written for
drafts lies behind the known tokens, and verifying writes it again. How many layers are worth it is
measured before (engine/exits.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from elinvar.base.batch import ForwardBatch
from elinvar.base.plan import PlanItem
from elinvar.models.family import Model
from elinvar.nn.decoder import Decoder
from elinvar.nn.mtp import MTPDecoder
from elinvar.ops.adapted import AdaptedOps
from elinvar.ops.api import F32, Ops
from elinvar.ops.caches import LayerCache
from elinvar.run.drafters.api import Ask, Guess, Seen
from elinvar.run.drafters.draws import draw
from elinvar.run.graphs import Graphs
from elinvar.run.rows import Rows


def can_exit(model: Any) -> bool:
    """Whether its layers are one after the other, and keep nothing that drafts would spoil."""
    return type(model) in (Decoder, MTPDecoder) and model.config.delta is None


class _Early:
    """The model, if it ended there."""

    def __init__(self, model: Decoder, num_layers: int) -> None:
        self._model, self._num_layers = model, num_layers

    def forward(self, batch: ForwardBatch, kv: Sequence[LayerCache]) -> F32:
        return self._model.logits(self._model.hidden_early(batch, kv, self._num_layers))


class EarlyExitDrafter:
    name = "early-exit"
    is_instant = False
    reads_hidden = False

    def __init__(
        self,
        model: Decoder,
        num_layers: int,
        ops: Ops,
        kv: Sequence[LayerCache],
        rows: Rows,
        adapted: AdaptedOps | None = None,
        spare: Sequence[int] = (),
    ) -> None:
        """model: one that `can_exit`. adapted, spare: as in run.graphs."""
        early = cast("Model", _Early(model, num_layers))
        self._graphs, self._ops, self._rows = Graphs(early, ops, kv, adapted, spare), ops, rows

    def propose(self, asks: Sequence[Ask]) -> list[Guess]:
        guesses = [Guess() for _ in asks]
        for k in range(max((ask.most for ask in asks), default=0)):
            live = [i for i, ask in enumerate(asks) if ask.most > k]
            items = [
                PlanItem("", asks[i].row, asks[i].num_tokens - 1 + k, 1, True, []) for i in live
            ]
            batch, rows_L, position_L = self._rows.gather(items)
            if isinstance(batch, ForwardBatch):
                batch = replace(batch, watch=None)
            logits_LV = self._graphs.forward(batch)
            some = [guesses[i] for i in live]
            draw(self._ops, self._rows, some, rows_L, position_L, logits_LV)
        return guesses

    def observe(self, seen: Seen) -> None:
        pass

    def forget(self, row: int) -> None:
        pass
