"""The `cpu` provider: calls the C++ kernels (csrc/), with weights and caches by their handles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import get_args

import numpy as np

from elinvar import _cpu
from elinvar.base.config import Activation, Scoring
from elinvar.base.cpus import usable_cpus
from elinvar.base.errors import ElinvarError
from elinvar.ops import handles
from elinvar.ops.api import F32, I32
from elinvar.ops.arguments import Experts, Lora, SampleArgs, SampleResult
from elinvar.ops.caches import KVLayer, StateLayer
from elinvar.ops.host import HostOps
from elinvar.ops.layout import Weight

_ACTIVATIONS: dict[Activation, int] = {a: i for i, a in enumerate(get_args(Activation))}


class CpuOps(HostOps):
    name = "cpu"

    def __init__(self, num_threads: int | None = None, simd: str | None = None) -> None:
        available = _cpu.available()
        if simd is not None and simd not in available:
            raise ElinvarError(
                f"This machine has no instruction set {simd!r}; it has {', '.join(available)}."
            )
        threads = num_threads or usable_cpus()
        try:
            self._provider = _cpu.Provider(threads, simd or "")
        except RuntimeError as error:
            raise ElinvarError(
                f"{threads} threads cannot be started ({error}); ask for fewer with num_threads."
            ) from error

    @property
    def simd(self) -> str:
        return self._provider.simd

    @property
    def num_threads(self) -> int:
        return self._provider.num_threads

    def embed(self, ids_T: I32, w_VD: Weight, scale: float) -> F32:
        return self._provider.embed(ids_T, handles.matrix(w_VD), scale)

    def rms_norm(self, x_TD: F32, gain_D: F32, eps: float) -> F32:
        return self._provider.rms_norm(x_TD, gain_D, eps)

    def add(self, x_TD: F32, y_TD: F32) -> F32:
        return self._provider.add(x_TD, y_TD)

    def concat(self, x_TD: F32, y_TE: F32) -> F32:
        return self._provider.concat(x_TD, y_TE)

    def add_rms_norm(self, x_TD: F32, y_TD: F32, gain_D: F32, eps: float) -> tuple[F32, F32]:
        return self._provider.add_rms_norm(x_TD, y_TD, gain_D, eps)

    def layer_norm(self, x_TD: F32, gain_D: F32, bias_D: F32 | None, eps: float) -> F32:
        return self._provider.layer_norm(x_TD, gain_D, bias_D, eps)

    def add_layer_norm(
        self, x_TD: F32, y_TD: F32, gain_D: F32, bias_D: F32 | None, eps: float
    ) -> tuple[F32, F32]:
        return self._provider.add_layer_norm(x_TD, y_TD, gain_D, bias_D, eps)

    def scale(self, x_TD: F32, factor: float) -> F32:
        return self._provider.scale(x_TD, factor)

    def scale_heads(self, q_THD: F32, positions_T: I32, factors_P: F32) -> F32:
        return self._provider.scale_heads(q_THD, positions_T, factors_P)

    def softcap(self, x_TD: F32, cap: float) -> F32:
        return self._provider.softcap(x_TD, cap)

    def activate(self, x_TD: F32, activation: Activation) -> F32:
        return self._provider.activate(x_TD, _ACTIVATIONS[activation])

    def linear(self, x_TK: F32, weights: Sequence[Weight], bias_N: F32 | None = None) -> F32:
        return self._provider.linear(x_TK, [handles.matrix(w) for w in weights], bias_N)

    def gated_linear(self, x_TK: F32, gate: Weight, up: Weight, activation: Activation) -> F32:
        return self._provider.gated_linear(
            x_TK, handles.matrix(gate), handles.matrix(up), _ACTIVATIONS[activation]
        )

    def gated(self, x_TN: F32, activation: Activation) -> F32:
        return self._provider.gated(x_TN, _ACTIVATIONS[activation])

    def lora(self, y_TN: F32, x_TK: F32, adapters_T: I32, lora: Lora) -> None:
        self._provider.lora(y_TN, x_TK, adapters_T, handles.lora(lora))

    def route(
        self,
        logits_TE: F32,
        k: int,
        scoring: Scoring,
        renormalise: bool,
        scaling: float,
        bias_E: F32 | None = None,
        num_groups: int = 1,
        top_groups: int = 1,
    ) -> tuple[I32, F32]:
        ids, weights = self._provider.route(
            logits_TE,
            k,
            scoring == "sigmoid",
            renormalise,
            scaling,
            bias_E,
            num_groups,
            top_groups,
        )
        return ids, weights

    def moe(
        self,
        x_TD: F32,
        ids_TK: I32,
        weights_TK: F32,
        experts: Experts,
        activation: Activation,
        scale_inputs: bool = False,
    ) -> F32:
        kind = _ACTIVATIONS[activation]
        return self._provider.moe(
            x_TD, ids_TK, weights_TK, handles.experts(experts), kind, scale_inputs
        )

    def rope_write(
        self,
        qkv_TN: F32,
        positions_T: I32,
        rope_PD: F32,
        kv: KVLayer,
        slots_T: I32,
        num_heads: int,
        q_gain_D: F32 | None,
        k_gain_D: F32 | None,
        eps: float,
        v_gain_D: F32 | None = None,
    ) -> F32:
        return self._provider.rope_write(
            qkv_TN,
            positions_T,
            rope_PD,
            handles.cache(kv),
            slots_T,
            num_heads,
            q_gain_D,
            k_gain_D,
            eps,
            v_gain_D,
        )

    def rope_queries(
        self,
        q_TN: F32,
        positions_T: I32,
        rope_PD: F32,
        num_heads: int,
        gain_D: F32,
        eps: float,
    ) -> F32:
        return self._provider.rope_queries(q_TN, positions_T, rope_PD, num_heads, gain_D, eps)

    def mul(self, x_TD: F32, y_TN: F32, start: int = 0) -> F32:
        return self._provider.mul(x_TD, y_TN, start)

    def mix(self, xs_TD: Sequence[F32], coefs_TC: F32) -> F32:
        return self._provider.mix(list(xs_TD), coefs_TC)

    def sparsify(self, x_TN: F32, deviations: float) -> F32:
        return self._provider.sparsify(x_TN, deviations)

    def match_rms(self, x_TD: F32, y_TD: F32) -> F32:
        return self._provider.match_rms(x_TD, y_TD)

    def head_linear(self, x_TK: F32, w: Weight, num_heads: int) -> F32:
        return self._provider.head_linear(x_TK, handles.matrix(w), num_heads)

    def latent_query(
        self, q_TN: F32, w: Weight, positions_T: I32, rope_PD: F32, num_heads: int
    ) -> F32:
        return self._provider.latent_query(q_TN, handles.matrix(w), positions_T, rope_PD, num_heads)

    def latent_write(
        self,
        x_TN: F32,
        positions_T: I32,
        rope_PD: F32,
        kv: KVLayer,
        slots_T: I32,
        gain_R: F32,
        eps: float,
    ) -> None:
        self._provider.latent_write(
            x_TN, positions_T, rope_PD, handles.cache(kv), slots_T, gain_R, eps
        )

    def attention(
        self,
        q_THD: F32,
        kv: KVLayer,
        query_start_loc: I32,
        seq_lens: I32,
        block_table_RB: I32,
        positions_T: I32,
        scale: float,
        window: int | None,
        *,
        softcap: float | None = None,
        sinks_H: F32 | None = None,
        chunk: int | None = None,
        first: int = 0,
    ) -> F32:
        return self._provider.attention(
            q_THD,
            handles.cache(kv),
            query_start_loc,
            block_table_RB,
            positions_T,
            scale,
            window or 0,
            softcap or 0.0,
            sinks_H,
            chunk or 0,
            first,
        )

    def block_shares(
        self,
        q_THD: F32,
        kv: KVLayer,
        query_start_loc: I32,
        block_table_RB: I32,
        positions_T: I32,
        scale: float,
        shares_TB: F32,
        *,
        softcap: float | None = None,
        sinks_H: F32 | None = None,
    ) -> None:
        where = query_start_loc, block_table_RB, positions_T
        switches = softcap or 0.0, sinks_H
        self._provider.block_shares(q_THD, handles.cache(kv), *where, scale, shares_TB, *switches)

    def causal_conv(
        self,
        x_TN: F32,
        w_KC: F32,
        state: StateLayer,
        query_start_loc: I32,
        seq_lens: I32,
        block_table_RB: I32,
    ) -> F32:
        where = query_start_loc, seq_lens, block_table_RB
        return self._provider.causal_conv(x_TN, w_KC, handles.state(state), *where)

    def delta_rule(
        self,
        qkv_TC: F32,
        x_TN: F32,
        a_log_H: F32,
        dt_bias_H: F32,
        state: StateLayer,
        query_start_loc: I32,
        seq_lens: I32,
        block_table_RB: I32,
    ) -> F32:
        where = query_start_loc, seq_lens, block_table_RB
        return self._provider.delta_rule(
            qkv_TC, x_TN, a_log_H, dt_bias_H, handles.state(state), *where
        )

    def gated_rms_norm(self, x_TN: F32, gate_TN: F32, first: int, gain_D: F32, eps: float) -> F32:
        return self._provider.gated_rms_norm(x_TN, gate_TN, first, gain_D, eps)

    def sigmoid_gate(self, x_TN: F32, gate_TN: F32) -> F32:
        return self._provider.sigmoid_gate(x_TN, gate_TN)

    def pool(self, x_TD: F32, starts: I32, weights_T: F32 | None) -> F32:
        if weights_T is None:
            return np.maximum.reduceat(x_TD, starts[:-1])
        return self._provider.pool(x_TD, starts, weights_T)

    def index_select(
        self,
        q_THD: F32,
        weights_TH: F32,
        kv: KVLayer,
        query_start_loc: I32,
        block_table_RB: I32,
        positions_T: I32,
        k: int,
        first: int = 0,
    ) -> I32:
        where = query_start_loc, block_table_RB, positions_T
        return self._provider.index_select(q_THD, weights_TH, handles.cache(kv), *where, k, first)

    def sparse_attention(
        self,
        q_THD: F32,
        kv: KVLayer,
        query_start_loc: I32,
        block_table_RB: I32,
        positions_T: I32,
        chosen_TK: I32,
        scale: float,
    ) -> F32:
        where = query_start_loc, block_table_RB, positions_T
        return self._provider.sparse_attention(q_THD, handles.cache(kv), *where, chosen_TK, scale)

    def record(self, run: Callable[[], F32]) -> Callable[[], F32]:
        self._provider.begin_recording()
        out = None
        try:
            out = run()
        finally:
            replay = self._provider.end_recording(out)
        return replay

    def sample(self, logits_LV: F32, args: SampleArgs) -> SampleResult:
        return SampleResult(
            *self._provider.sample(
                logits_LV,
                args.seeds,
                args.positions,
                args.temperature,
                args.top_k,
                args.top_p,
                args.min_p,
                args.num_logprobs,
                args.typical_p,
                None if args.penalties is None else args.penalties.arrays,
                None if args.biases is None else args.biases.arrays,
                args.masks,
                args.mask_rows,
            )
        )

    def score(self, logits_LV: F32, ids_L: I32, num_logprobs: int) -> SampleResult:
        return SampleResult(ids_L, *self._provider.score(logits_LV, ids_L, num_logprobs))
