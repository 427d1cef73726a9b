"""The frame that decoder-only models share: embedding, layers over a residual stream, head.

A layer gets the stream x and its norm h, and returns both for the layer after it, so that a sum and
the norm that follows are one op.

Legend: T tokens of this step, D model dim, P positions, L rows that need logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

import numpy as np

from elinvar.base.batch import ForwardBatch
from elinvar.base.config import KVDtype, KVSpec, ModelConfig
from elinvar.nn.attention import Step, kv_specs
from elinvar.nn.norm import Norm
from elinvar.nn.rope import RopeTable
from elinvar.nn.temperature import TemperatureTable
from elinvar.ops.api import F32, Ops
from elinvar.ops.caches import LayerCache

ByLayer = Generator[None, None, F32]
"""A forward that pauses after each layer but the last."""


def to_the_end(forward: ByLayer) -> F32:
    """What a forward returns that nobody else has to wait for."""
    while True:
        try:
            next(forward)
        except StopIteration as end:
            return cast("F32", end.value)


class Attends(Protocol):
    def __call__(self, h_TD: F32, step: Step, kv: Any, /) -> F32: ...


class Feeds(Protocol):
    def __call__(self, x_TD: F32, /) -> F32: ...


class Layer(Protocol):
    norm: Norm
    """Of its input."""

    def __call__(
        self, x_TD: F32, h_TD: F32, step: Step, kv: Any, next_norm: Norm, last: bool
    ) -> tuple[F32, F32]:
        """(the stream, its norm by `next_norm`). After the last layer's attention only rows that
        need logits go on."""
        ...


class Block:
    """Attention, then MLP, each added to the stream: x += post(part(norm(x))), and a post is a norm
    or a scale, or nothing."""

    def __init__(
        self,
        norm: Norm,
        attention: Attends,
        mlp_norm: Norm,
        mlp: Feeds,
        attn_post: Feeds | None = None,
        mlp_post: Feeds | None = None,
    ) -> None:
        self.norm, self.attention, self.attn_post = norm, attention, attn_post
        self.mlp_norm, self.mlp, self.mlp_post = mlp_norm, mlp, mlp_post

    def __call__(
        self, x_TD: F32, h_TD: F32, step: Step, kv: Any, next_norm: Norm, last: bool
    ) -> tuple[F32, F32]:
        a_TD = self.attention(h_TD, step, kv)
        if self.attn_post is not None:
            a_TD = self.attn_post(a_TD)
        if last:
            x_TD, a_TD = step.batch.where_logits(x_TD), step.batch.where_logits(a_TD)
        x_TD, h_TD = self.mlp_norm.add(x_TD, a_TD)
        m_TD = self.mlp(h_TD)
        if self.mlp_post is not None:
            m_TD = self.mlp_post(m_TD)
        return next_norm.add(x_TD, m_TD)


class ParallelBlock:
    """Attention and MLP side by side: x += attention(norm(x)) + mlp(mlp_norm(x)), where without an
    mlp_norm both see the one norm."""

    def __init__(
        self, norm: Norm, attention: Attends, mlp_norm: Norm | None, mlp: Feeds, ops: Ops
    ) -> None:
        self.norm, self.attention = norm, attention
        self.mlp_norm, self.mlp, self.ops = mlp_norm, mlp, ops

    def __call__(
        self, x_TD: F32, h_TD: F32, step: Step, kv: Any, next_norm: Norm, last: bool
    ) -> tuple[F32, F32]:
        a_TD = self.attention(h_TD, step, kv)
        if last:
            x_TD, h_TD, a_TD = (step.batch.where_logits(each) for each in (x_TD, h_TD, a_TD))
        m_TD = self.mlp(h_TD if self.mlp_norm is None else self.mlp_norm(x_TD))
        return next_norm.add(x_TD, self.ops.add(a_TD, m_TD))


class Decoder:
    """forward(): token ids to logits. Weights are bound once, context is an argument."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Any],
        ops: Ops,
        layers: Sequence[Layer],
        norm: Norm,
    ) -> None:
        """norm: the last one, before the head."""
        self.config, self.ops = config, ops
        self.weights: Mapping[str, Any] = dict(weights)
        """By their canonical names."""
        self.ropes = {kind: RopeTable(config.rope[kind]) for kind in config.rope}
        self.temperatures = {kind: TemperatureTable(c) for kind, c in config.temperature.items()}
        self.embed = weights["embed"]
        self.head = (weights["embed" if config.tied_head else "head"],)
        self.head_bias = weights.get("head_bias")
        self.layers = layers
        self.next_norms = [*(layer.norm for layer in layers[1:]), norm]
        self.taps: Sequence[int] = ()
        """Layers whose results somebody wants to see of all tokens."""
        self.num_guests = 0
        """Layers of heads for drafts, whose caches follow those of its own: they see all keys, so they
        are of the first group."""

    def kv_specs(self, kv_dtype: KVDtype) -> tuple[KVSpec, ...]:
        first, *others = kv_specs(self.config, kv_dtype)
        count = self.config.num_layers
        guests = tuple(range(count, count + self.num_guests))
        return replace(first, layers=(*first.layers, *guests)), *others

    def forward(self, batch: ForwardBatch, kv: Sequence[LayerCache]) -> F32:
        """Computes the batch's tokens, writes their keys and values to `kv` (one a layer), and
        returns the logits [L, V] of `batch.logit_rows`."""
        return self.logits(self.hidden(batch, kv))

    def hidden(
        self, batch: ForwardBatch, kv: Sequence[LayerCache], all_tokens: bool = False
    ) -> F32:
        """`forward` up to the last norm -> [L, D], or [T, D] of all tokens, beside them the stream
        after each layer of `taps` -> [T, D + taps D]."""
        return to_the_end(self.hidden_by_layer(batch, kv, all_tokens))

    def hidden_by_layer(
        self, batch: ForwardBatch, kv: Sequence[LayerCache], all_tokens: bool = False
    ) -> ByLayer:
        """`hidden` that pauses between layers: each `next` computes one. Other forwards may run
        meanwhile; the bits are the same."""
        return self._through(self.layers, batch, kv, all_tokens)

    def hidden_early(self, batch: ForwardBatch, kv: Sequence[LayerCache], num_layers: int) -> F32:
        """What the head would get [L, D] if the model ended after so many layers."""
        return to_the_end(self._through(self.layers[:num_layers], batch, kv, False))

    def _through(
        self,
        layers: Sequence[Layer],
        batch: ForwardBatch,
        kv: Sequence[LayerCache],
        all_tokens: bool,
    ) -> ByLayer:
        step = self.step(batch)
        x_TD = self.embedded(batch)
        h_TD = layers[0].norm(x_TD)
        norms = [*self.next_norms[: len(layers) - 1], self.next_norms[-1]]
        tapped = {}
        for i, (layer, cache, next_norm) in enumerate(zip(layers, kv, norms, strict=False)):
            last = layer is layers[-1]
            x_TD, h_TD = layer(x_TD, h_TD, step, cache, next_norm, last and not all_tokens)
            if all_tokens and i in self.taps:
                tapped[i] = x_TD
            if not last:
                yield
        for i in self.taps if all_tokens else ():
            h_TD = self.ops.concat(h_TD, tapped[i])
        return h_TD

    def step(self, batch: ForwardBatch, first: int = 0) -> Step:
        rope = {kind: table.upto(batch.num_positions) for kind, table in self.ropes.items()}
        factors = {k: table.upto(batch.num_positions) for k, table in self.temperatures.items()}
        return Step(batch, rope, temperature=factors, first=first)

    def embedded(self, batch: ForwardBatch) -> F32:
        return self.ops.embed(batch.input_ids, self.embed, self.config.embed_scale)

    def logits(self, h_LD: F32) -> F32:
        """The head, of rows of `hidden`; what taps put beside them is not seen."""
        if h_LD.shape[1] > self.config.dim:
            h_LD = np.ascontiguousarray(h_LD[:, : self.config.dim])
        logits_LV = self.ops.linear(h_LD, self.head, self.head_bias)
        cap = self.config.final_softcap
        return logits_LV if cap is None else self.ops.softcap(logits_LV, cap)
