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

from elinvar.base.batch import ForwardBatch
from elinvar.base.config import KVSpec
from elinvar.base.plan import StepOutput, StepPlan, TokenLogprobs
from elinvar.models.family import Model
from elinvar.ops.adapted import AdaptedOps
from elinvar.ops.api import Ops
from elinvar.ops.caches import LayerCache
from elinvar.run.grammar import Masks
from elinvar.run.graphs import Graphs
from elinvar.run.rows import Rows
from elinvar.run.score import prompt_spans, score_prompts, token_logprobs
from elinvar.run.thinking import ThinkingRows


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
        masks: Masks | None = None,
    ) -> None:
        """adapted: see run.graphs. below: needed where plans save and load. masks: where requests may
        have grammars."""
        self._below, self._masks = below, masks
        self.ops, self._adapted = ops, adapted
        self.rows = Rows(max_rows, max_context, specs)
        self._thinking = ThinkingRows()
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

    def execute(self, plan: StepPlan) -> StepOutput:
        """Compute the planned spans and sample where a span ends at the last known token.

        Sampled ids are also written back to their rows, where the next step finds them.
        """
        rows, items = self.rows, plan.items
        lost, moving_s = self._move(plan)
        self._start(plan)
        sampled: list[list[int]] = [[] for _ in items]
        logprobs: list[list[TokenLogprobs]] = [[] for _ in items]
        if not items:
            return StepOutput(sampled, logprobs, lost=lost, moving_s=moving_s)
        rows.append_blocks(items)
        batch, rows_L, position_L = rows.gather(items)
        output = StepOutput(sampled, logprobs, lost=lost, moving_s=moving_s)
        masks = None
        if self._masks is not None:
            masks = self._masks.begin(rows_L, position_L, rows.token_ids)
        spans = prompt_spans(items, rows.scored) if rows.scored else []
        if spans:
            assert isinstance(batch, ForwardBatch)
            scores = score_prompts(self.graphs, batch, spans, rows.token_ids)
            logits_LV, output.prompt_logprobs = scores
        else:
            logits_LV = self.graphs.forward(batch)
        output.kept = rows.choose(items, batch)
        if not rows_L:
            return output
        args = rows.sample_args(rows_L, position_L)
        failed: dict[int, str] = {}
        if masks is not None:
            ready = masks.result()
            failed = ready.failed
            args.add_masks(ready.masks, ready.mask_rows)
        self._thinking.limit(args, rows_L, position_L, rows.token_ids, logits_LV.shape[1])
        result = self.ops.sample(logits_LV, args)
        sampling = [i for i, item in enumerate(items) if item.sample]
        for at, (i, token) in enumerate(zip(sampling, result.ids.tolist(), strict=True)):
            item = items[i]
            if at in failed:
                continue
            sampled[i] = [token]
            rows.token_ids[item.row, item.start + item.num_tokens] = token
            asked = rows.num_logprobs[item.row]
            if asked is not None:
                logprobs[i] = [token_logprobs(result, at, asked)]
        output.failed = {items[sampling[at]].request_id: why for at, why in failed.items()}
        return output

    def close(self) -> None:
        if self._masks is not None:
            self._masks.close()

    def _start(self, plan: StepPlan) -> None:
        self.rows.release(plan.released_rows)
        for started in plan.started:
            self.rows.start(started)
            self._thinking.start(started)
        if self._masks is not None:
            for row in plan.released_rows:
                self._masks.release(row)
            for started in plan.started:
                self._masks.start(started)

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
