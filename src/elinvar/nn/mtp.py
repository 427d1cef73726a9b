"""Heads that predict further tokens from a model's own hidden states (multi-token prediction:
DeepSeek-AI, 2024, section 2.2), for drafts.

The first head makes of h_i, what the model's head saw of token i, and of token i + 1 a hidden state
of token i + 1, from which the model's head predicts token i + 2; the next head takes that and token
i + 2, and so on. What a head writes for a token lies in the token's own slot: it depends on the
tokens up to there alone, as in every other layer, so that blocks may be shared and found by their
content. Before a head's first slot nothing is written, and nothing read (Step.first).

h_i is taken after the model's last norm, and so is what a head hands on after its own. The report does
not say; vLLM and SGLang do so. It decides how many drafts are accepted, and no answer.

Legend: T tokens of this step, D model dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elinvar.base.batch import ForwardBatch
from elinvar.base.config import ModelConfig
from elinvar.nn.decoder import Decoder, Layer
from elinvar.nn.norm import Norm
from elinvar.ops.api import F32, Ops
from elinvar.ops.caches import LayerCache
from elinvar.ops.layout import Weight


@dataclass(frozen=True, slots=True)
class MTPHead:
    embed_norm: Norm
    hidden_norm: Norm
    join: Weight
    """[D, 2 D]: of a token's embedding and the hidden state before it, each normed."""
    layer: Layer
    norm: Norm


class MTPDecoder(Decoder):
    """A decoder and its heads, which share its embedding and its own head. Their caches follow those
    of its layers."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Any],
        ops: Ops,
        layers: Sequence[Layer],
        norm: Norm,
        heads: Sequence[MTPHead],
    ) -> None:
        super().__init__(config, weights, ops, layers, norm)
        self.heads = tuple(heads)
        self.num_heads = self.num_guests = len(self.heads)
        self.head_dim = config.dim

    def draft(
        self, batch: ForwardBatch, before_TD: F32, kv: Sequence[LayerCache], head: int = 0
    ) -> F32:
        """Hidden states [L, D] of `batch.logit_rows`, for `logits` and for the next head.

        before_TD: of each token of the batch the hidden state of the token before it, from
        `hidden` or, for a later head, from the one before. No token may come before position
        head + 1."""
        one, ops, step = self.heads[head], self.ops, self.step(batch, first=head + 1)
        both = one.embed_norm(self.embedded(batch)), one.hidden_norm(before_TD)
        x_TD = ops.linear(ops.concat(*both), (one.join,))
        cache = kv[self.config.num_layers + head]
        _, h_LD = one.layer(x_TD, one.layer.norm(x_TD), step, cache, one.norm, True)
        return h_LD

    def features(self, hidden_TD: F32) -> F32:
        """What the first head sees of `hidden`."""
        return hidden_TD

    def draft_logits(self, h_LD: F32) -> F32:
        return self.logits(h_LD)
