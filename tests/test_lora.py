"""LoRA adapters: the op, parity with PEFT, what the contract says of them, and their life."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters import AdaptedModel, adaptable, adapted_engine, random_adapter, save_adapter
from elinvar.base.config import EngineConfig
from elinvar.base.sampling import SamplingParams
from elinvar.engine.core import Engine
from elinvar.engine.output import CompletionBuilder
from elinvar.models.registry import FAMILIES as REGISTRY
from elinvar.ops import Ops, Weight, load_provider
from elinvar.ops.adapted import AdaptedOps
from elinvar.ops.arguments import Lora, LoraPair
from elinvar.ops.layout import pack_float, unpack
from engines import Answer, answers, provider, random_weight, tiny_engine, tiny_parts
from helpers import assert_parity, run_tokens
from test_invariance import FAMILIES, LEVELS, PARAMS, PROMPTS

# ---- the op -------------------------------------------------------------------------------------

K, OUTPUTS = 72, (83, 16, 40)


def lora_of(kind: str, ranks: tuple[int, ...] = (1, 16, 37)) -> Lora:
    """Three adapters for the first and the last of three matrices; the second of them changes only
    the first, and the third shares one A between both."""
    rng = np.random.default_rng(len(kind))

    def pair(r: int, n: int, a: Weight | None = None) -> LoraPair:
        a = a or random_weight(rng, kind, r, K)
        return LoraPair(a, random_weight(rng, kind, n, r), 0.5)

    first = [pair(r, OUTPUTS[0]) for r in ranks]
    last = [pair(ranks[0], OUTPUTS[2]), None, pair(ranks[2], OUTPUTS[2], first[2].a)]
    return Lora((0, OUTPUTS[0] + OUTPUTS[1]), (first, last))


def applied(ops: Ops, y: np.ndarray, x: np.ndarray, adapters: np.ndarray, lora: Lora) -> np.ndarray:
    y = y.copy()
    ops.lora(y, x, adapters, lora)
    return y


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("rows", [1, 2, 3, 17, 97, 150])
def test_the_op(rows: int, kind: str, level: str) -> None:
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, K), np.float32)
    y = rng.standard_normal((rows, sum(OUTPUTS)), np.float32)
    y[:, ::3] = -0.0
    adapters = rng.integers(-1, 3, rows).astype(np.int32)
    lora = lora_of(kind)
    ops = load_provider("cpu", 3, level)
    got = applied(ops, y, x, adapters, lora)
    wanted = applied(load_provider("ref"), y, x, adapters, lora)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)
    # What nobody changes keeps its bits, the signs of zeros, too.
    same = np.ones_like(y, bool)
    for t, adapter in enumerate(adapters):
        same[t, : OUTPUTS[0]] = adapter < 0
        same[t, -OUTPUTS[2] :] = adapter in (-1, 1)
    assert np.array_equal(got.view(np.int32)[same], y.view(np.int32)[same])
    alone = [
        applied(provider(), y[t : t + 1], x[t : t + 1], adapters[t : t + 1], lora)
        for t in range(rows)
    ]
    assert np.array_equal(np.concatenate(alone), got)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "swiglu_oai"])
@pytest.mark.parametrize("kind", ["q4", "bf16"])
def test_gated_ends_what_gated_linear_does(kind: str, activation: Any) -> None:
    rng = np.random.default_rng(3)
    gate, up = (random_weight(rng, kind, 83, 96) for _ in range(2))
    for rows in (1, 19):
        x = rng.standard_normal((rows, 96), np.float32)
        for level in LEVELS:
            ops = load_provider("cpu", 2, level)
            got = ops.gated(ops.linear(x, (gate, up)), activation)
            assert np.array_equal(got, provider().gated_linear(x, gate, up, activation))
        wanted = load_provider("ref").gated(ops.linear(x, (gate, up)), activation)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


# ---- every family ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [family.name for family in REGISTRY])
def test_every_family_equals_merged_weights(family: str) -> None:
    """Each matrix that may be adapted is, wherever the family multiplies it."""
    parts, ops = tiny_parts(family, "f32"), AdaptedOps(provider())
    adapter = random_adapter(parts, 4, kind="f32")
    ops.set_adapter(0, adapter.pairs)
    ids = [i * 7 % 256 for i in range(40)]
    plain = run_tokens(parts.build(ops), ops, ids)
    got = run_tokens(AdaptedModel(parts.build(ops), ops), ops, ids, 33)
    assert np.abs(got - plain).max() > 0.1
    for name, w in adaptable(parts).items():
        pair = adapter.pairs[w]
        merged = unpack(w) + np.float32(pair.scale) * unpack(pair.b) @ unpack(pair.a)
        one = replace(parts, weights=parts.weights | {name: pack_float("f32", merged)})
        ops.set_adapter(0, {key: p for key, p in adapter.pairs.items() if key is not w})
        # The others as adapters, this one merged.
        assert_parity(run_tokens(AdaptedModel(one.build(ops), ops), ops, ids), got)


# ---- the contract -------------------------------------------------------------------------------

NAMES = [None, "one", "two", "one", "two", "one", None, "two"]
ASKED = [replace(one, adapter=name) for one, name in zip(PARAMS, NAMES, strict=True)]
_alone: dict[tuple[str, str], list[Answer]] = {}


def expected(family: str, kind: str = "q4") -> list[Answer]:
    """Every request by itself; those without adapters on an engine that has none."""
    if (family, kind) not in _alone:
        plain = tiny_engine(family, kind, prefix_cache=False)
        adapted = adapted_engine(family, kind, prefix_cache=False)
        _alone[family, kind] = [
            answers(adapted if asked.adapter else plain, [ids], [asked])[0]
            for ids, asked in zip(PROMPTS, ASKED, strict=True)
        ]
    return _alone[family, kind]


@pytest.mark.parametrize("kind", ["q4", "f32"])
@pytest.mark.parametrize("family", [family.name for family in REGISTRY])
def test_neighbours_chunks_threads_and_prefixes(family: str, kind: str) -> None:
    engine = adapted_engine(family, kind, provider(num_threads=3), max_step_tokens=21)
    assert answers(engine, PROMPTS, ASKED) == expected(family, kind)
    before = engine.metrics.cached_tokens
    assert answers(engine, PROMPTS, ASKED) == expected(family, kind)
    assert engine.metrics.cached_tokens - before >= 32 * 6, "the second round must hit"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_vector_width(family: str, level: str) -> None:
    engine = adapted_engine(family, inner=provider("cpu", 1, level), max_step_tokens=50)
    assert answers(engine, PROMPTS, ASKED) == expected(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_preemption(family: str) -> None:
    engine = adapted_engine(family, max_step_tokens=40)
    builders = {engine.add(p, s): CompletionBuilder(p) for p, s in zip(PROMPTS, ASKED, strict=True)}
    done = {}
    step = 0
    while engine.has_work:
        for delta in engine.step():
            if completion := builders[delta.request_id].push(delta):
                done[delta.request_id] = completion
        running = [i for i in builders if i not in done][1:]
        if running and step % 3 == 0:
            engine.scheduler.preempt(running[step // 3 % len(running)])
        step += 1
    assert engine.metrics.preemptions > 0
    assert [(done[i].token_ids, done[i].logprobs, done[i].text) for i in builders] == expected(
        family
    )


def test_adapters_matter_and_share_no_cached_block() -> None:
    engine = adapted_engine()
    ids, base = PROMPTS[4], SamplingParams(max_tokens=8, temperature=0, seed=0, logprobs=0)
    three = [replace(base, adapter=name) for name in (None, "one", "two")]
    first = [answers(engine, [ids], [asked])[0] for asked in three]
    assert engine.metrics.cached_tokens == 0
    assert len({logprobs[0].logprob for _, logprobs, _ in first}) == 3
    assert [answers(engine, [ids], [asked])[0] for asked in three] == first
    assert engine.metrics.cached_tokens == 3 * 96


def test_a_real_model(smollm2_gguf: Path, tmp_path: Path) -> None:
    """Quantised, and the adapters from folders; alone, and together on more threads in chunks."""

    def load(**options: Any) -> Engine:
        engine = Engine.load(str(smollm2_gguf), EngineConfig(kv_memory=2**27, **options))
        for name, folder in folders.items():
            engine.load_adapter(name, folder)
        return engine

    folders: dict[str, Path] = {}
    engine = load(num_threads=1, prefix_cache=False)
    c = engine.model_config
    for seed, name in enumerate(("one", "two")):
        modules = {
            f"model.layers.{i}.{module}_proj": shape
            for i in range(seed, c.num_layers)
            for module, shape in (
                ("self_attn.q", (c.dim, c.num_heads * c.head_dim)),
                ("mlp.down", (c.ff_dim, c.dim)),
            )
        }
        folders[name] = save_adapter(tmp_path / name, modules, 4 + seed, seed, lora_alpha=0.2)
    engine = load(num_threads=1, prefix_cache=False)
    texts = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time, " * 12]
    prompts = [engine.tokenizer.encode(text) for text in texts] * 2
    base = SamplingParams(max_tokens=12, temperature=0.8, seed=1, logprobs=2)
    names = [None, "one", "two", "two", None, "one"]
    asked = [replace(base, adapter=name) for name in names]
    wanted = [answers(engine, [p], [s])[0] for p, s in zip(prompts, asked, strict=True)]
    assert wanted[0] != wanted[3]
    other = load(num_threads=2, max_step_tokens=19)
    assert answers(other, prompts, asked) == wanted
    assert answers(other, prompts, asked) == wanted
