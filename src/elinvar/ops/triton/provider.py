"""The `triton` provider: kernels of this package on torch tensors, on one GPU (docs/design/039).

What enters a matrix product is in the dtype of activations (`dtype`: that of the model's matrices, bf16
where they are quantised); what leaves one, the residual stream and logits are f32. Arrays that a model
holds are known by identity and uploaded once; a step's numbers come by `upload`. Results of sampling
are numpy arrays again, for which nobody waits before they are read (coming.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray

from elinvar.base.batch import ForwardBatch
from elinvar.base.config import Activation, KVDtype, KVSpec, Scoring
from elinvar.ops.api import Progress
from elinvar.ops.arguments import Experts, Lora, SampleArgs, SampleResult
from elinvar.ops.layout import Weight
from elinvar.ops.pages import give_back
from elinvar.ops.triton import (
    attention,
    gather,
    index,
    latent,
    linear,
    lora,
    moe,
    norms,
    recurrent,
    rope,
    route,
    rows,
    sampling,
    shares,
    sparse,
)
from elinvar.ops.triton.caches import KVLayer, StateLayer, kv_layers
from elinvar.ops.triton.coming import Coming
from elinvar.ops.triton.device import (
    INTERPRETER,
    device_name,
    find_device,
    free_memory,
    keep_kernels,
)
from elinvar.ops.triton.recording import Recording, capture
from elinvar.ops.triton.sizes import TAKEN, activations, arriving_bytes, matrix_bytes
from elinvar.ops.triton.tuned import arithmetic, find_table, heads
from elinvar.ops.triton.upload import Constants, LastIds, Upload
from elinvar.ops.triton.weights import Matrices

T = torch.Tensor
_DTYPES: dict[KVDtype, torch.dtype] = {
    **{"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
}


class TritonOps:
    name = "triton"
    stored = TAKEN
    full_batch = 8192
    """So many of a small encoder take longer than their launches."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, cache: Path | None = None) -> None:
        """dtype: of activations, until `prepare` has seen a model. cache: see load_provider."""
        self.device = find_device()
        self.dtype = dtype
        if cache is not None:
            keep_kernels(cache)
        tuned = None if cache is None else find_table(cache, device_name(self.device))
        self.arithmetic = arithmetic(device_name(self.device), tuned)
        self._matrices = Matrices(self.device, dtype, tuned)
        self._tiles = {} if tuned is None else tuned.attention
        self._constant = Constants(self.device)
        self._recording: Recording | None = None
        self._last = LastIds()
        self._pool = None if INTERPRETER else torch.cuda.graph_pool_handle()
        self._expected: WeakSet[Weight] = WeakSet()
        self._arriving = 0
        self._learning = False
        """A step runs whose results nobody wants (`record`)."""

    # ---- where arrays are -------------------------------------------------------------------

    def kv_layers(self, spec: KVSpec, num_blocks: int) -> list[Any]:
        try:
            return list(kv_layers(spec, num_blocks + 1, self.device))
        except torch.OutOfMemoryError as error:
            raise MemoryError(str(error)) from error

    def prepare(self, weights: Mapping[str, Any], beside: bool = False) -> None:
        """Matrices are uploaded at their first use, when it is known which are multiplied by at once."""
        matrices = [w for w in weights.values() if isinstance(w, Weight)]
        self._expected.update(matrices)
        named = [(name, w.kind, w.shape) for name, w in weights.items() if isinstance(w, Weight)]
        arriving = arriving_bytes(named)
        if beside:
            self._arriving = max(self._arriving, arriving)
            return
        self._arriving = arriving
        self.dtype = _dtype(matrices)
        self._matrices.clear(self.dtype)

    def exchange(self, weights: Mapping[str, Any], pairs: Sequence[tuple[Any, Any]] | None) -> bool:
        dtype = _dtype([w for w in weights.values() if isinstance(w, Weight)])
        if pairs is None or dtype != self.dtype:
            self.prepare(weights)
            return False
        experts = [pair for pair in pairs if isinstance(pair[0], Experts)]
        arrays = [pair for pair in pairs if not isinstance(pair[0], Experts)]
        # Both, whatever comes of the first.
        return all([self._matrices.exchange(experts), self._constant.exchange(arrays)])

    def warm_up(
        self, run: Callable[[], object], weights: Iterable[Any], progress: Progress
    ) -> None:
        """A forward binds what is multiplied by at once, and compiles kernels or finds them compiled."""
        total = max(self._expected_bytes, 1)
        self._matrices.told = lambda done: progress(min(done, total), total)
        try:
            run()
        except torch.OutOfMemoryError as error:
            raise MemoryError(str(error)) from error
        finally:
            self._matrices.told = None
        progress(total, total)
        give_back(weights)
        if not INTERPRETER:
            torch.cuda.empty_cache()  # of what matrices were taken apart in

    def release(self, weights: Iterable[Any]) -> None:
        self._matrices.clear(self.dtype)
        self._constant.clear()
        give_back(weights)
        if not INTERPRETER:
            self._pool = torch.cuda.graph_pool_handle()
            torch.cuda.empty_cache()

    def available_memory(self) -> int | None:
        free = free_memory(self.device)
        return None if free is None else max(free - self._expected_bytes - self._arriving, 0)

    @property
    def _expected_bytes(self) -> int:
        return sum(matrix_bytes(w.kind, w.shape) for w in self._expected)

    def upload(self, batch: ForwardBatch) -> ForwardBatch:
        if self._recording is not None:
            return self._recording.upload(batch)
        upload = Upload(batch, self.device, self._last)
        upload.fill()
        return upload.batch

    @property
    def widest_kv(self) -> KVDtype:
        return next(name for name, dtype in _DTYPES.items() if dtype == self.dtype)

    def place(self, array: NDArray[Any]) -> T:
        return torch.tensor(array, device=self.device)

    def fetch(self, x: T) -> NDArray[np.float32]:
        found: NDArray[np.float32] = x.float().cpu().numpy()
        return found

    def columns(self, x_TN: T, start: int, stop: int) -> T:
        return x_TN[:, start:stop].contiguous()

    def stack(self, parts_TD: Sequence[T]) -> T:
        return torch.cat([part.float() for part in parts_TD])

    def download(self, batch: ForwardBatch) -> None:
        if batch.watch is not None:
            batch.watch.shares[:] = self._constant(batch.watch.shares).cpu().numpy()

    def graph_size(self, count: int) -> int:
        """Powers of two to 8, then multiples of 8, from 64 on of 16."""
        if count <= 8:
            return 1 << (count - 1).bit_length()
        step = 8 if count <= 64 else 16
        return -(-count // step) * step

    def record(self, run: Callable[[], T]) -> Callable[[], T]:
        recording = Recording(self.device, self._last)

        def recorded() -> T:
            self._recording, self._constant.used = recording, recording.constants
            try:
                return run()
            finally:
                self._recording = self._constant.used = None

        if not INTERPRETER:
            self._learning = True
            try:
                recorded()  # compiles kernels and binds matrices, which cannot be captured
            finally:
                self._learning = False
            return capture(recording, recorded, self._pool)

        def replay() -> T:
            recording.fill()
            return recorded()

        return replay

    def _input(self, x: T) -> T:
        """As a product takes it: a copy where a family has no norm before."""
        return x.to(self.dtype)

    # ---- rows -------------------------------------------------------------------------------

    def embed(self, ids_T: T, w_VD: Weight, scale: float) -> T:
        return gather.embed(ids_T, self._matrices.one(w_VD), scale, torch.float32)

    def rms_norm(self, x_TD: T, gain_D: Any, eps: float) -> T:
        return norms.rms_norm(x_TD, self._constant(gain_D), eps, self.dtype)

    def add(self, x_TD: T, y_TD: T) -> T:
        return rows.add(x_TD, y_TD)

    def concat(self, x_TD: T, y_TE: T) -> T:
        return torch.cat([x_TD, y_TE], 1)

    def add_rms_norm(self, x_TD: T, y_TD: T, gain_D: Any, eps: float) -> tuple[T, T]:
        return norms.add_rms_norm(x_TD, y_TD, self._constant(gain_D), eps, self.dtype)

    def layer_norm(self, x_TD: T, gain_D: Any, bias_D: Any, eps: float) -> T:
        gains = self._constant(gain_D), self._constant(bias_D)
        return norms.layer_norm(x_TD, *gains, eps, self.dtype)

    def add_layer_norm(self, x_TD: T, y_TD: T, gain_D: Any, bias_D: Any, eps: float) -> tuple[T, T]:
        gains = self._constant(gain_D), self._constant(bias_D)
        return norms.add_layer_norm(x_TD, y_TD, *gains, eps, self.dtype)

    def scale(self, x_TD: T, factor: float) -> T:
        return rows.scale(x_TD, factor)

    def scale_heads(self, q_THD: T, positions_T: T, factors_P: Any) -> T:
        return rows.scale_heads(q_THD, positions_T, self._constant(factors_P))

    def softcap(self, x_TD: T, cap: float) -> T:
        return rows.softcap(x_TD, cap)

    def activate(self, x_TD: T, activation: Activation) -> T:
        return rows.activate(x_TD, activation, self.dtype)

    def gated(self, x_TN: T, activation: Activation) -> T:
        return rows.gated(x_TN, activation, self.dtype)

    def mul(self, x_TD: T, y_TN: Any, start: int = 0) -> T:
        return rows.mul(x_TD, self._constant(y_TN), start)

    def mix(self, xs_TD: Sequence[T], coefs_TC: T) -> T:
        return rows.mix(xs_TD, coefs_TC)

    def sparsify(self, x_TN: T, deviations: float) -> T:
        return norms.sparsify(x_TN, deviations)

    def match_rms(self, x_TD: T, y_TD: T) -> T:
        return norms.match_rms(x_TD, y_TD)

    def gated_rms_norm(self, x_TN: T, gate_TN: T, first: int, gain_D: Any, eps: float) -> T:
        gain = self._constant(gain_D)
        return norms.gated_rms_norm(x_TN, gate_TN, first, gain, eps, self.dtype)

    def sigmoid_gate(self, x_TN: T, gate_TN: T) -> T:
        return rows.sigmoid_gate(x_TN, gate_TN, self.dtype)

    def pool(self, x_TD: T, starts: Any, weights_T: Any) -> T:
        return rows.pool(x_TD, self._constant(starts), self._constant(weights_T))

    def spread(self, x_LC: T, columns_V: Any) -> T:
        return rows.spread(x_LC, self._constant(columns_V))

    # ---- products ---------------------------------------------------------------------------

    def linear(self, x_TK: T, weights: Sequence[Weight], bias_N: Any = None) -> T:
        found = self._matrices.joined(tuple(weights))
        return linear.linear(self._input(x_TK), found, self._constant(bias_N), torch.float32)

    def gated_linear(self, x_TK: T, gate: Weight, up: Weight, activation: Activation) -> T:
        found = self._matrices.joined((gate, up))
        if len(found) > 1:
            return self.gated(self.linear(x_TK, (gate, up)), activation)
        return linear.gated_linear(self._input(x_TK), found[0], activation)

    def head_linear(self, x_TK: T, w: Weight, num_heads: int) -> T:
        return linear.head_linear(self._input(x_TK), self._matrices.one(w), num_heads)

    def lora(self, y_TN: T, x_TK: T, adapters_T: T, lora_: Lora) -> None:
        for part in self._matrices.lora(lora_):
            lora.lora(y_TN, self._input(x_TK), adapters_T, part)

    def route(
        self,
        logits_TE: T,
        k: int,
        scoring: Scoring,
        renormalise: bool,
        scaling: float,
        bias_E: Any = None,
        num_groups: int = 1,
        top_groups: int = 1,
    ) -> tuple[T, T]:
        how = k, scoring, renormalise, scaling, self._constant(bias_E), num_groups, top_groups
        return route.route(logits_TE, *how)

    def moe(
        self,
        x_TD: T,
        ids_TK: T,
        weights_TK: T,
        experts: Experts,
        activation: Activation,
        scale_inputs: bool = False,
    ) -> T:
        found = self._matrices.experts(experts)
        routed = ids_TK, weights_TK, found, activation, scale_inputs
        return moe.moe(self._input(x_TD), *routed)

    # ---- keys and values --------------------------------------------------------------------

    def rope_write(
        self,
        qkv_TN: T,
        positions_T: T,
        rope_PD: Any,
        kv: KVLayer,
        slots_T: T,
        num_heads: int,
        q_gain_D: Any,
        k_gain_D: Any,
        eps: float,
        v_gain_D: Any = None,
    ) -> T:
        q_gain, k_gain, v_gain = map(self._constant, (q_gain_D, k_gain_D, v_gain_D))
        table = self._table(rope_PD)
        where = positions_T, table, kv, slots_T, num_heads
        return rope.rope_write(qkv_TN, *where, q_gain, k_gain, eps, v_gain, self.dtype)

    def rope_queries(
        self, q_TN: T, positions_T: T, rope_PD: Any, num_heads: int, gain_D: Any, eps: float
    ) -> T:
        table, gain = self._table(rope_PD), self._constant(gain_D)
        return rope.rope_queries(q_TN, positions_T, table, num_heads, gain, eps, self.dtype)

    def _table(self, rope_PD: Any) -> T:
        """One without columns, which is made anew at each call, is not looked for."""
        return (
            self._constant(rope_PD) if rope_PD.shape[1] else torch.empty(0, 0, device=self.device)
        )

    def latent_query(self, q_TN: T, w: Weight, positions_T: T, rope_PD: Any, num_heads: int) -> T:
        q = self._input(q_TN)
        multiplied = q.view(len(q), num_heads, -1)[..., : w.shape[1]].flatten(1)
        products = self.head_linear(multiplied, w, num_heads)
        return latent.latent_query(q, products, positions_T, self._constant(rope_PD), num_heads)

    def latent_write(
        self,
        x_TN: T,
        positions_T: T,
        rope_PD: Any,
        kv: KVLayer,
        slots_T: T,
        gain_R: Any,
        eps: float,
    ) -> None:
        table, gain = self._constant(rope_PD), self._constant(gain_R)
        latent.latent_write(x_TN, positions_T, table, kv, slots_T, gain, eps)

    def attention(
        self,
        q_THD: T,
        kv: KVLayer,
        query_start_loc: T,
        seq_lens: T,
        block_table_RB: T,
        positions_T: T,
        scale: float,
        window: int | None,
        *,
        softcap: float | None = None,
        sinks_H: Any = None,
        chunk: int | None = None,
        first: int = 0,
    ) -> T:
        where = query_start_loc, block_table_RB, positions_T
        if kv.keys_alone:
            return latent.latent_attention(q_THD, kv, *where, scale, first).flatten(1)
        dtype = attention.product_dtype(q_THD.dtype, kv.dtype)
        out = attention.attention(
            q_THD,
            kv,
            *where,
            scale,
            window,
            softcap=softcap,
            sinks_H=self._constant(sinks_H),
            chunk=chunk,
            first=first,
            tile=self._tiles.get(heads(dtype, kv.dtype, q_THD.shape[2])),
        )
        return out.flatten(1)

    def block_shares(
        self,
        q_THD: T,
        kv: KVLayer,
        query_start_loc: T,
        block_table_RB: T,
        positions_T: T,
        scale: float,
        shares_TB: Any,
        *,
        softcap: float | None = None,
        sinks_H: Any = None,
    ) -> None:
        """Shares are an array of the host, whose twin all layers raise until `download`."""
        where, shares_T = (query_start_loc, block_table_RB, positions_T), self._constant(shares_TB)
        sinks = self._constant(sinks_H)
        shares.block_shares(q_THD, kv, *where, scale, shares_T, softcap=softcap, sinks_H=sinks)

    def index_select(
        self,
        q_THD: T,
        weights_TH: T,
        kv: KVLayer,
        query_start_loc: T,
        block_table_RB: T,
        positions_T: T,
        k: int,
        first: int = 0,
    ) -> T:
        where = query_start_loc, block_table_RB, positions_T
        return index.index_select(q_THD, weights_TH, kv, *where, k, first)

    def sparse_attention(
        self,
        q_THD: T,
        kv: KVLayer,
        query_start_loc: T,
        block_table_RB: T,
        positions_T: T,
        chosen_TK: T,
        scale: float,
    ) -> T:
        tables = query_start_loc, block_table_RB
        return sparse.sparse_attention(q_THD, kv, *tables, chosen_TK, scale).flatten(1)

    # ---- recurrent states -------------------------------------------------------------------

    def causal_conv(
        self,
        x_TN: T,
        w_KC: Any,
        state: StateLayer,
        query_start_loc: T,
        seq_lens: T,
        block_table_RB: T,
    ) -> T:
        where = query_start_loc, seq_lens, self._states(state, block_table_RB)
        return recurrent.causal_conv(x_TN, self._constant(w_KC), state, *where)

    def delta_rule(
        self,
        qkv_TC: T,
        x_TN: T,
        a_log_H: Any,
        dt_bias_H: Any,
        state: StateLayer,
        query_start_loc: T,
        seq_lens: T,
        block_table_RB: T,
    ) -> T:
        gates = self._constant(a_log_H), self._constant(dt_bias_H)
        where = query_start_loc, seq_lens, self._states(state, block_table_RB)
        return recurrent.delta_rule(qkv_TC, x_TN, *gates, state, *where)

    def _states(self, state: StateLayer, block_table_RB: T) -> T:
        """In which blocks: of a step that runs only to be learnt the one that nobody reads. The step
        itself is yet to come, and goes on from states as they are."""
        if not self._learning:
            return block_table_RB
        return torch.full_like(block_table_RB, len(state.states) - 1)

    # ---- sampling ---------------------------------------------------------------------------

    def sample(self, logits_LV: T, args: SampleArgs) -> SampleResult:
        return self.sample_ahead(logits_LV, args).result()

    def sample_ahead(self, logits_LV: T, args: SampleArgs) -> Coming:
        found = sampling.sample(logits_LV, args)
        self._last.ids = found.ids
        return Coming(found)

    def score(self, logits_LV: T, ids_L: Any, num_logprobs: int) -> SampleResult:
        ids = torch.tensor(ids_L, dtype=torch.int32, device=self.device)
        return Coming(sampling.score(logits_LV, ids, num_logprobs)).result()


def _dtype(matrices: Sequence[Weight]) -> torch.dtype:
    """Of activations: that of most bytes of the matrices, bf16 where they are quantised."""
    return _DTYPES[activations((w.kind, w.nbytes) for w in matrices)]
