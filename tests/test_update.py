"""Weights replaced in place, part by part: answers are those of the model pushed, weights are in memory
once, and an update that ends half-way is told."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elinvar.base.config import EngineConfig
from elinvar.base.errors import EngineError, ModelError
from elinvar.engine.aio import AsyncEngine
from elinvar.engine.core import Engine
from elinvar.engine.idle import TORN
from elinvar.models.load import Loaded
from elinvar.nn.alike import counterparts
from elinvar.ops import Ops, Weight
from elinvar.ops.layout import aligned_empty, unpack
from elinvar.weights import load
from engines import answers, provider, tiny_engine, tiny_parts, tiny_weights
from families import ENGINES
from test_aio import params, read, run
from test_push import BY_NAME, PARAMS, PROMPTS, by_published_names, other_weights

Part = dict[str, np.ndarray]


def own_engine(family: str, kind: str, ops: Ops | None = None, **options: Any) -> Engine:
    """Of weights that no other test has."""

    def copied(w: Any) -> Any:
        if not isinstance(w, Weight):
            return w
        data = aligned_empty(w.nbytes)
        data[:] = w.data
        return Weight(w.kind, w.shape, data)

    weights = {name: copied(w) for name, w in tiny_weights(family, kind).items()}
    parts = tiny_parts(family, kind)
    model = Loaded(parts.family, parts.config, parts.rules, weights).build(ops or provider())
    return tiny_engine(family, kind, model=model, **options)


def one_by_one(arrays: Part) -> Iterator[Part]:
    for name, array in arrays.items():
        yield {name: array}


def old_and_new(family: str, kind: str) -> tuple[Part, Part]:
    weights = tiny_weights(family, kind), other_weights(family, kind)
    old, new = (by_published_names(family, dict(one)) for one in weights)
    return old, new


@pytest.mark.parametrize("family", BY_NAME)
def test_other_weights_and_the_old_ones_again(family: str) -> None:
    old, new = old_and_new(family, "f16")
    model = BY_NAME[family].build(ENGINES[family], other_weights(family, "f16"), provider())
    expected = answers(tiny_engine(family, "f16", model=model), PROMPTS, PARAMS)
    engine = own_engine(family, "f16")
    before, fingerprint = answers(engine, PROMPTS, PARAMS), engine.fingerprint
    cached = engine.metrics.cached_tokens
    assert engine.update_weights(one_by_one(new)) == engine.weight_version == 1
    assert answers(engine, PROMPTS, PARAMS) == expected != before
    assert engine.metrics.cached_tokens == cached and engine.fingerprint != fingerprint
    assert engine.update_weights([dict(list(old.items())[:5]), dict(list(old.items())[5:])]) == 2
    assert answers(engine, PROMPTS, PARAMS) == before


@pytest.mark.parametrize("family", ["phi3", "qwen3_moe"])
@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_neither_order_nor_parts_matter(family: str, data: st.DataObject) -> None:
    """Nor by which of their names weights come; some of them come twice."""
    old, new = old_and_new(family, "f16")
    canonical = {n: _plain(w) for n, w in other_weights(family, "f16").items()}
    pairs = data.draw(st.permutations(list(new.items())))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(pairs)), max_size=4)))
    parts = [dict(pairs[a:b]) for a, b in pairwise([0, *cuts, len(pairs)])]
    again = data.draw(st.lists(st.sampled_from(sorted(canonical)), max_size=3))
    engine = own_engine(family, "f16")
    engine.update_weights(
        [{k: old[k] for k in sorted(old)[:2]}, *parts, {k: canonical[k] for k in again}]
    )
    for name, w in engine.runner.model.weights.items():
        assert np.array_equal(_plain(w), canonical[name])


def _plain(w: Any) -> np.ndarray:
    return unpack(w) if isinstance(w, Weight) else w


def test_what_was_quantised_or_mapped_is_replaced(tiny_gguf: Path) -> None:
    """By other kinds, and in another place; from then on in its own."""
    arrays = {
        n: unpack(w) if isinstance(w, Weight) else w
        for n, w in tiny_weights("llama", "f32").items()
    }
    engine = own_engine("llama", "q4")
    engine.update_weights(one_by_one(arrays))
    assert answers(engine, PROMPTS, PARAMS) == answers(tiny_engine("llama", "f32"), PROMPTS, PARAMS)
    config = EngineConfig(kv_memory=2**24, num_threads=1)
    mapped, pushed = (Engine.load(tiny_gguf, config) for _ in range(2))
    arrays = {
        name: w if isinstance(w, np.ndarray) else unpack(w)[::-1].astype(np.float16)
        for name, w in mapped.runner.model.weights.items()
    }
    before = answers(mapped, PROMPTS, PARAMS)
    pushed.push_weights(arrays)
    expected = answers(pushed, PROMPTS, PARAMS)
    assert expected != before
    mapped.update_weights(one_by_one(arrays))
    assert answers(mapped, PROMPTS, PARAMS) == expected
    places = _places(mapped)
    mapped.sleep()
    mapped.update_weights([arrays])
    mapped.wake()
    assert _places(mapped) == places
    assert answers(mapped, PROMPTS, PARAMS) == expected


def _places(engine: Engine) -> list[int]:
    weights = engine.runner.model.weights.values()
    return [w.data.ctypes.data for w in weights if isinstance(w, Weight)]


@pytest.mark.parametrize(("kind", "most"), [("f32", 0.3), ("q4", 1.3)])
def test_weights_are_in_memory_once(
    kind: str, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside those that the trainer has. Of what is replaced in place nothing is allocated."""
    monkeypatch.setattr(load, "_CHUNK_ELEMENTS", 1 << 10)
    engine = own_engine("llama", kind)
    weights = tiny_weights("llama", "f32")
    total = sum(w.nbytes for w in weights.values())
    arrays = {n: -unpack(w) if isinstance(w, Weight) else w for n, w in weights.items()}

    def peak(push: Callable[[], object]) -> float:
        tracemalloc.start()
        try:
            push()
            return float(tracemalloc.get_traced_memory()[1] / total)
        finally:
            tracemalloc.stop()

    assert peak(lambda: engine.update_weights(one_by_one(arrays))) < most
    assert peak(lambda: engine.push_weights(arrays)) > 1.0


