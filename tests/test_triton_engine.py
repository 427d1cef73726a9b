"""Models on the provider for GPUs, under Triton's interpreter: close to `ref`, and the contract to the
bit. Sequences are short: a step takes half a second."""

from __future__ import annotations

import sys
import weakref
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

from adapters import adapted_engine  # noqa: E402
from elinvar.base.config import KVSpec  # noqa: E402
from elinvar.base.errors import ElinvarError, EngineError  # noqa: E402
from elinvar.base.sampling import SamplingParams  # noqa: E402
from elinvar.engine.llm import LLM  # noqa: E402
from elinvar.models.load import Loaded  # noqa: E402
from elinvar.ops import Ops, Weight, load_provider  # noqa: E402
from elinvar.ops.layout import pack_float, unpack  # noqa: E402
from elinvar.ops.triton import device, provider  # noqa: E402
from elinvar.ops.triton.sizes import matrix_bytes  # noqa: E402
from elinvar.run.graphs import Graphs  # noqa: E402
from engines import answers, tiny_engine, tiny_parts, tiny_weights  # noqa: E402
from helpers import Span, decode_batch, make_batch, make_cache  # noqa: E402
from test_push import by_published_names, other_weights  # noqa: E402
from test_update import own_engine  # noqa: E402

REF = load_provider("ref")
IDS = [(i * i * 7 + 3 * i + 5) % 250 for i in range(48)]


def built(family: str, kind: str) -> tuple[Any, Ops]:
    ops = load_provider("cuda")
    return tiny_parts(family, kind).build(ops), ops


# Experts with sinks and windows; windows, caps and norms of heads; quantised; norms of all heads; latents;
# recurrent states; chosen keys, 9 of them.
CLOSE = [
    ("gpt_oss", "f32", 5e-6, 43),
    ("gemma3", "f32", 5e-6, 43),
    ("llama", "q4", 0.2, 43),
    ("olmo2", "f16", 0.01, 9),
    ("minicpm3", "f32", 5e-6, 9),
    ("glm_moe_dsa", "f32", 5e-6, 14),
    ("qwen3_next", "f32", 1e-5, 43),
]


@pytest.mark.parametrize(("family", "kind", "within", "length"), CLOSE)
def test_logits_are_close_to_those_of_ref(
    family: str, kind: str, within: float, length: int
) -> None:
    spans = [Span(IDS, 0, length, [2, 0]), Span(IDS[5:], 0, 3, [1])]
    model, ops = built(family, kind)
    other = tiny_parts(family, kind).build(REF)
    groups = len(model.kv_specs("f32"))
    found = model.forward(ops.upload(make_batch(spans, groups)), make_cache(model, ops, 3, "f32"))
    expected = other.forward(make_batch(spans, groups), make_cache(other, REF, 3, "f32"))
    np.testing.assert_allclose(found.numpy(), expected, atol=within)


