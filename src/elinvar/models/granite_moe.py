"""Granite 3 MoE (IBM, 2024): Granite with a mixture of experts in every layer, stored in stacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from elinvar.base.config import ModelConfig
from elinvar.models import granite
from elinvar.models.experts import PARTS, mixture
from elinvar.models.family import Family
from elinvar.models.keys import Keys
from elinvar.models.llama import NORMS
from elinvar.models.shared import GGUF, HF, TO, attention_rules, norm_rules, outer_rules
from elinvar.weights.fixes import UnpermuteRows
from elinvar.weights.rules import Part, Rule
from elinvar.weights.tensor import HostTensor

MOE = HF + "block_sparse_moe."


def rules(config: ModelConfig) -> list[Rule]:
    """gate and up are one matrix of an expert; GGUF files hold them apart."""
    assert config.moe is not None
    d, n, f = config.dim, config.moe.num_experts, config.moe.ff_dim
    turns = UnpermuteRows(config.num_heads), UnpermuteRows(config.num_kv_heads)
    router = MOE + "router.layer.weight", GGUF + "ffn_gate_inp.weight"

    def expert(e: int, part: str) -> Rule:
        rows, k = (d, f) if part == "down" else (f, d)
        stored, of = "output_linear", Part((n, rows, k), e * rows)
        hf_of = of
        if part != "down":
            stored, hf_of = "input_linear", Part((n, 2 * f, d), 2 * f * e + (part == "up") * f)
        names = f"{TO}experts.{e}.{part}", f"{MOE}{stored}.weight", f"{GGUF}ffn_{part}_exps.weight"
        return Rule(*names, (rows, k), hf_part=hf_of, gguf_part=of)

    return [
        *norm_rules(NORMS, d),
        *attention_rules(config, *turns),
        Rule(TO + "router", *router, (n, d)),
        *(expert(e, part) for e in range(n) for part in PARTS),
        *outer_rules(config),
    ]


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    config = granite.config_from_hf(metadata)
    return _mixture(config, keys, "num_local_experts", "num_experts_per_tok")


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied."""
    keys = Keys(metadata, "The GGUF file", "granitemoe.")
    keys.only("expert_shared_feed_forward_length", 0)
    config = granite.config_from_gguf(metadata, tensors, "granitemoe.")
    return _mixture(config, keys, "expert_count", "expert_used_count")


def _mixture(config: ModelConfig, keys: Keys, count_key: str, used_key: str) -> ModelConfig:
    """The softmax is over the logits of the chosen alone."""
    layers = range(config.num_layers)
    moe = mixture(keys, count_key, used_key, config.ff_dim, layers, renormalise=True)
    return replace(config, family="granite_moe", moe=moe)


FAMILIES = (
    Family(
        name="granite_moe",
        models="Granite 3 MoE (1B-A400M, 3B-A800M)",
        hf_architectures=("GraniteMoeForCausalLM",),
        gguf_architectures=("granitemoe",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=granite.build,
    ),
)
