"""Rows and runner: plans become the right flat batches, and sampled tokens come back."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from elinvar.base.batch import ForwardBatch
from elinvar.base.config import KVSpec
from elinvar.base.plan import PlanItem, RowStart, StepPlan
from elinvar.base.sampling import SamplingParams
from elinvar.ops import load_provider
from elinvar.run.runner import Runner

VOCAB = 16
SPECS = (
    KVSpec("full", (1,), 1, 16),
    KVSpec("sliding", (0, 2), 1, 16, window=40),
)


class SpyModel:
    """Logits that say: after token t comes (t + 1) mod VOCAB. Keeps the batches it was given."""

    config: Any = SimpleNamespace(vocab_size=VOCAB)

    def __init__(self) -> None:
        self.batches: list[ForwardBatch] = []

    def forward(self, batch: ForwardBatch, kv: Sequence[Any]) -> Any:
        assert len(kv) == 3
        self.batches.append(batch)
        logits = np.zeros((len(batch.logit_rows), VOCAB), np.float32)
        following = (batch.input_ids[batch.logit_rows] + 1) % VOCAB
        logits[np.arange(len(logits)), following] = 9.0
        return logits


@pytest.fixture
def model() -> SpyModel:
    return SpyModel()


@pytest.fixture
def runner(model: SpyModel) -> Runner:
    return Runner(model, load_provider("ref"), SPECS, (10, 10), 4, 100)  # type: ignore[arg-type]


def start(row: int, ids: list[int], blocks: list[list[int]], **params: Any) -> RowStart:
    return RowStart(f"r{row}", row, ids, SamplingParams(seed=1, temperature=0, **params), blocks)


def item(row: int, at: int, count: int, sample: bool, new: list[list[int]]) -> PlanItem:
    return PlanItem(f"r{row}", row, at, count, sample, new)


def test_a_mixed_batch(runner: Runner, model: SpyModel) -> None:
    # Row 2 computes a chunk of its prompt; row 0 had 32 tokens in the cache and samples.
    prompt = [i % VOCAB for i in range(35)]
    plan = StepPlan(
        [start(2, list(range(10)), [[], []]), start(0, prompt, [[4], [-1]], logprobs=2)],
        [item(2, 0, 7, False, [[3], [8]]), item(0, 32, 3, True, [[5], [6]])],
    )
    output = runner.begin(plan).finish()
    assert output.sampled == [[], [3]]
    assert output.logprobs[0] == []
    assert [token for token, _ in output.logprobs[1][0].top] == [3, 0]
    assert output.logprobs[1][0].logprob == output.logprobs[1][0].top[0][1]
    batch = model.batches[0]
    assert batch.input_ids.tolist() == [*range(7), 0, 1, 2]
    assert batch.positions.tolist() == [*range(7), 32, 33, 34]
    assert batch.query_start_loc.tolist() == [0, 7, 10]
    assert batch.seq_lens.tolist() == [7, 35]
    tables = [t[:, :2].tolist() for t in batch.block_tables]
    assert tables == [[[3, -1], [4, 5]], [[8, -1], [-1, 6]]]
    assert {t.shape for t in batch.block_tables} == {(2, 16)}, "a width that comes often"
    assert batch.slot_mapping[0].tolist() == [*range(96, 103), 160, 161, 162]
    assert batch.slot_mapping[1].tolist() == [*range(256, 263), 192, 193, 194]
    assert batch.logit_rows.tolist() == [9]
    for array in (*batch.block_tables, *batch.slot_mapping, batch.input_ids, batch.seq_lens):
        assert array.dtype == np.int32 and array.flags.c_contiguous


def test_sampled_tokens_are_the_next_input(runner: Runner, model: SpyModel) -> None:
    runner.begin(StepPlan([start(1, [5], [[], []])], [item(1, 0, 1, True, [[0], [0]])])).finish()
    for at in range(1, 5):
        output = runner.begin(StepPlan(items=[item(1, at, 1, True, [[], []])])).finish()
        assert output.sampled == [[6 + at]]
        assert model.batches[-1].input_ids.tolist() == [5 + at]
        assert model.batches[-1].positions.tolist() == [at]


def test_a_row_taken_again_forgets_its_former_request(runner: Runner, model: SpyModel) -> None:
    old = StepPlan(
        [start(0, [1] * 70, [[], []], logprobs=3)], [item(0, 0, 70, True, [[1, 2, 3], [1, 2, 3]])]
    )
    assert runner.begin(old).finish().logprobs[0]
    new = StepPlan([start(0, [7, 8], [[], []])], [item(0, 0, 2, True, [[9], [9]])])
    output = runner.begin(new).finish()
    assert output.sampled == [[9]] and output.logprobs == [[]]
    assert model.batches[-1].input_ids.tolist() == [7, 8]
    assert model.batches[-1].block_tables[0][:, :1].tolist() == [[9]]


def test_no_sampling_and_no_items(runner: Runner, model: SpyModel) -> None:
    output = runner.begin(
        StepPlan([start(0, [1, 2, 3], [[], []])], [item(0, 0, 2, False, [[0], [0]])])
    ).finish()
    assert output.sampled == [[]] and output.logprobs == [[]]
    assert runner.begin(StepPlan(released_rows=[0])).finish().sampled == []
    assert len(model.batches) == 1