def test_what_does_not_fit_at_first_changes_nothing() -> None:
    engine = own_engine("llama", "f16")
    before = answers(engine, PROMPTS, PARAMS)
    wrong: list[Any] = [
        [{"strange": np.ones(3, np.float32)}],
        [{"model.norm.weight": np.ones(3, np.float32)}],
        [],
    ]
    for parts in wrong:
        with pytest.raises(ModelError, match=r"nothing was changed|Nothing replaced layers"):
            engine.update_weights(parts)
    assert engine.weight_version == 0
    assert answers(engine, PROMPTS, PARAMS) == before


def test_an_update_that_ends_half_way_is_told() -> None:
    engine = own_engine("llama", "f16")
    old, new = old_and_new("llama", "f16")
    before, some = answers(engine, PROMPTS, PARAMS), dict(list(new.items())[3:9])

    def broken() -> Iterator[Part]:
        yield some
        raise OSError("The trainer has gone.")

    failures: list[tuple[Any, type[Exception], str]] = [
        ([some, {"strange": np.ones(3)}], EngineError, "none of this part was taken"),
        (
            [some],
            EngineError,
            r"Nothing replaced .* and \d+ more; all of them must come\. The engine holds weights of two",
        ),
        (broken(), OSError, "The trainer has gone"),
    ]
    for parts, kind, message in failures:
        with pytest.raises(kind, match=message):
            engine.update_weights(parts)
        with pytest.raises(EngineError, match=TORN):
            engine.add(PROMPTS[0], PARAMS[0])
        assert engine.weight_version == 0
    engine.sleep()
    engine.wake()
    with pytest.raises(EngineError, match=TORN):
        engine.add(PROMPTS[0], PARAMS[0])
    assert engine.update_weights([old]) == 1
    assert answers(engine, PROMPTS, PARAMS) == before
    with pytest.raises(EngineError):
        engine.update_weights([some])
    assert engine.push_weights(old) == 2
    assert answers(engine, PROMPTS, PARAMS) == before


def test_not_while_requests_run() -> None:
    engine = own_engine("llama", "f16")
    engine.add(PROMPTS[0], PARAMS[0])
    with pytest.raises(EngineError, match="1 requests have not ended; push weights when"):
        engine.update_weights(one_by_one(old_and_new("llama", "f16")[1]))


def test_a_tied_head_may_come_in_another_part() -> None:
    engine = own_engine("gemma3", "f32")
    arrays = by_published_names("gemma3", dict(tiny_weights("gemma3", "f32")))
    head = {"lm_head.weight": arrays["model.embed_tokens.weight"]}
    assert engine.update_weights([head, arrays]) == 1
    with pytest.raises(EngineError, match="tied to the embedding in this model, and theirs differ"):
        engine.update_weights([arrays, {"lm_head.weight": -head["lm_head.weight"]}])


def test_names_of_the_bare_model() -> None:
    engine = own_engine("gpt2", "f16")
    _, new = old_and_new("gpt2", "f16")
    engine.update_weights(one_by_one({n.removeprefix("transformer."): a for n, a in new.items()}))
    other = own_engine("gpt2", "f16")
    other.push_weights(new)
    assert answers(engine, PROMPTS, PARAMS) == answers(other, PROMPTS, PARAMS)


def test_between_steps() -> None:
    async def test(engine: AsyncEngine) -> None:
        engine.engine = own_engine("llama", "f16")
        before = await read(engine, PROMPTS[0], params())
        _, new = old_and_new("llama", "f16")
        assert await engine.update_weights(one_by_one(new)) == 1
        after = await read(engine, PROMPTS[0], params())
        assert [d.token_ids for d in after] != [d.token_ids for d in before]

    run(test)


def test_counterparts_are_reached_the_same_way() -> None:
    parts = tiny_parts("gpt_oss", "f32")
    vectors = {n: w if isinstance(w, Weight) else w.copy() for n, w in parts.weights.items()}
    one = parts.build(provider())
    other = Loaded(parts.family, parts.config, parts.rules, vectors).build(provider())
    pairs = counterparts(one, other)
    assert pairs is not None
    kinds = {type(a) for a, _ in pairs}
    assert len(kinds) == 2 and all(a is not b and type(a) is type(b) for a, b in pairs)
    assert all(np.array_equal(a, b) for a, b in pairs if isinstance(a, np.ndarray))
    other.layers[0].attention.scale = 2.0  # type: ignore[attr-defined]
    assert counterparts(one, other) is None
    assert counterparts([1, 1], [1, 2]) is None and counterparts((1,), [1]) is None
    assert counterparts({"a": 1}, {"b": 1}) is None and counterparts(one, one) == []
