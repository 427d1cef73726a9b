"""EAGLE heads: one decoder layer that goes on from a target's hidden states, for drafts (Li et al., 2024;
EAGLE-3: Li et al., 2025).

As the heads of nn/mtp.py they make of the state before a token and of the token a state of it, write to
the token's own slot, and have nothing in slot 0. Their cache is one more layer of the target's first
group, so their keys must be shaped as the target's.

Legend: T tokens, L rows, D dim of target and head, C tokens that the head can draft, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from elinvar.base.batch import ForwardBatch
from elinvar.nn.attention import Attention, Step
from elinvar.nn.decoder import Decoder, Feeds
from elinvar.nn.norm import Norm
from elinvar.nn.rope import RopeTable
from elinvar.ops.api import F32, I32
from elinvar.ops.caches import LayerCache
from elinvar.ops.layout import Weight


@dataclass(frozen=True, slots=True)
class EagleLayer:
    attention: Attention
    mlp_norm: Norm
    mlp: Feeds
    rope: RopeTable


class EagleHead:
    """The first EAGLE: the states are those that the target's own head gets, and so is what it returns."""

    num_heads = 1

    def __init__(
        self, target: Decoder, layer: EagleLayer, join: Weight, join_bias: F32 | None
    ) -> None:
        """join: [D, 2 D] of a token's embedding and the state before it."""
        self.target, self.ops, self.layer = target, target.ops, layer
        self.join, self.join_bias = (join,), join_bias
        self.head_dim = target.config.dim
        target.num_guests = 1

    def features(self, hidden_TD: F32) -> F32:
        """What the head sees of the target's `hidden` of all tokens."""
        return hidden_TD

    def draft(
        self, batch: ForwardBatch, before_TD: F32, kv: Sequence[LayerCache], head: int = 0
    ) -> F32:
        """States [L, D] of batch.logit_rows, for `draft_logits` and for the draft after it. before_TD: of
        each token of the batch the state of the token before it; none may be at position 0."""
        both_TN = self.ops.concat(self.target.embedded(batch), before_TD)
        x_TD = self.ops.linear(both_TN, self.join, self.join_bias)
        return self._through(batch, x_TD, x_TD, kv)

    def draft_logits(self, h_LD: F32) -> F32:
        """[L, V]"""
        return self.target.logits(h_LD)

    def _through(self, batch: ForwardBatch, x_TD: F32, seen_TN: F32, kv: Sequence[Any]) -> F32:
        """x with what the layer adds to it; seen: by its attention."""
        step = Step(batch, {"full": self.layer.rope.upto(batch.num_positions)}, first=1)
        a_TD = self.layer.attention(seen_TN, step, kv[self.target.config.num_layers])
        x_LD, a_LD = batch.where_logits(x_TD), batch.where_logits(a_TD)
        x_LD, h_LD = self.layer.mlp_norm.add(x_LD, a_LD)
        return self.ops.add(x_LD, self.layer.mlp(h_LD))


class Eagle3Head(EagleHead):
    """It sees three layers of the target and drafts from a vocabulary of its own."""

    def __init__(
        self,
        target: Decoder,
        layer: EagleLayer,
        join: Weight,
        taps: Sequence[int],
        norms: tuple[Norm, Norm, Norm],
        head: Weight,
        tokens_C: I32 | None,
    ) -> None:
        """join: [D, taps D] of the streams after the target's layers `taps`; norms: of the embedding, of
        the state before it, and the last one; tokens_C: the target's ids of what it can draft, None:
        the same as its own."""
        super().__init__(target, layer, join, None)
        self.embed_norm, self.hidden_norm, self.norm = norms
        self.head, self.columns_V = (head,), None
        if tokens_C is not None:
            self.columns_V = np.full(target.config.vocab_size, -1, np.int32)
            self.columns_V[tokens_C] = np.arange(len(tokens_C))
        target.taps = tuple(taps)

    def features(self, hidden_TD: F32) -> F32:
        tapped_TN = self.ops.columns(hidden_TD, self.head_dim, hidden_TD.shape[1])
        return self.ops.linear(tapped_TN, self.join)

    def draft(
        self, batch: ForwardBatch, before_TD: F32, kv: Sequence[LayerCache], head: int = 0
    ) -> F32:
        embedded_TD = self.embed_norm(self.target.embedded(batch))
        both_TN = self.ops.concat(embedded_TD, self.hidden_norm(before_TD))
        return self._through(batch, before_TD, both_TN, kv)

    def draft_logits(self, h_LD: F32) -> F32:
        logits_LC = self.ops.linear(self.norm(h_LD), self.head)
        return logits_LC if self.columns_V is None else self.ops.spread(logits_LC, self.columns_V)
