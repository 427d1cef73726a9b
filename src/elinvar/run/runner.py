"""Runner: executes a StepPlan. One forward over a flat batch, sampling included.

Owns the row state and the KV arrays. It decides nothing: which tokens, which blocks and which
rows sample is all in the plan. Serving, warm-up and profiling go through `execute`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from elinvar.base.batch import I32, ForwardBatch
from elinvar.base.config import KVSpec
from elinvar.base.plan import PlanItem, StepOutput, StepPlan, TokenLogprobs, Wave
from elinvar.models.family import Model
from elinvar.ops.adapted import AdaptedOps
from elinvar.ops.api import F32, Ops
from elinvar.ops.arguments import SampleResult
from elinvar.ops.caches import LayerCache
from elinvar.run.graphs import Graphs
from elinvar.run.rows import Rows
from elinvar.run.waves import Waves


class Below(Protocol):
    """Memory for contents of blocks, by key. A block moves as one piece of bytes."""

    def put(self, key: bytes, data: memoryview) -> bool: ...

    def get(self, key: bytes, into: memoryview) -> bool: ...


class Runner:
    """The model, its KV arrays (`num_blocks` blocks per group of `specs`) and the rows."""

    def __init__(
        self,
        model: Model,
        ops: Ops,
        specs: Sequence[KVSpec],
        num_blocks: Sequence[int],
        max_rows: int,
        max_context: int,
        adapted: AdaptedOps | None = None,
        below: Below | None = None,
    ) -> None:
        """adapted: see run.graphs. below: needed where plans save and load."""
        self._below = below
        self.ops, self._adapted = ops, adapted
        self.rows = Rows(max_rows, max_context, specs)
        layers: dict[int, LayerCache] = {}
        self._blocks: list[NDArray[np.uint8]] = []
        """Per group [B, bytes]."""
        for spec, count in zip(specs, num_blocks, strict=True):
            caches = ops.kv_layers(spec, count)
            self._blocks.append(caches[0].blocks)
            layers |= zip(spec.layers, caches, strict=True)
        self.kv: list[LayerCache] = [layers[i] for i in range(len(layers))]
        self.use(model)

    def use(self, model: Model) -> None:
        """Compute with this model, whose cache is the same, from the next step on."""
        self.model = model
        self.graphs = Graphs(model, self.ops, self.kv, self._adapted)
        self._waves = Waves(model, self.kv, self._adapted)
        self._samples: tuple[list[int], I32]
        """Of the wave that is underway: which rows sample, and the index that each token will have."""

    def execute(self, plan: StepPlan) -> StepOutput:
        """Compute the planned spans and sample where a span ends at the last known token.

        Sampled ids are also written back to their rows, where the next step finds them.
        """
        lost, moving_s = self._move(plan)
        for started in plan.started:
            self.rows.start(started)
        output = StepOutput([], [], lost, moving_s)
        if plan.items:
            self.rows.append_blocks(plan.items)
            batch, rows_L, position_L = self.rows.gather(plan.items)
            self._sample(plan.items, self.graphs.forward(batch), rows_L, position_L, output)
        if plan.wave is not None:
            self._go_on(plan.wave, output)
        return output

    def _go_on(self, wave: Wave, output: StepOutput) -> None:
        """Take the wave further, beside what decodes, whose logits nobody needs any more."""
        began = time.perf_counter()
        if wave.first == 0:
            self.rows.append_blocks(wave.items)
            batch, rows_L, position_L = self.rows.gather(wave.items)
            self._samples = rows_L, position_L
            self._waves.begin(batch if isinstance(batch, ForwardBatch) else batch.flat())
        gathered = time.perf_counter()
        logits_LV, output.layer_s = self._waves.go_on(wave.end - wave.first)
        output.layer_s[0] += gathered - began
        if logits_LV is not None:
            self._sample(wave.items, logits_LV, *self._samples, output)

    def _sample(
        self,
        items: Sequence[PlanItem],
        logits_LV: F32,
        rows_L: list[int],
        position_L: I32,
        output: StepOutput,
    ) -> None:
        """Append what `items` sample to the output."""
        rows = self.rows
        sampled: list[list[int]] = [[] for _ in items]
        logprobs: list[list[TokenLogprobs]] = [[] for _ in items]
        output.sampled += sampled
        output.logprobs += logprobs
        if not rows_L:
            return
        result = self.ops.sample(logits_LV, rows.sample_args(rows_L, position_L))
        sampling = [i for i, item in enumerate(items) if item.sample]
        for at, (i, token) in enumerate(zip(sampling, result.ids.tolist(), strict=True)):
            item = items[i]
            sampled[i].append(token)
            rows.token_ids[item.row, item.start + item.num_tokens] = token
            asked = rows.num_logprobs[item.row]
            if asked is not None:
                logprobs[i].append(_token_logprobs(result, at, asked))

    def _move(self, plan: StepPlan) -> tuple[list[bytes], float]:
        """Save, copy and load blocks. Returns keys that were not to be had, and the seconds that
        moves from and to the memory below took."""
        began = time.monotonic()
        below = self._below
        for move in plan.saves:
            assert below is not None
            below.put(move.key, memoryview(self._blocks[move.group][move.block]))
        saved = time.monotonic()
        for copy in plan.copies:
            blocks = self._blocks[copy.group]
            blocks[copy.target] = blocks[copy.source]
        copied = time.monotonic()
        lost = [
            move.key
            for move in plan.loads
            if below is None
            or not below.get(move.key, memoryview(self._blocks[move.group][move.block]))
        ]
        return lost, saved - began + time.monotonic() - copied


def _token_logprobs(result: SampleResult, at: int, num_top: int) -> TokenLogprobs:
    ids = result.top_ids[at, :num_top].tolist()
    values = result.top_logprobs[at, :num_top].tolist()
    return TokenLogprobs(float(result.logprobs[at]), list(zip(ids, values, strict=True)))
