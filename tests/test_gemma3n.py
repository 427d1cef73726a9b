"""Gemma 3n: what the configurations of published models say, and what they cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elinvar.base.errors import ModelError
from elinvar.models.registry import read_config
from elinvar.ops import load_provider
from families.gemma3n import GEMMA3N
from helpers import run_tokens
from test_models_tiny import load_f32, make_reference, prompt, save
from test_registry import checkpoint

E4B: dict[str, Any] = {
    "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 25,
    "altup_active_idx": 0,
    "altup_num_inputs": 4,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2048,
    "hidden_size_per_layer_input": 256,
    "intermediate_size": [16384] * 35,
    "laurel_rank": 64,
    "max_position_embeddings": 32768,
    "num_attention_heads": 8,
    "num_hidden_layers": 35,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 15,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "vocab_size": 262400,
    "vocab_size_per_layer_input": 262144,
}


def test_e4b() -> None:
    config = read_config(checkpoint("Gemma3nForCausalLM", E4B))
    assert config.streams is not None and config.streams.kv_layers == 20
    assert config.streams.deviations == (pytest.approx(1.6448536),) * 10 + (None,) * 25
    assert (config.ff_dim, config.layer_kinds.count("full")) == (16384, 7)
    assert (config.rope["full"].base, config.rope["sliding"].base) == (1e6, 1e4)
    default = {k: v for k, v in E4B.items() if k != "activation_sparsity_pattern"}
    assert read_config(checkpoint("Gemma3nForCausalLM", default)) == config


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_kv_shared_layers": 35}, "num_kv_shared_layers"),
        ({"num_kv_shared_layers": 32}, "num_kv_shared_layers"),
        ({"num_kv_shared_layers": -1}, "num_kv_shared_layers"),
        ({"activation_sparsity_pattern": [0.5]}, "activation_sparsity_pattern"),
        ({"activation_sparsity_pattern": 1.0}, "activation_sparsity_pattern"),
        ({"intermediate_size": [128] * 34 + [64]}, "intermediate_size"),
        ({"altup_active_idx": 1}, "altup_active_idx"),
        ({"altup_num_inputs": 9}, "altup_num_inputs"),
        ({"laurel_rank": None}, "laurel_rank"),
    ],
)
def test_what_it_cannot_be(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        read_config(checkpoint("Gemma3nForCausalLM", E4B | changes))


def test_only_layers_with_keys_have_a_cache(tmp_path: Path) -> None:
    save("gemma3n", make_reference("gemma3n"), tmp_path)
    ops = load_provider("cpu")
    model = load_f32(tmp_path, ops)
    assert sorted(i for spec in model.kv_specs("f16") for i in spec.layers) == [0, 1, 2, 3, 4]
    assert GEMMA3N.streams is not None and GEMMA3N.streams.own_vocab < GEMMA3N.vocab_size
    # Tokens beyond the layers' own embeddings count as token 0 there.
    both = [run_tokens(model, ops, [*prompt()[:5], token]) for token in (95, 96)]
    assert np.isfinite(both).all() and not np.array_equal(*both)
