"""From a checkpoint to a configuration: layouts old and new, and every bad key named."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elinvar.base.config import ModelConfig, RopeConfig, YarnConfig
from elinvar.base.errors import ModelError
from elinvar.models.keys import MAX_LAYERS, MIN_DIVISOR, Keys, checked, rope_from_hf
from elinvar.models.registry import FAMILIES, find_family, read_config
from elinvar.nn.attention import kv_specs
from elinvar.nn.rope import MAX_POSITIONS, inverse_frequencies, ln
from elinvar.weights.checkpoint import Checkpoint
from elinvar.weights.tensor import HostTensor

LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "vocab_size": 101,
}
GEMMA = LLAMA | {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 7}
LLAMA_GGUF: dict[str, Any] = {
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 112,
    "llama.attention.head_count": 4,
    "llama.block_count": 3,
    "llama.context_length": 256,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 101,
}
GEMMA_GGUF = {k.replace("llama.", "gemma3."): v for k, v in LLAMA_GGUF.items()} | {
    "gemma3.attention.key_length": 16,
    "gemma3.attention.sliding_window": 8,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0] * 7 + [1.5],
    "long_factor": [1.0] * 4 + [32.0] * 4,
    "original_max_position_embeddings": 64,
}


def checkpoint(
    architecture: str, metadata: dict[str, Any], tensors: dict[str, HostTensor] | None = None
) -> Checkpoint:
    is_hf = architecture[0].isupper()
    form: Any = "safetensors" if is_hf else "gguf"
    return Checkpoint(Path("model"), form, architecture, metadata, tensors or {}, "0" * 64)


def llama(**changes: Any) -> ModelConfig:
    return read_config(checkpoint("LlamaForCausalLM", LLAMA | changes))


def gemma(**changes: Any) -> ModelConfig:
    return read_config(checkpoint("Gemma3ForCausalLM", GEMMA | changes))


def tensor(name: str, values: list[float]) -> HostTensor:
    data = np.array([values], "<f4").view(np.uint8)
    return HostTensor(name, (len(values),), "F32", data)


def test_an_unknown_architecture_lists_the_known_families() -> None:
    for name in ("MambaForCausalLM", "mamba"):
        with pytest.raises(ModelError, match=f"{name}, .* llama, .* gemma3, .*models support'"):
            find_family(checkpoint(name, {}))


def test_families_are_found_by_their_names() -> None:
    for family in FAMILIES:
        for name in family.hf_architectures + family.gguf_architectures:
            assert find_family(checkpoint(name, {})) is family


def test_defaults_of_old_llama_files() -> None:
    plain = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    config = read_config(checkpoint("LlamaForCausalLM", plain))
    assert (config.num_kv_heads, config.head_dim, config.tied_head) == (4, 16, False)
    assert config.rope == {"full": RopeConfig(10_000.0, 16)}
    assert config.attn_scale == 0.25
    assert config.layer_kinds == ("full",) * 3


def test_rope_layouts_before_and_since_transformers_5() -> None:
    scaled = RopeConfig(500_000.0, 16, llama3=(8.0, 1.0, 4.0, 32))
    assert llama(rope_theta=500_000, rope_scaling=LLAMA3).rope["full"] == scaled
    assert llama(rope_parameters=LLAMA3 | {"rope_theta": 500_000.0}).rope["full"] == scaled
    linear = llama(rope_scaling={"type": "linear", "factor": 4.0})
    assert linear.rope["full"] == RopeConfig(10_000.0, 16, factor=4.0)

    old = gemma(
        rope_theta=1_000_000,
        rope_local_base_freq=10_000,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    new = gemma(
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    )
    assert old.rope == new.rope
    assert old.rope["full"].factor == 8.0
    assert old.rope["sliding"] == RopeConfig(10_000.0, 16)


def test_yarn_and_longrope() -> None:
    plain = llama(rope_scaling=YARN).rope["full"]
    assert plain.yarn == YarnConfig(4.0, 64) and plain.attention_factor == 0.1 * ln(4.0) + 1
    both = YARN | {"mscale": 0.7, "mscale_all_dim": 0.7, "beta_fast": 16, "truncate": False}
    even = llama(rope_parameters=both).rope["full"]
    assert even.yarn == YarnConfig(4.0, 64, 16.0, truncate=False) and even.attention_factor == 1
    given = llama(rope_scaling=YARN | {"factor": None, "attention_factor": 1.25}).rope["full"]
    assert given == RopeConfig(10_000.0, 16, yarn=YarnConfig(4.0, 64), attention_factor=1.25)
    assert (
        llama(rope_scaling={"type": "dynamic", "factor": 2.0}).rope["full"] == llama().rope["full"]
    )

    long = llama(rope_scaling=LONGROPE).rope["full"]
    assert long.divisors == (1.0,) * 4 + (32.0,) * 4
    assert long.attention_factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(64)))
    short = llama(rope_scaling=LONGROPE, max_position_embeddings=64).rope["full"]
    assert short == RopeConfig(10_000.0, 16, divisors=(1.0,) * 7 + (1.5,))


def test_yarn_and_longrope_from_gguf() -> None:
    scaling = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    scaling["llama.rope.scaling.original_context_length"] = 64
    scaling["llama.rope.dimension_count"] = 16
    found = read_config(checkpoint("llama", LLAMA_GGUF | scaling)).rope["full"]
    assert found == llama(rope_scaling=YARN).rope["full"]
    factors = {
        name: tensor(name, LONGROPE[key])  # type: ignore[arg-type]
        for key, name in (
            ("long_factor", "rope_factors_long.weight"),
            ("short_factor", "rope_factors_short.weight"),
        )
    }
    keys = {
        "llama.rope.scaling.original_context_length": 64,
        "llama.rope.scaling.attn_factor": 1.5,
    }
    long = read_config(checkpoint("llama", LLAMA_GGUF | keys, factors)).rope["full"]
    assert long.divisors == (1.0,) * 4 + (32.0,) * 4 and long.attention_factor == 1.5
    short = LLAMA_GGUF | keys | {"llama.context_length": 64}
    assert read_config(checkpoint("llama", short, factors)).rope["full"].divisors[-1] == 1.5  # type: ignore[index]


@pytest.mark.parametrize(("partial", "dim"), [(None, 16), (0.25, 4), (0.0, 0)])
def test_a_part_of_a_head_may_be_rotated(partial: float | None, dim: int) -> None:
    params = {} if partial is None else {"partial_rotary_factor": partial}
    assert rope_from_hf(Keys(params, "config.json"), 10_000.0, 16, 64, partial=1.0).dim == dim
    assert rope_from_hf(Keys({}, "config.json"), 10_000.0, 16, 64, partial=0.5).dim == 8
    rope = RopeConfig(10_000.0, dim)
    assert checked(replace(llama(), rope={"full": rope}), "it").rope == {"full": rope}
    for wrong in (dim + 1, 18, -2):
        with pytest.raises(ModelError, match="even part"):
            checked(replace(llama(), rope={"full": RopeConfig(10_000.0, wrong)}), "it")


def test_gemma_layer_kinds() -> None:
    kinds = ("sliding",) * 5 + ("full", "sliding")
    assert gemma().layer_kinds == kinds
    assert gemma(sliding_window_pattern=2).layer_kinds == ("sliding", "full") * 3 + ("sliding",)
    types = ["full_attention"] * 7
    assert gemma(layer_types=types).layer_kinds == ("full",) * 7
    assert gemma(layer_types=types).window == 8
    assert gemma(query_pre_attn_scalar=64).attn_scale == 0.125
    assert gemma().embed_scale == 8.0


def test_gguf_says_less_and_tensors_say_the_rest() -> None:
    config = read_config(checkpoint("llama", LLAMA_GGUF))
    assert (config.num_kv_heads, config.head_dim, config.tied_head) == (4, 16, True)
    head = {"output.weight": tensor("output.weight", [1.0])}
    assert not read_config(checkpoint("llama", LLAMA_GGUF, head)).tied_head
    rows = HostTensor("token_embd.weight", (77, 64), "F32", np.empty((77, 256), np.uint8))
    found = read_config(checkpoint("llama", LLAMA_GGUF, {"token_embd.weight": rows}))
    assert found.vocab_size == 77
    gemma_config = read_config(checkpoint("gemma3", GEMMA_GGUF))
    assert gemma_config == gemma(
        num_key_value_heads=4, num_hidden_layers=3, query_pre_attn_scalar=16
    )


def test_gemma2_soft_caps_and_scale() -> None:
    def gemma2(**changes: Any) -> ModelConfig:
        return read_config(checkpoint("Gemma2ForCausalLM", GEMMA | changes))

    def gemma2_gguf(**changes: Any) -> ModelConfig:
        keys = {k.replace("gemma3.", "gemma2."): v for k, v in GEMMA_GGUF.items()}
        return read_config(
            checkpoint("gemma2", keys | {f"gemma2.{k}": v for k, v in changes.items()})
        )

    plain = gemma2()
    assert plain.layer_kinds == ("sliding", "full") * 3 + ("sliding",)
    assert (plain.attn_softcap, plain.final_softcap, plain.attn_scale) == (50.0, 30.0, 1 / 16)
    off = gemma2(attn_logit_softcapping=None, final_logit_softcapping=7)
    assert (off.attn_softcap, off.final_softcap) == (None, 7.0)
    same = {"num_key_value_heads": 4, "num_hidden_layers": 3, "query_pre_attn_scalar": 16}
    assert gemma2_gguf() == gemma2(**same)
    assert gemma2_gguf(attn_logit_softcapping=5.0) == gemma2(**same, attn_logit_softcapping=5)
    # The 27B model, whose scale is not its head dim's.
    assert gemma2_gguf(block_count=46, **{"attention.key_length": 32}).attn_scale == 0.25
    with pytest.raises(ModelError, match="final_logit_softcapping = 0"):
        gemma2(final_logit_softcapping=0)


def test_gguf_divisors_equal_llama3_scaling() -> None:
    scaled = llama(rope_theta=500_000, rope_scaling=LLAMA3).rope["full"]
    plain = inverse_frequencies(RopeConfig(500_000.0, 16))
    divisors = (plain / inverse_frequencies(scaled)).tolist()
    name = "rope_freqs.weight"
    metadata = LLAMA_GGUF | {"llama.rope.freq_base": 500_000.0}
    config = read_config(checkpoint("llama", metadata, {name: tensor(name, divisors)}))
    np.testing.assert_allclose(
        inverse_frequencies(config.rope["full"]), inverse_frequencies(scaled), rtol=2e-7
    )
    for bad in ([1.0] * 7, [1.0] * 7 + [0.0], [1.0] * 7 + [float("nan")]):
        with pytest.raises(ModelError, match="divisors"):
            read_config(checkpoint("llama", metadata, {name: tensor(name, bad)}))


def test_context_is_capped_where_rotary_angles_stay_exact() -> None:
    assert llama(max_position_embeddings=10_000_000).max_context == MAX_POSITIONS


@pytest.mark.parametrize("key", sorted(LLAMA))
def test_missing_and_senseless_keys_are_named(key: str) -> None:
    if key != "num_key_value_heads":
        without = {k: v for k, v in LLAMA.items() if k != key}
        with pytest.raises(ModelError, match=f"lacks {key}"):
            read_config(checkpoint("LlamaForCausalLM", without))
    for value in (0, -1, "8", True, [4], float("inf"), 1 << 40):
        if key == "rms_norm_eps" and value == 1 << 40:
            continue
        with pytest.raises(ModelError, match=key):
            llama(**{key: value})


@pytest.mark.parametrize("key", sorted(GEMMA_GGUF))
def test_missing_gguf_keys_are_named(key: str) -> None:
    if key.endswith("key_length"):
        return
    without = {k: v for k, v in GEMMA_GGUF.items() if k != key}
    with pytest.raises(ModelError, match=f"lacks {key}"):
        read_config(checkpoint("gemma3", without))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"head_dim": 2048}, "larger than the kernels take"),
        ({"num_attention_heads": 256, "num_key_value_heads": 1, "head_dim": 16}, "larger than"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
        ({"hidden_size": 66}, "head_dim"),
        ({"head_dim": 15}, "odd"),
        ({"num_hidden_layers": MAX_LAYERS + 1}, "num_hidden_layers"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"rope_theta": 0.5}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_scaling": 3}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 4.0}}, "ntk"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, "factor"),
        ({"rope_scaling": YARN | {"beta_fast": 0.5}}, "beta_fast"),
        ({"rope_scaling": YARN, "rope_theta": 1}, "rope_theta"),
        ({"rope_scaling": LONGROPE | {"long_factor": [1.0] * 7}}, "long_factor"),
        ({"rope_scaling": LONGROPE | {"long_factor": [0.5] * 8}}, "divisors"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 0.9}}, "high_freq_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_what_llama_cannot_be(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        llama(**changes)


DEEPSEEK = LLAMA | {
    "model_type": "deepseek_v3",
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 16,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
}


def test_deepseek_from_its_published_keys() -> None:
    yarn = YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    settings = DEEPSEEK | {"rope_scaling": yarn, "scoring_func": "sigmoid"}
    config = read_config(checkpoint("DeepseekV3ForCausalLM", settings))
    assert (config.num_kv_heads, config.head_dim, config.rope["full"].dim) == (1, 40, 8)
    assert config.attn_scale == pytest.approx(32**-0.5 * (0.1 * np.log(40) + 1) ** 2)
    assert config.rope["full"].attention_factor == 1
    assert config.moe is not None and config.latent is not None
    assert (config.moe.scoring, config.moe.biased, config.moe.renormalise) == (
        "sigmoid",
        True,
        True,
    )
    [spec] = kv_specs(config, "f16")
    assert spec.block_bytes == config.num_layers * 32 * 48 * 2  # dims padded to 16s
    [spec] = kv_specs(config, "int8")
    assert spec.block_bytes == config.num_layers * 32 * (48 + 4)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kv_lora_rank": 40}, "kv_lora_rank"),
        ({"v_head_dim": 8}, "v_head_dim"),
        ({"qk_rope_head_dim": 7}, "odd"),
        ({"q_lora_rank": 0}, "q_lora_rank"),
        ({"rope_interleave": False}, "rope_interleave"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace"),
        ({"topk_method": "greedy", "norm_topk_prob": True}, "norm_topk_prob"),
        ({"topk_method": "best"}, "topk_method"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"n_group": 3}, "n_group"),
        ({"topk_group": 5}, "topk_group"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
    ],
)
def test_what_deepseek_cannot_be(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        read_config(checkpoint("DeepseekV3ForCausalLM", DEEPSEEK | changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sliding_window": None}, "sliding_window"),
        ({"layer_types": ["full_attention"]}, "1 layer types"),
        ({"layer_types": ["chunked_attention"] * 7}, "layer_types"),
        ({"layer_types": [["full_attention"]] * 7}, "layer_types"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"hidden_activation": "gelu"}, "hidden_activation"),
        ({"rope_parameters": {"full_attention": [1]}}, "full_attention"),
    ],
)
def test_what_gemma_cannot_be(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        gemma(**changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"llama.rope.dimension_count": 8}, "dimension_count"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.factor"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
        ({"llama.expert_count": 8}, "expert_used_count"),
        ({"llama.expert_count": np.array([8, 8])}, "expert_count"),
        ({"llama.attention.head_count": np.array([4, 4, 2])}, "head_count"),
    ],
)
def test_what_a_llama_gguf_cannot_be(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        read_config(checkpoint("llama", LLAMA_GGUF | changes))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=4,
)
ROPE_KEYS = st.sampled_from(
    [
        *(LLAMA3 | LONGROPE),
        *("rope_theta", "full_attention", "sliding_attention"),
        *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"),
    ]
)
ROPE_VALUES = JSON | st.sampled_from([LLAMA3, YARN, LONGROPE, "yarn", "longrope", [1.0] * 8])
HF_KEYS = st.sampled_from(
    [
        *GEMMA,
        *("rope_theta", "rope_local_base_freq", "layer_types", "sliding_window_pattern"),
        *("tie_word_embeddings", "query_pre_attn_scalar", "hidden_act", "rope_scaling"),
    ]
)


@settings(suppress_health_check=[HealthCheck.too_slow])  # of a busy machine
@given(
    st.sampled_from(["LlamaForCausalLM", "Gemma3ForCausalLM"]),
    st.dictionaries(HF_KEYS, JSON, max_size=3),
    st.dictionaries(ROPE_KEYS, ROPE_VALUES),
)
def test_junk_in_config_json_is_a_model_error(
    architecture: str, changes: dict[str, Any], rope: dict[str, Any]
) -> None:
    metadata = GEMMA | {"rope_parameters": rope} | changes
    try:
        config = read_config(checkpoint(architecture, metadata))
    except ModelError:
        return
    # (A decimal power for each of a million frequencies would only take long.)
    for rope in (r for r in config.rope.values() if r.dim <= 1024):
        frequencies = inverse_frequencies(rope)
        assert np.isfinite(frequencies).all() and (frequencies <= 1 / MIN_DIVISOR).all()