@pytest.mark.parametrize(
    ("family", "kind", "ends"),
    [
        ("llama", "q4", (17, 38, 40)),
        ("qwen3_moe", "f32", (5, 9, 10)),
        ("glm_moe_dsa", "bf16", (5, 10, 11)),
        ("qwen3_5", "f32", (5, 9, 10)),
    ],
)
def test_neither_chunks_nor_neighbours_change_a_bit(
    family: str, kind: str, ends: tuple[int, int, int]
) -> None:
    """A prompt at once and alone; in chunks beside another; token by token as recorded steps, which
    a row that nobody asked for fills up."""
    model, ops = built(family, kind)
    groups, (first, second, last) = len(model.kv_specs("f16")), ends
    whole = model.forward(
        ops.upload(make_batch([Span(IDS, 0, last, [1, 0])], groups)),
        make_cache(model, ops, 2, "f16"),
    )
    graphs = Graphs(model, ops, make_cache(model, ops, 5, "f16"), spare=[5] * groups)
    blocks, others = [4, 1], [2, 3]
    rows = []
    for start, stop in ((0, first), (first, second)):
        spans = [Span(IDS[::-1], start // 2, stop // 2, others), Span(IDS, start, stop, blocks)]
        rows.append(graphs.forward(make_batch(spans, groups))[start - stop :].clone())
    for at in range(second, last):
        near = [Span(IDS[::-1], second // 2, second // 2 + 1, [block]) for block in others]
        batch = decode_batch([*near, Span(IDS, at, at + 1, blocks)], groups)
        rows.append(graphs.forward(batch)[2:3].clone())
    assert torch.equal(torch.cat(rows), whole)


PARAMS = [
    SamplingParams(max_tokens=2, temperature=0, logprobs=2, ignore_eos=True, seed=0),
    SamplingParams(max_tokens=2, temperature=0.9, top_k=20, seed=1, logprobs=1, ignore_eos=True),
    SamplingParams(max_tokens=2, temperature=1.2, top_p=0.9, seed=2, logprobs=0, ignore_eos=True),
]
PROMPTS = [IDS[:35], [*IDS[:33], 9], [7, 8]]


def test_an_engine_answers_as_its_requests_alone() -> None:
    """In a batch, with prefixes of each other, cut by the step's budget; then alone, from the cache."""
    model, ops = built("llama", "q8")
    batch = tiny_engine("llama", "q8", ops, model, max_step_tokens=24)
    together = answers(batch, PROMPTS, PARAMS)
    alone = tiny_engine("llama", "q8", ops, model)
    pairs = list(zip(PROMPTS, PARAMS, strict=True))
    assert [answers(alone, [p], [s])[0] for p, s in pairs] == together
    assert alone.metrics.cached_tokens >= 32
    expected = answers(tiny_engine("llama", "q8", REF), PROMPTS[:1], PARAMS[:1])
    assert together[0][0] == expected[0][0]


def test_a_prompt_has_the_log_probs_of_its_generation() -> None:
    """In chunks, beside another; and they are those of `ref`, but for rounding."""
    model, ops = built("llama", "f32")
    engine = LLM(tiny_engine("llama", "f32", ops, model, max_step_tokens=7, prefix_cache=False))
    asked = SamplingParams(max_tokens=3, temperature=0.9, seed=3, logprobs=2, ignore_eos=True)
    said = engine.generate(IDS[:9], asked)[0]
    scored = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=2, seed=0)
    whole = [*IDS[:9], *said.token_ids]
    found, other = (one.prompt_logprobs for one in engine.generate([whole, IDS[4:9]], scored))
    assert found is not None and other is not None and len(other) == 4
    assert found[8:] == said.logprobs
    ref = LLM(tiny_engine("llama", "f32", REF)).generate(whole, scored)[0].prompt_logprobs
    assert ref is not None
    for ours, theirs in zip(found, ref, strict=True):
        assert abs(ours.logprob - theirs.logprob) < 1e-5
        assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]


def test_keys_are_chosen_alike_in_every_batch() -> None:
    """Of 24 that may be, among more; in chunks, beside another, and alone."""
    model, ops = built("deepseek_v32", "bf16")
    prompts = [IDS[:27], IDS[9:12]]
    batch = tiny_engine("deepseek_v32", "bf16", ops, model, max_step_tokens=16)
    together = answers(batch, prompts, PARAMS[:2])
    alone = tiny_engine("deepseek_v32", "bf16", ops, model, prefix_cache=False)
    pairs = zip(prompts, PARAMS, strict=False)
    assert [answers(alone, [p], [s])[0] for p, s in pairs] == together


def test_blocks_of_a_prompt_are_kept_alike_in_every_batch() -> None:
    """Prompts that end amid a step and with one, together and alone; and as on a CPU."""
    model, ops = built("llama", "f32")
    prompts = [[(7 * i * i + n * i + 5) % 250 for i in range(n)] for n in (131, 135)]
    params = [
        SamplingParams(max_tokens=2, seed=1, logprobs=1, ignore_eos=True, attention_budget=budget)
        for budget in (1, 100)
    ]

    def run(engine: Any, *asked: int) -> tuple[list[Any], list[list[int]]]:
        kept: list[list[int]] = []
        choose = engine.runner.rows.choose

        def spy(*args: Any) -> Any:
            found = choose(*args)
            kept.extend(found.values())
            return found

        engine.runner.rows.choose = spy
        return answers(engine, [prompts[i] for i in asked], [params[i] for i in asked]), kept

    together, kept = run(tiny_engine("llama", "f32", ops, model, max_step_tokens=100), 0, 1)
    assert sorted(map(len, kept)) == [3, 4]
    for i in (0, 1):
        alone = run(tiny_engine("llama", "f32", ops, model, max_step_tokens=256), i)
        assert alone == ([together[i]], [kept[i]])
        assert run(tiny_engine("llama", "f32"), i)[1] == [kept[i]]


def test_a_step_begins_before_the_tokens_of_the_last_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The ids are taken where they lie, by recorded steps whose rows are filled up, too."""
    calls: list[str] = []

    class Spied(provider.Coming):
        def __init__(self, found: Any) -> None:
            calls.append("begin")
            super().__init__(found)

        def result(self) -> Any:
            calls.append("read")
            return super().result()

    monkeypatch.setattr(provider, "Coming", Spied)
    model, ops = built("llama", "q8")
    prompts = [PROMPTS[2], [9], IDS[:3]]
    params = [replace(p, max_tokens=n) for p, n in zip(PARAMS, (5, 4, 5), strict=True)]
    ahead = answers(tiny_engine("llama", "q8", ops, model), prompts, params)
    assert calls == ["begin", "read", "begin", *["begin", "read"] * 3, "read"]
    waiting = tiny_engine("llama", "q8", ops, model)
    monkeypatch.setattr(waiting.runner, "_may_leave", lambda job: False)
    assert answers(waiting, prompts, params) == ahead


def test_a_request_without_an_adapter_has_the_bits_it_has_alone() -> None:
    engine = adapted_engine("llama", "bf16", load_provider("cuda"), max_rows=4)
    params = [SamplingParams(max_tokens=2, temperature=0, adapter=name) for name in (None, "one")]
    both = answers(engine, [IDS[:9]] * 2, params)
    assert [answers(engine, [IDS[:9]], [one])[0] for one in params] == both
    assert both[0] != both[1]


def test_pushed_weights_answer_like_the_model_they_come_from() -> None:
    model, ops = built("llama", "f32")
    engine = tiny_engine("llama", "f32", ops, model)
    before = answers(engine, PROMPTS[2:], PARAMS[2:])
    parts = tiny_parts("llama", "f32")
    names = [name for name, value in parts.weights.items() if not isinstance(value, np.ndarray)]
    others = {name: unpack(parts.weights[name])[::-1].copy() for name in names}
    engine.push_weights({**parts.weights, **others})
    weights = {**parts.weights, **{n: pack_float("f32", w) for n, w in others.items()}}
    fresh = load_provider("cuda")
    pushed = Loaded(parts.family, parts.config, parts.rules, weights).build(fresh)
    expected = answers(tiny_engine("llama", "f32", fresh, pushed), PROMPTS[2:], PARAMS[2:])
    assert answers(engine, PROMPTS[2:], PARAMS[2:]) == expected != before


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_matrices_are_on_the_device_before_the_first_request(family: str) -> None:
    model, ops = built(family, "q8")
    engine = tiny_engine(family, "q8", ops, model)
    told: list[tuple[str, int, int]] = []
    engine.warm_up(lambda *stage: told.append(stage))
    matrices = cast("Any", ops)._matrices
    held = {**matrices._joined, **matrices._experts}
    weights = [w for w in model.weights.values() if isinstance(w, Weight)]
    assert {what for what, _, _ in told} == {"uploading"}
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1][1] == told[-1][2] == sum(matrix_bytes(w.kind, w.shape) for w in weights)
    answers(engine, PROMPTS[2:], PARAMS[2:])
    assert {**matrices._joined, **matrices._experts} == held


def test_weights_that_do_not_fit_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ops = built("llama", "f32")
    engine = tiny_engine("llama", "f32", ops, model)

    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("It is full.")

    with monkeypatch.context() as patch:
        patch.setattr("elinvar.ops.triton.weights.from_weight", full)
        with pytest.raises(EngineError, match="The weights do not fit on the device beside"):
            engine.warm_up()
        engine.sleep()
        with pytest.raises(EngineError, match="There is no memory to wake up now"):
            engine.wake()
    engine.wake()
    assert answers(engine, PROMPTS[2:], PARAMS[2:])


def test_kernels_are_kept_in_the_cache_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.setenv(name, "")  # so that it is taken away again
        monkeypatch.delenv(name)
    device.keep_kernels(tmp_path)
    assert triton.knobs.cache.dir == str(tmp_path / "kernels")
    device.keep_kernels(tmp_path / "another")
    assert triton.knobs.cache.dir == str(tmp_path / "kernels")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    device.keep_kernels(tmp_path)
    assert triton.knobs.cache.dir == str(tmp_path / ".triton" / "cache")


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_nothing_is_on_the_device_while_it_sleeps(family: str) -> None:
    model, ops = built(family, "f32")
    engine = tiny_engine(family, "f32", ops, model)
    before = answers(engine, PROMPTS[2:], PARAMS[2:])
    held: Any = ops
    kinds = held._matrices._joined, held._matrices._experts, held._constant._tensors
    tensors = [weakref.ref(t) for t in held._constant._tensors.values()]
    tensors += [weakref.ref(m.codes) for found in held._matrices._joined.values() for m in found]
    tensors += [weakref.ref(e.downs.codes) for e in held._matrices._experts.values()]
    engine.sleep()
    assert not any(kinds) and not any(tensor() is not None for tensor in tensors)
    engine.wake()
    assert answers(engine, PROMPTS[2:], PARAMS[2:]) == before


def placed(ops: Any) -> dict[int, Any]:
    """What is on the device of a model, by address."""
    matrices = [*chain(*ops._matrices._joined.values())]
    matrices += [m for e in ops._matrices._experts.values() for m in (e.both, e.downs)]
    biases = [b for e in ops._matrices._experts.values() for b in (e.both_bias, e.down_bias)]
    tensors = [t for m in matrices for t in (*m.tensors, m.factors)]
    found = [*tensors, *biases, *ops._constant._tensors.values()]
    return {t.data_ptr(): t for t in found if t is not None and t.numel()}


@pytest.mark.parametrize(("family", "kind"), [("gpt_oss", "f32"), ("qwen3_next", "f32")])
def test_recorded_steps_compute_with_weights_that_were_replaced(family: str, kind: str) -> None:
    """These are written where the recordings read them: nothing on the device moves, and all of it is
    what a provider has that never saw others."""
    engine = own_engine(family, kind, load_provider("cuda"))
    held: Any = engine.ops
    arrays, old = (by_published_names(family, dict(w)) for w in perturbed(family, kind))
    before = answers(engine, PROMPTS[2:], PARAMS[2:])
    graphs, places = dict(engine.runner.graphs._graphs), placed(held).keys()
    assert graphs
    engine.update_weights({name: array} for name, array in arrays.items())
    assert engine.runner.graphs._graphs == graphs and placed(held).keys() == places
    found = answers(engine, PROMPTS[2:], PARAMS[2:])
    assert engine.runner.graphs._graphs == graphs and placed(held).keys() == places
    fresh = own_engine(family, kind, load_provider("cuda"))
    fresh.push_weights(arrays)
    assert answers(fresh, PROMPTS[2:], PARAMS[2:]) == found != before
    theirs = placed(fresh.ops).values()
    for tensor in placed(held).values():
        assert any(tensor.shape == t.shape and torch.equal(tensor, t) for t in theirs)
    engine.update_weights([old])
    assert answers(engine, PROMPTS[2:], PARAMS[2:]) == before


def perturbed(family: str, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Other matrices and other vectors; and those of the tiny engine."""
    weights = tiny_weights(family, kind)
    others = other_weights(family, kind)
    return {n: w if isinstance(w, Weight) else w * 1.25 for n, w in others.items()}, weights


def test_weights_of_another_kind_are_uploaded_anew() -> None:
    engine = own_engine("llama", "q4", load_provider("cuda"))
    answers(engine, PROMPTS[2:], PARAMS[2:])
    arrays = by_published_names("llama", dict(tiny_weights("llama", "f32")))
    engine.update_weights([arrays])
    assert not engine.runner.graphs._graphs
    found = answers(engine, PROMPTS[2:], PARAMS[2:])
    fresh = own_engine("llama", "f32", load_provider("cuda"))
    assert answers(fresh, PROMPTS[2:], PARAMS[2:]) == found


def test_blocks_move_as_bytes() -> None:
    [kv] = load_provider("cuda").kv_layers(KVSpec("full", (0,), 2, 16), 3)
    kv.k[1] = torch.randn(kv.k[1].shape)
    kept = bytes(kv.blocks.read(1))
    kv.blocks.copy(1, 0)
    assert torch.equal(kv.k[0], kv.k[1]) and kv.k[0].any()

    def fill(to: memoryview) -> bool:
        to[:] = kept
        return True

    assert kv.blocks.write(2, fill) and torch.equal(kv.k[2], kv.k[1])
    assert not kv.blocks.write(1, lambda to: False)


def test_where_there_is_no_gpu_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "INTERPRETER", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ElinvarError, match="torch finds no GPU on this machine"):
        load_provider("cuda")
    monkeypatch.setitem(sys.modules, "elinvar.ops.triton.provider", None)
    with pytest.raises(ElinvarError, match=r"pip install 'elinvar\[gpu\]'"):
        load_provider("cuda")
