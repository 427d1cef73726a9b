"""Families with mixtures of experts: from GGUF files, where a layer's experts lie in one stack; what
their configurations must say; what a step of them costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elinvar.base.errors import ModelError
from elinvar.base.sampling import SamplingParams
from elinvar.models.registry import load_model, read_config
from elinvar.ops import cost, load_provider
from elinvar.ops.api import Experts
from elinvar.ops.profiled import ProfiledOps
from elinvar.weights.checkpoint import open_checkpoint
from engines import random_weight, tiny_engine
from families.base import SIZES
from helpers import assert_parity, run_tokens
from test_models_tiny import make_reference, prompt, reference_logits
from test_registry import checkpoint

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")

NAMES = {
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
}


def write_gguf(reference: Any, architecture: str, path: Path) -> None:
    """What llama.cpp's converter makes of the reference."""
    config = reference.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    first = reference.model.layers[0].mlp
    writer.add_expert_count(first.experts.num_experts)
    writer.add_expert_used_count(first.gate.top_k)
    if architecture != "llama":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if architecture == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    writer.add_tensor("output.weight", reference.lm_head.weight.detach().numpy())
    for name, parameter in reference.model.named_parameters():
        values = parameter.detach().numpy()
        at = ""
        if name.startswith("layers."):
            _, layer, name = name.split(".", 2)
            at = f"blk.{layer}."
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            halves = values.reshape(-1, 2, config.head_dim // 2, values.shape[1])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        if name == "mlp.experts.gate_up_proj":
            for part, half in zip(("gate", "up"), np.split(values, 2, axis=1), strict=True):
                writer.add_tensor(f"{at}ffn_{part}_exps.weight", np.ascontiguousarray(half))
        else:
            if name == "mlp.shared_expert_gate.weight" and at == "blk.0.":
                values = values[0]  # some files hold a vector, some a matrix of one row
            writer.add_tensor(at + NAMES[name], np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("case", "architecture"),
    [("mixtral", "llama"), ("qwen2-moe", "qwen2moe"), ("qwen3-moe", "qwen3moe")],
)
def test_gguf_parity(case: str, architecture: str, tmp_path: Path) -> None:
    reference = make_reference(case)
    write_gguf(reference, architecture, tmp_path / "tiny.gguf")
    ops = load_provider("cpu")
    model = load_model(open_checkpoint(tmp_path / "tiny.gguf"), ops, weight_format="f32")
    assert_parity(run_tokens(model, ops, prompt()), reference_logits(reference, prompt()))


MIXTURES: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": {"num_local_experts": 4},
    "Qwen2MoeForCausalLM": {"num_experts": 4, "shared_expert_intermediate_size": 32},
    "Qwen3MoeForCausalLM": {"num_experts": 4},
    "GptOssForCausalLM": {"num_local_experts": 4, "sliding_window": 8},
}


@pytest.mark.parametrize("architecture", MIXTURES)
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok"),
        ({"num_experts": 0, "num_local_experts": 0}, "experts"),
        ({"num_experts": 10**9, "num_local_experts": 10**9}, "experts"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"moe_intermediate_size": -1, "intermediate_size": -1}, "intermediate_size"),
        ({"mlp_only_layers": 3, "num_experts_per_tok": 5}, "mlp_only_layers|num_experts_per_tok"),
    ],
)
def test_what_a_mixture_cannot_be(architecture: str, changes: dict[str, Any], named: str) -> None:
    plain = SIZES | {"rms_norm_eps": 1e-5, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    assert read_config(checkpoint(architecture, plain | MIXTURES[architecture])).moe is not None
    with pytest.raises(ModelError, match=named):
        read_config(checkpoint(architecture, plain | MIXTURES[architecture] | changes))


def test_a_mixture_reads_the_experts_that_tokens_go_to() -> None:
    rng = np.random.default_rng(0)
    gates, ups = ([random_weight(rng, "q4", 64, 32) for _ in range(8)] for _ in range(2))
    experts = Experts(gates, ups, [random_weight(rng, "q4", 32, 64) for _ in range(8)])
    ids = np.array([[0, 3], [3, 7], [0, 7]], np.int32)
    found = cost.moe(np.zeros((3, 32), np.float32), ids, np.ones_like(ids), experts, "silu")
    assert found.streamed == 3 * 3 * 64 * 20  # three experts of the eight, a group is 20 bytes
    assert found.ops == 6 * 3 * 2 * 64 * 32 and found.unit == "int8"
    assert found.label == "8 x q4 64x32 + q4 64x32 + q4 32x64, top 2"


def test_a_replay_knows_the_routes_of_its_step() -> None:
    ops = ProfiledOps(load_provider("cpu", 1))
    engine = tiny_engine("mixtral", ops=ops)  # type: ignore[arg-type]
    engine.add([1, 2, 3], SamplingParams(max_tokens=3, ignore_eos=True))
    engine.step()
    expert = 3 * 96 * 64 // 32 * 20
    while engine.has_work:
        with ops.recording() as recording:
            engine.step()
        calls = [call.cost.streamed for call in recording.calls if call.op == "moe"]
        assert calls == [2 * expert] * 2
