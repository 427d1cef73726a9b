"""Models with recurrent states: their configuration, what is said of their memory, and where an engine
begins from a snapshot. That answers do not depend on it is test_invariance.py's."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from elinvar.base.config import DeltaConfig, ModelConfig
from elinvar.base.errors import ModelError
from elinvar.base.sampling import SamplingParams
from elinvar.cli.describe import readable
from elinvar.engine.core import Engine
from elinvar.models import qwen3_5, qwen3_next
from elinvar.nn.attention import kv_specs
from elinvar.run.texts import Text, TextRunner
from engines import answers, provider, tiny_engine, tiny_model
from families.base import SIZES
from families.hybrid import DELTA, MOE, QWEN3_NEXT
from helpers import run_tokens

NEXT = SIZES | DELTA | MOE


def read(**changes: Any) -> ModelConfig:
    return qwen3_next.config_from_hf(NEXT | changes)


def test_layers_by_name_or_by_interval() -> None:
    assert read().layer_kinds == ("linear", "full", "linear")
    plain = {key: value for key, value in NEXT.items() if key != "layer_types"}
    config = qwen3_next.config_from_hf(plain | {"num_hidden_layers": 8})
    assert config.layer_kinds == ("linear", "linear", "linear", "full") * 2
    assert config.rope["full"].dim == 4, "a quarter of a head is rotated"
    assert read(layer_types=["full_attention"] * 3).delta is None


def test_a_model_of_experts_alone_does_not_say_how_large_a_dense_layer_is() -> None:
    given = {key: value for key, value in NEXT.items() if key != "intermediate_size"}
    assert qwen3_5.config_from_hf(given).ff_dim == MOE["moe_intermediate_size"]


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("linear_num_value_heads", 5, "a multiple of 2 key heads"),
        ("linear_key_head_dim", 4096, "1024"),
        ("linear_conv_kernel_dim", 0, "from 1 to 64"),
        ("layer_types", ["linear_attention", "sliding_attention"], "linear_attention"),
        ("layer_types", ["linear_attention"], "1 layer types are given for 3 layers"),
        ("full_attention_interval", 0, "a whole number"),
        ("attention_bias", True, "only false"),
        ("hidden_act", "gelu", "silu"),
        ("num_experts_per_tok", 11, "from 1 to 10"),
    ],
)
def test_what_cannot_be_run_is_refused(key: str, value: Any, problem: str) -> None:
    with pytest.raises(ModelError, match=rf"{key}.*{problem}|{problem}"):
        read(**{key: value})


def test_a_state_weighs_what_it_weighs() -> None:
    """Of Qwen3-Next: 36 layers of 32 heads of 128 x 128, and three inputs of 8,192 channels each."""
    big = DeltaConfig(key_heads=16, heads=32, key_dim=128, value_dim=128, taps=4)
    assert big.channels == 8192
    assert 36 * 4 * big.state_floats == 36 * (2**21 + 3 * 8192 * 4)
    _, states = kv_specs(QWEN3_NEXT, "f16")
    assert states.layers == (0, 1, 3)
    assert states.block_bytes == 3 * 4 * QWEN3_NEXT.delta.state_floats  # type: ignore[union-attr]


def test_models_show_says_so() -> None:
    config = asdict(QWEN3_NEXT) | {"layer_kinds": {"linear": 3, "full": 1}}
    facts: dict[str, Any] = {
        **{"path": "p", "architecture": "A", "format": "f", "parameters": 1, "config": config},
        **{"tensor_types": {}, "generation_config": {}, "problems": []},
    }
    assert "states         4 heads of 16 x 24: 30.3 kB a sequence" in readable(facts)


# ---- where an engine begins ---------------------------------------------------------------------


def cached(engine: Engine, prompt: list[int], max_tokens: int = 1) -> tuple[int, list[int]]:
    """Tokens of the prompt that were found, and the answer."""
    before = engine.metrics.cached_tokens
    params = SamplingParams(max_tokens=max_tokens, temperature=0, seed=0, ignore_eos=True)
    [(ids, _, _)] = answers(engine, [prompt], [params])
    return engine.metrics.cached_tokens - before, ids


def test_conversations_go_on_from_their_last_state() -> None:
    engine = tiny_engine("qwen3_next")
    turn = [i * 7 % 251 for i in range(150)]
    assert cached(engine, turn)[0] == 0
    assert cached(engine, turn)[0] == 128, "the same again"
    found, answer = cached(engine, turn, 60)
    assert found == 128
    assert cached(engine, [*turn, *answer, 1, 2, 3])[0] == 150 + 59, "all that was computed"


def test_a_shared_beginning_is_kept_once_two_have_parted() -> None:
    engine = tiny_engine("qwen3_next")
    system = [i * 5 % 241 for i in range(100)]
    hits = [cached(engine, [*system, *[user] * 90])[0] for user in (1, 2, 3, 4)]
    assert hits == [0, 0, 96, 96]


def test_vectors_of_texts() -> None:
    """A forward of whole texts, whose layers share one cache of each kind, as an engine's."""
    model = tiny_model(provider(), "qwen3_next", "f32")
    texts = [Text([i * 3 % 250 for i in range(n)]) for n in (70, 5, 33)]
    every, _ = TextRunner(model, provider()).hidden(texts, lambda starts: starts[1:] - 1)  # type: ignore[arg-type]
    for text, vector in zip(texts, every, strict=True):
        logits = run_tokens(model, provider(), list(text.ids), 16)
        own = model.logits(vector[None])  # type: ignore[attr-defined]
        assert np.array_equal(own[0], logits[-1])


def test_without_a_prefix_cache_one_state_is_enough() -> None:
    engine = tiny_engine("qwen3_next", prefix_cache=False)
    prompt = [i % 200 for i in range(100)]
    assert cached(engine, prompt, 80)[0] == cached(engine, prompt, 80)[0] == 0
