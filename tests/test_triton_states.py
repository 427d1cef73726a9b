"""Engines on the provider for GPUs whose models have recurrent states, under Triton's interpreter: where
states come from, a prompt, a snapshot, a batch that was interrupted, changes no bit of an answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from elinvar.base.sampling import SamplingParams  # noqa: E402
from elinvar.engine.output import CompletionBuilder  # noqa: E402
from elinvar.ops import load_provider  # noqa: E402
from elinvar.ops.triton import provider  # noqa: E402
from elinvar.run.graphs import Graphs  # noqa: E402
from engines import answers, tiny_engine, tiny_parts  # noqa: E402
from helpers import Span, decode_batch, make_batch, make_cache  # noqa: E402

IDS = [(i * i * 7 + 3 * i + 5) % 250 for i in range(48)]
FAMILY = "qwen3_5"
PARAMS = [
    SamplingParams(max_tokens=3, temperature=0, logprobs=1, ignore_eos=True, seed=0),
    SamplingParams(max_tokens=2, temperature=0.9, top_k=20, seed=1, logprobs=1, ignore_eos=True),
    SamplingParams(max_tokens=2, temperature=1.2, top_p=0.9, seed=2, logprobs=0, ignore_eos=True),
]

pytestmark = pytest.mark.filterwarnings("ignore:overflow")  # of e^x: sigmoids are 0 there


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    ops = load_provider("cuda")
    return tiny_parts(FAMILY, "f32").build(ops), ops


def test_snapshots_batches_and_interruptions(parts: tuple[Any, Any]) -> None:
    """Alone and without a cache; then one by one, where a conversation goes on from the state that
    its first turn left; then together in chunks, each but the oldest sent away once."""
    model, ops = parts
    plain = tiny_engine(FAMILY, "f32", ops, model, prefix_cache=False)
    [turn] = answers(plain, [IDS[:30]], PARAMS[:1])
    prompts = [IDS[:30], [*IDS[:30], *turn[0], 1, 2, 3], [7, 8]]
    pairs = list(zip(prompts, PARAMS, strict=True))
    expected = [turn, *(answers(plain, [p], [s])[0] for p, s in pairs[1:])]
    engine = tiny_engine(FAMILY, "f32", ops, model, max_step_tokens=20)
    assert [answers(engine, [p], [s])[0] for p, s in pairs] == expected
    assert engine.metrics.cached_tokens == 32

    builders = {engine.add(p, s): CompletionBuilder(p) for p, s in pairs}
    done: dict[int, Any] = {}
    while engine.has_work:
        for delta in engine.step():
            if completion := builders[delta.request_id].push(delta):
                done[delta.request_id] = completion
        if engine.metrics.preemptions < 2:
            for request in [i for i in builders if i not in done][1:]:
                engine.scheduler.preempt(request)
    assert engine.metrics.preemptions >= 2
    assert [(done[i].token_ids, done[i].logprobs, done[i].text) for i in builders] == expected


def test_a_step_that_runs_to_be_captured_advances_no_state(
    parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device a recording is run once before its capture: the step itself goes on from the same
    states, which it overwrites in place."""
    model, ops = parts
    runs = []

    def capture(recording: Any, run: Callable[[], Any], pool: Any) -> Callable[[], Any]:
        def replay() -> Any:
            recording.fill()
            return run()

        return replay

    def counted(batch: Any, kv: Any) -> Any:
        runs.append(len(batch.input_ids))
        return forward(batch, kv)

    forward, groups = model.forward, len(model.kv_specs("f16"))
    spans = [Span(IDS, at, at + 1, [1]) for at in range(5, 8)]
    outputs = []
    for interpreter in (True, False):
        monkeypatch.setattr(provider, "INTERPRETER", interpreter)
        monkeypatch.setattr(provider, "capture", capture)
        monkeypatch.setattr(model, "forward", counted)
        kv = make_cache(model, ops, 2, "f16")
        graphs = Graphs(model, ops, kv, spare=[2] * groups)
        rows = [graphs.forward(make_batch([Span(IDS, 0, 5, [1])], groups))[-1:].clone()]
        rows += [graphs.forward(decode_batch([span], groups)).clone() for span in spans]
        outputs.append(torch.cat(rows))
    assert torch.equal(*outputs)
    assert runs == [8, 1, 1, 1, 8, 8, 1, 1, 1, 1], "a run more of each size"
