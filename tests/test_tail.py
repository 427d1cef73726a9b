"""What the configurations of the long tail may not say: each switch that is not implemented, and each
size that cannot be, is named. And what old GGUF files leave out."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest

from elinvar.base.errors import ModelError
from elinvar.models.registry import read_config
from families import CASES
from families.base import SIZES
from test_registry import LLAMA_GGUF, checkpoint

transformers = pytest.importorskip("transformers")


def published(case: str, **changes: Any) -> Any:
    """What reading the case's config.json gives."""
    one = CASES[case]
    config = getattr(transformers, one.config)(**deepcopy(SIZES | one.settings)).to_dict()
    architecture = one.architecture
    if one.published is not None:
        config, architecture = one.published.config(config), one.published.architecture
    metadata = config | {"architectures": [architecture]} | changes
    return read_config(checkpoint(architecture, metadata))


@pytest.mark.parametrize(
    ("case", "changes", "named"),
    [
        ("olmo2", {"attention_bias": True}, "attention_bias"),
        ("olmo3", {"layer_types": ["chunked_attention"]}, "layer_types"),
        ("olmo3", {"layer_types": ["full_attention"]}, "1 layer types are given for 5 layers"),
        ("glm4-moe", {"first_k_dense_replace": -1}, "first_k_dense_replace"),
        ("glm4-moe", {"first_k_dense_replace": True}, "first_k_dense_replace"),
        ("glm4-moe", {"scoring_func": "softmax"}, "scoring_func"),
        ("glm4-moe", {"n_group": 5}, "n_group"),
        ("chatglm", {"multi_query_attention": False}, "multi_query_attention"),
        ("chatglm", {"rmsnorm": False}, "rmsnorm"),
        ("chatglm", {"add_bias_linear": True}, "add_bias_linear"),
        ("chatglm", {"pre_seq_len": 128}, "pre_seq_len"),
        ("chatglm", {"quantization_bit": 4}, "quantization_bit"),
        ("chatglm", {"padded_vocab_size": None}, "padded_vocab_size"),
        ("internlm2", {"bias": True}, "bias"),
        ("internlm3", {"qkv_bias": True}, "qkv_bias"),
        ("minicpm", {"num_experts": 8}, "num_experts"),
        ("minicpm", {"sparse_config": {"topk": 64}}, "sparse_config"),
        ("minicpm", {"scale_depth": 0}, "scale_depth"),
        ("minicpm3", {"kv_lora_rank": 40}, "kv_lora_rank"),
        ("smollm3", {"no_rope_layers": [1, 2]}, "no_rope_layers"),
        ("smollm3", {"mlp_bias": True}, "mlp_bias"),
        ("seed-oss", {"attention_out_bias": True}, "attention_out_bias"),
        ("exaone4", {"sliding_window_pattern": "LG"}, "sliding_window_pattern"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm"),
        ("cohere2", {"logit_scale": -1}, "logit_scale"),
        ("minimax-m2", {"qk_norm_type": "per_head"}, "qk_norm_type"),
        ("minimax-m2", {"rotary_dim": 17}, "rotary_dim"),
        ("minimax-m2", {"num_experts_per_tok": 10}, "num_experts_per_tok"),
        ("granite-moe", {"num_local_experts": 0}, "num_local_experts"),
        ("ernie", {"use_bias": True}, "use_bias"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm"),
        ("gemma", {"hidden_act": "silu"}, "hidden_act"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("glm4-moe-lite", {"mlp_layer_types": ["sparse", "dense", "sparse"]}, "mlp_layer_types"),
        ("glm4-moe-lite", {"topk_method": "other"}, "topk_method"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
        ("ernie-moe", {"moe_k": 10}, "moe_k"),
        ("hunyuan", {"use_cla": True}, "use_cla"),
        ("hunyuan", {"rope_parameters": {"rope_type": "default", "alpha": 9.0}}, "rope_type"),
        ("ernie-moe", {"moe_use_aux_free": False}, "moe_use_aux_free"),
    ],
)
def test_what_is_not_implemented_is_named(case: str, changes: dict[str, Any], named: str) -> None:
    assert published(case).family == CASES[case].family
    with pytest.raises(ModelError, match=named):
        published(case, **changes)


def gguf(architecture: str, **more: Any) -> Any:
    keys = {k.replace("llama.", f"{architecture}."): v for k, v in LLAMA_GGUF.items()}
    extra = {f"{architecture}.{key.replace('__', '.')}": value for key, value in more.items()}
    return read_config(
        checkpoint(architecture, keys | extra | {"general.architecture": architecture})
    )


def test_old_files_of_minicpm_have_the_factors_of_the_first() -> None:
    config = gguf("minicpm")
    assert (config.embed_scale, config.logit_scale) == (12.0, 256 / 64)
    assert config.residual_scale == pytest.approx(1.4 / 3**0.5)


def test_which_layers_slide() -> None:
    flags = np.array([True, False, True])
    given = gguf("olmo2", attention__sliding_window=8, attention__sliding_window_pattern=flags)
    assert given.layer_kinds == ("sliding", "full", "sliding")
    assert gguf("olmo2", attention__sliding_window=8).layer_kinds == ("sliding",) * 3
    assert gguf("olmo2").layer_kinds == ("full",) * 3
    wrong = {"attention__sliding_window": 8, "attention__sliding_window_pattern": flags[:2]}
    with pytest.raises(ModelError, match="2 layer types are given for 3 layers"):
        gguf("olmo2", **wrong)


@pytest.mark.parametrize(
    ("architecture", "key", "value"),
    [
        ("glm4", "nextn_predict_layers", 1),
        ("granite", "rope__scaling__finetuned", False),
        ("granitemoe", "expert_shared_feed_forward_length", 64),
        ("mistral3", "expert_count", 4),
        ("minimax-m2", "expert_gating_func", 1),
        ("olmoe", "attention__clamp_kqv", 8.0),
    ],
)
def test_what_a_gguf_file_may_not_say(architecture: str, key: str, value: Any) -> None:
    with pytest.raises(ModelError, match=key.replace("__", ".")):
        gguf(architecture, **{key: value})
