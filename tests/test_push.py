"""Weights pushed by a trainer: answers are those of the model pushed, to the bit, and caches forget."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from adapters import adapted_engine, random_adapter
from elinvar.base.errors import EngineError, ModelError
from elinvar.base.sampling import SamplingParams
from elinvar.models.load import Loaded
from elinvar.models.registry import FAMILIES
from elinvar.ops import Weight
from elinvar.ops.layout import pack_float, unpack
from elinvar.weights.rules import bind
from elinvar.weights.save import stored_tensor
from engines import answers, provider, tiny_engine, tiny_parts, tiny_weights
from families import ENGINES

BY_NAME = {family.name: family for family in FAMILIES}
PROMPTS = [[5, 9, 1] * 30, [7] * 40]
PARAMS = [SamplingParams(max_tokens=8, temperature=t, seed=3, logprobs=2) for t in (0.0, 1.0)]


def other_weights(family: str, kind: str) -> dict[str, Any]:
    """Those of the tiny engine, but for every matrix."""

    def changed(name: str, value: Any) -> Any:
        if not isinstance(value, Weight):
            return value
        w = unpack(value)[::-1] * np.float32(-1)
        return pack_float("f16" if kind == "f16" else "f32", w)

    return {name: changed(name, value) for name, value in tiny_weights(family, kind).items()}


def by_published_names(family: str, weights: dict[str, Any]) -> dict[str, np.ndarray]:
    """As save_state would write them."""
    sources: dict[str, list[Any]] = {}
    config = ENGINES[family]
    for binding in bind(BY_NAME[family].rules(config), "safetensors", config.num_layers):
        sources.setdefault(binding.source, []).append(binding)
    arrays = {}
    for source, bindings in sources.items():
        tensor = stored_tensor(bindings, weights)
        dtype = {"F32": np.float32, "F16": np.float16}[tensor.dtype]
        arrays[source] = tensor.data.view(dtype).reshape(tensor.shape)
    return arrays


@pytest.mark.parametrize("names", ["published", "canonical"])
@pytest.mark.parametrize("family", BY_NAME)
def test_pushed_weights_answer_like_the_model_they_come_from(family: str, names: str) -> None:
    kind = "f16" if names == "published" else "f32"
    weights = other_weights(family, kind)
    model = BY_NAME[family].build(ENGINES[family], weights, provider())
    expected = answers(tiny_engine(family, kind, model=model), PROMPTS, PARAMS)
    engine = tiny_engine(family, kind)
    before, fingerprint = answers(engine, PROMPTS, PARAMS), engine.fingerprint
    if names == "published":
        arrays = by_published_names(family, weights)
    else:
        arrays = {n: unpack(w) if isinstance(w, Weight) else w for n, w in weights.items()}
    assert engine.push_weights(arrays) == engine.weight_version == 1
    cached = engine.metrics.cached_tokens
    after = answers(engine, PROMPTS, PARAMS)
    assert engine.metrics.cached_tokens == cached
    assert after == expected != before
    assert answers(engine, PROMPTS, PARAMS) == expected
    assert engine.metrics.cached_tokens > cached
    assert engine.fingerprint != fingerprint


def test_what_does_not_fit_changes_nothing() -> None:
    engine = tiny_engine("qwen2", "f16")
    before = answers(engine, PROMPTS, PARAMS)
    good = by_published_names("qwen2", tiny_weights("qwen2", "f16"))
    gone = "model.layers.0.self_attn.q_proj.bias"

    def message(**changes: Any) -> str:
        with pytest.raises(ModelError) as caught:
            engine.push_weights({k: v for k, v in (good | changes).items() if v is not None})
        return str(caught.value)

    begin, end = "The pushed weights do not fit the model: ", "; nothing was changed."
    norm = np.ones(3, np.float32)
    assert message(**{gone: None}) == f"{begin}missing are {gone}{end}"
    assert message(strange=norm) == f"{begin}unknown are strange{end}"
    assert message(**{"model.norm.weight": norm, "lm_head.weight": None}) == (
        f"{begin}missing are lm_head.weight; of another shape are model.norm.weight [3] for [64]{end}"
    )
    assert "uint16 (bfloat16's bits) are model.norm.weight (float64)" in message(
        **{"model.norm.weight": np.ones(64)}
    )
    with pytest.raises(ModelError, match=r"missing are .* and 24 more; nothing was changed"):
        engine.push_weights({})
    assert engine.weight_version == 0
    assert answers(engine, PROMPTS, PARAMS) == before


def test_biases_that_the_model_has_are_missed() -> None:
    engine = tiny_engine("starcoder2", "f32")
    arrays = by_published_names("starcoder2", tiny_weights("starcoder2", "f32"))
    del arrays["model.layers.1.mlp.c_fc.bias"]
    with pytest.raises(ModelError, match=r"missing are model\.layers\.1\.mlp\.c_fc\.bias; nothing"):
        engine.push_weights(arrays)


def test_running_requests_keep_their_weights() -> None:
    engine = tiny_engine("llama", "f32")
    arrays = by_published_names("llama", tiny_weights("llama", "f32"))
    engine.add(PROMPTS[0], PARAMS[0])
    engine.step()
    with pytest.raises(EngineError, match="1 requests have not ended; push weights when"):
        engine.push_weights(arrays)
    while engine.has_work:
        engine.step()
    assert engine.push_weights(arrays) == 1


def test_bfloat16_comes_as_its_bits() -> None:
    weights = tiny_weights("llama", "bf16")
    expected = answers(tiny_engine("llama", "bf16"), PROMPTS, PARAMS)
    arrays = {
        n: (unpack(w).view(np.uint32) >> 16).astype(np.uint16) if isinstance(w, Weight) else w
        for n, w in weights.items()
    }
    engine = tiny_engine("llama", "q4")
    engine.push_weights(arrays)
    assert answers(engine, PROMPTS, PARAMS) == expected


def test_a_tied_head_may_be_named_twice() -> None:
    engine = tiny_engine("gemma3", "f32")
    arrays = by_published_names("gemma3", tiny_weights("gemma3", "f32"))
    embed = arrays["model.embed_tokens.weight"]
    assert engine.push_weights(arrays | {"lm_head.weight": embed}) == 1
    with pytest.raises(ModelError, match=r"unknown are lm_head\.weight"):
        engine.push_weights(arrays | {"lm_head.weight": embed + 1})


def test_a_model_that_cannot_be_built_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = adapted_engine("llama", "f32")
    for name in ("one", "two"):
        engine.unload_adapter(name)
    before, own = answers(engine, PROMPTS, PARAMS), random_adapter(tiny_parts("llama", "f32"), 1)
    weights = other_weights("llama", "f32")
    arrays = {n: unpack(w) if isinstance(w, Weight) else w for n, w in weights.items()}
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Loaded, "build", _no_memory)
        engine.push_weights(arrays)
    assert engine.weight_version == 0
    assert answers(engine, PROMPTS, PARAMS) == before
    engine.add_adapter("one", own)


def _no_memory(parts: Loaded, ops: Any) -> Any:
    raise MemoryError
