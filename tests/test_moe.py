"""Families with mixtures of experts: from GGUF files, where a layer's experts lie in one stack; what
their configurations must say; what a step of them costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from elinvar.base.errors import ModelError
from elinvar.base.sampling import SamplingParams
from elinvar.models.registry import read_config
from elinvar.ops import cost, load_provider
from elinvar.ops.arguments import Experts
from elinvar.ops.profiled import ProfiledOps
from engines import random_weight, tiny_engine
from families.base import SIZES
from test_registry import checkpoint

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")

MIXTURES: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": {"num_local_experts": 4},
    "Qwen2MoeForCausalLM": {"num_experts": 4, "shared_expert_intermediate_size": 32},
    "Qwen3MoeForCausalLM": {"num_experts": 4},
    "GptOssForCausalLM": {"num_local_experts": 4, "sliding_window": 8},
    "Llama4ForCausalLM": {"num_local_experts": 4, "intermediate_size_mlp": 96},
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
