"""Runner: executes a StepPlan. One forward over a flat batch, sampling included.

Owns the row state and the KV arrays. It decides nothing: which tokens, which blocks and which
rows sample is all in the plan. Serving, warm-up and profiling go through `begin`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np

from elinvar.base.batch import I32, DecodeBatch, ForwardBatch
from elinvar.base.config import BLOCK_SIZE, KVSpec
from elinvar.base.plan import BlockMove, PlanItem, StepOutput, StepPlan, TokenLogprobs, Wave
from elinvar.models.family import Model
from elinvar.ops.adapted import AdaptedOps
from elinvar.ops.api import F32, Coming, Ops, Progress
from elinvar.ops.arguments import SampleArgs, SampleResult
from elinvar.ops.caches import Blocks, LayerCache
from elinvar.run.ahead import Ahead, Begun
from elinvar.run.drafters.api import Drafter
from elinvar.run.grammar import Masks, Ready
from elinvar.run.graphs import Graphs
from elinvar.run.rows import Rows
from elinvar.run.score import Span, prompt_spans, score_prompts, scored_rows, token_logprobs
from elinvar.run.speculation import Speculator
from elinvar.run.thinking import ThinkingRows
from elinvar.run.waves import Waves


class Below(Protocol):
    """Memory for contents of blocks, by key. A block moves as one piece of bytes."""

    def put(self, key: bytes, data: memoryview) -> bool: ...

    def get(self, key: bytes, into: memoryview) -> bool: ...


@dataclass(slots=True)
class _Job:
    """Spans that are computed in one forward."""

    items: Sequence[PlanItem]
    batch: ForwardBatch | DecodeBatch
    rows: list[int]
    """That sample."""
    positions: I32
    """The index that each sampled token will have."""
    spans: Sequence[Span]
    """Of prompts whose log-probs are asked for."""
    shows_all: bool
    """Its states of all tokens are computed, for a drafter, whoever is still there to read them when the
    forward has ended."""

    @property
    def shown(self) -> float:
        """The share of its tokens that go through the last layer for a drafter alone."""
        if not self.shows_all or isinstance(self.batch, DecodeBatch):
            return 0.0
        return 1 - len(self.batch.logit_rows) / self.batch.num_tokens

    @property
    def forward(self) -> ForwardBatch:
        """The batch with all rows of which something is asked."""
        batch = self.batch if isinstance(self.batch, ForwardBatch) else self.batch.flat()
        return replace(batch, logit_rows=scored_rows(batch, self.spans)) if self.spans else batch


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
        drafters: Callable[[Runner], Sequence[Drafter]] = lambda runner: (),
    ) -> None:
        """adapted: see run.graphs. below: needed where plans save and load. masks: where requests may
        have grammars. drafters: makes them, over the rows, the model and the caches that are here."""
        self._below, self.masks = below, masks
        self.ops, self.adapted = ops, adapted
        self.rows = Rows(max_rows, max_context, specs)
        self._thinking = ThinkingRows()
        self._ahead = Ahead(ops, self.rows)
        self._specs, self.spare = tuple(specs), tuple(num_blocks)
        """spare: as in run.graphs."""
        self._make_drafters = drafters
        self.speculator = Speculator(self.rows, masks, (), 0)
        self.model = model
        self.graphs = Graphs(model, ops, (), adapted, self.spare)
        self.wake()

    @property
    def kv_bytes(self) -> int:
        """Of the caches."""
        return sum(blocks.nbytes for blocks in self._blocks)

    def wake(self) -> None:
        """Make the caches, which hold nothing yet. Raises MemoryError."""
        layers: dict[int, LayerCache] = {}
        blocks: list[Blocks] = []
        for spec, count in zip(self._specs, self.spare, strict=True):
            caches = self.ops.kv_layers(spec, count)
            blocks.append(caches[0].blocks)
            layers |= zip(spec.layers, caches, strict=True)
        self._blocks = blocks
        """Per group."""
        self.kv: list[LayerCache] = [layers[i] for i in range(len(layers))]
        self.use(self.model)

    def warm_up(self, progress: Progress | None = None) -> None:
        """Have what steps need where the ops run, before anybody waits for it. Raises MemoryError."""
        told = progress or (lambda done, total: None)
        self.ops.warm_up(self._try, self.model.weights.values(), told)

    def _try(self) -> None:
        """A step of one token, in the blocks that nobody reads."""
        slots = [[block * BLOCK_SIZE] for block in self.spare]
        tables = tuple(np.array([[block]], np.int32) for block in self.spare)
        batch = DecodeBatch(np.array([[0], [0], [1], *slots], np.int32), tables).flat()
        logits_LV = self.graphs.head(batch, self.graphs.hidden(batch))
        zero = np.zeros(1, np.float32)
        greedy = zero, np.zeros(1, np.int32), zero + 1, zero
        args = SampleArgs(np.zeros(1, np.uint64), batch.positions + 1, *greedy, None)
        self.ops.sample(logits_LV, args)

    def sleep(self) -> None:
        """Let go of the caches and of all that points to them; until `wake` nothing is computed."""
        self.speculator.close()
        self._blocks, self.kv = [], []
        self._bind(())

    def use(self, model: Model, recorded: bool = False) -> None:
        """Compute with this model, whose cache is the same, from the next step on. recorded: what was
        recorded of the one before computes with this one's weights."""
        self.speculator.close()
        self.model = self.graphs.model = model
        graphs = self.graphs if recorded and self.kv else None
        self._bind(self._make_drafters(self) if self.kv else (), graphs)

    def _bind(self, drafters: Sequence[Drafter], graphs: Graphs | None = None) -> None:
        self.graphs = graphs or Graphs(self.model, self.ops, self.kv, self.adapted, self.spare)
        self._waves = Waves(self.model, self.ops, self.kv, self.adapted)
        self._wave: _Job | None = None
        """What is underway."""
        size = self.model.config.vocab_size
        self.speculator = Speculator(self.rows, self.masks, drafters, size)

    def begin(self, plan: StepPlan) -> Begun:
        """Compute the planned spans and sample where a span ends at the last known token. A provider that
        computes by itself may be left alone with that, and be waited for by `finish`.

        Sampled ids are also written back to their rows, where the next step finds them.
        """
        lost, moving_s = self._move(plan)
        self._start(plan)
        output = StepOutput([], [], lost=lost, moving_s=moving_s)
        if plan.items:
            self.rows.append_blocks(plan.items)
            began = time.perf_counter()
            items = plan.items if plan.is_ahead else self.speculator.draft(plan.items)
            job = self._gather(items)
            if plan.wave is None and self._may_leave(job):
                logits_LV = self.graphs.forward(job.batch)
                coming = self._ahead.sample(logits_LV, job.rows, job.positions)
                return Begun(partial(self._finish, plan, job, coming, output, began), is_open=True)
            self._compute(job, output)
            self.speculator.book(items, output, time.perf_counter() - began)
        if plan.wave is not None:
            self._go_on(plan.wave, output)
        return Begun(lambda: output)

    def goes_on(self, plan: StepPlan) -> bool:
        """Whether a plan ahead is worth more, behind this one that was left open, than waiting for its
        tokens and drafting what follows them."""
        self._ahead.enter()
        return not self.speculator.hopes(plan.items)

    def _may_leave(self, job: _Job) -> bool:
        """First tokens are waited for: so does who asked."""
        plain = isinstance(job.batch, DecodeBatch) and not (job.spans or job.shows_all)
        return plain and self._ahead.takes(job.rows)

    def _finish(
        self, plan: StepPlan, job: _Job, coming: Coming, output: StepOutput, began: float
    ) -> StepOutput:
        result, step_s = self._ahead.fetch(coming)
        self._book(job, result, {}, output)
        self.speculator.observe(job.items, job.batch, output.sampled, None)
        if not plan.is_ahead:
            self.speculator.book(job.items, output, time.perf_counter() - began)
        elif step_s is not None:
            output.step_s = step_s
            self.speculator.pass_by(job.items, step_s)
        return output

    def _compute(self, job: _Job, output: StepOutput) -> None:
        began, masks = time.perf_counter(), self._begin_masks(job)
        hidden_TD = None
        if job.shows_all:
            hidden_TD = self.graphs.all_hidden(job.batch)
            logits_LV = self._logits(job, job.forward.where_logits(hidden_TD), output)
        elif job.spans:
            logits_LV = self._score(job, self.graphs.hidden(job.forward), output)
        else:
            logits_LV = self.graphs.forward(job.batch)
        self._sample(job, masks, logits_LV, output)
        shown_s = 0.0
        if job.shown:
            layer_s = (time.perf_counter() - began) / self.model.config.num_layers
            shown_s = job.shown * layer_s
        self.speculator.observe(job.items, job.batch, output.sampled, hidden_TD, shown_s)

    def _logits(self, job: _Job, h_LD: F32, output: StepOutput) -> F32:
        if job.spans:
            return self._score(job, h_LD, output)
        return self.graphs.head(job.forward, h_LD) if job.rows else h_LD

    def _go_on(self, wave: Wave, output: StepOutput) -> None:
        """Take the wave further, beside what decodes, whose logits nobody needs any more."""
        began = time.perf_counter()
        if wave.first == 0:
            self.rows.append_blocks(wave.items)
            self._wave = self._gather(wave.items)
            self._waves.begin(self._wave.forward, self._wave.shows_all)
        job = self._wave
        assert job is not None
        masks = self._begin_masks(job) if wave.is_last else None
        ready = time.perf_counter()
        hidden, output.layer_s = self._waves.go_on(wave.end - wave.first)
        output.layer_s[0] += ready - began
        if hidden is None:
            return
        ready = time.perf_counter()
        first = len(output.sampled)
        h_LD = job.forward.where_logits(hidden) if job.shows_all else hidden
        self._sample(job, masks, self._logits(job, h_LD, output), output)
        seen, shown_s = output.sampled[first:], job.shown * output.layer_s[-1]
        states_TD = hidden if job.shows_all else None
        self.speculator.observe(job.items, job.batch, seen, states_TD, shown_s)
        output.layer_s[-1] += time.perf_counter() - ready
        self._wave = None

    def _gather(self, items: Sequence[PlanItem]) -> _Job:
        rows = self.rows
        spans = prompt_spans(items, rows.scored) if rows.scored else []
        return _Job(items, *rows.gather(items), spans, self.speculator.reads_hidden(items))

    def _begin_masks(self, job: _Job) -> Future[Ready] | None:
        """They are computed beside the forward pass."""
        if self.masks is None:
            return None
        return self.masks.begin(job.rows, job.positions, self.rows.token_ids)

    def _score(self, job: _Job, h_LD: F32, output: StepOutput) -> F32:
        """The logits of those that sample; and what is told of prompts."""
        assert isinstance(job.batch, ForwardBatch)
        logits_LV, scores = score_prompts(
            self.graphs, job.batch, job.spans, h_LD, self.rows.token_ids
        )
        at = len(output.sampled)
        output.prompt_logprobs |= {at + i: values for i, values in scores.items()}
        return logits_LV

    def _sample(
        self, job: _Job, masks: Future[Ready] | None, logits_LV: F32, output: StepOutput
    ) -> None:
        """Append to the output what the job's items sample."""
        rows, rows_L, position_L = self.rows, job.rows, job.positions
        first = len(output.sampled)
        if isinstance(job.batch, ForwardBatch) and job.batch.watch is not None:
            self.ops.download(job.batch)
        kept = rows.choose(job.items, job.batch)
        output.kept |= {first + i: blocks for i, blocks in kept.items()}
        if not rows_L:
            output.sampled += [[] for _ in job.items]
            output.logprobs += [[] for _ in job.items]
            return
        args = rows.sample_args(rows_L, position_L)
        failed: dict[int, str] = {}
        if masks is not None:
            ready = masks.result()
            failed = ready.failed
            args.add_masks(ready.masks, ready.mask_rows)
        self._thinking.limit(args, rows_L, position_L, rows.token_ids, logits_LV.shape[1])
        self._book(job, self.ops.sample(logits_LV, args), failed, output)

    def _book(
        self, job: _Job, result: SampleResult, failed: dict[int, str], output: StepOutput
    ) -> None:
        """What came of the job's rows. failed: why some have no token."""
        rows = self.rows
        sampled: list[list[int]] = [[] for _ in job.items]
        logprobs: list[list[TokenLogprobs]] = [[] for _ in job.items]
        output.sampled += sampled
        output.logprobs += logprobs
        ids, at = result.ids.tolist(), 0
        for i, item in enumerate(job.items):
            if not item.sample:
                continue
            asked, own = rows.num_logprobs[item.row], rows.token_ids[item.row]
            position = item.start + item.num_tokens - item.num_drafts
            for here in range(at, at + item.num_drafts + 1):
                if here in failed:
                    if here == at:
                        output.failed[item.request_id] = failed[here]
                    break
                token = ids[here]
                sampled[i].append(token)
                if asked is not None:
                    logprobs[i].append(token_logprobs(result, here, asked))
                # Past the last draft nothing is known yet, so nothing can be equal to it.
                if here == at + item.num_drafts or own.item(position) != token:
                    own[position] = token
                    break
                position += 1
            at += item.num_drafts + 1

    def close(self) -> None:
        self.speculator.close()
        if self.masks is not None:
            self.masks.close()

    def _start(self, plan: StepPlan) -> None:
        self.speculator.forget(plan.released_rows)
        self.rows.release(plan.released_rows)
        for started in plan.started:
            self.rows.start(started)
            self._thinking.start(started)
            self._ahead.start(started)
            self.speculator.start(started)
        if self.masks is not None:
            for row in plan.released_rows:
                self.masks.release(row)
            for started in plan.started:
                self.masks.start(started)

    def _move(self, plan: StepPlan) -> tuple[list[bytes], float]:
        """Save, copy and load blocks. Returns keys that were not to be had, and the seconds that
        moves from and to the memory below took."""
        began = time.monotonic()
        below = self._below
        for move in plan.saves:
            assert below is not None
            below.put(move.key, self._blocks[move.group].read(move.block))
        saved = time.monotonic()
        for copy in plan.copies:
            self._blocks[copy.group].copy(copy.source, copy.target)
        copied = time.monotonic()
        lost = [move.key for move in plan.loads if not self._load(move)]
        return lost, saved - began + time.monotonic() - copied

    def _load(self, move: BlockMove) -> bool:
        below = self._below
        if below is None:
            return False
        return self._blocks[move.group].write(move.block, partial(below.get, move.key))
