"""Qwen3.5 (Qwen Team, 2026), its text model, dense and with experts: Qwen3-Next's layers, whose delta nets
have a matrix of their own for each thing that gates them.

Its checkpoints see, too: their vision towers and the weights of multi-token prediction are left alone.
For text the three sections of its rotary embedding turn by the same positions: it is the plain one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elinvar.base.config import ModelConfig
from elinvar.models.experts import stacked_rules
from elinvar.models.family import Family
from elinvar.models.hybrid import DELTA, build, common_rules, hybrid_from_hf, on_layers
from elinvar.models.keys import Keys
from elinvar.models.shared import TO
from elinvar.weights.rules import Part, Rule


def rules(config: ModelConfig) -> list[Rule]:
    """Experts lie in stacks or each by itself."""
    stacks = stacked_rules(config, transposed=False) if config.moe else []
    return [*common_rules(config), *on_layers(config, "linear", _separate_rules(config)), *stacks]


def _separate_rules(config: ModelConfig) -> list[Rule]:
    c, d = config.delta, config.dim
    if c is None:
        return []
    keys, values = c.key_heads * c.key_dim, c.heads * c.value_dim
    table, at = [], 0
    for name, rows in (("q", keys), ("k", keys), ("v", values)):
        part = Part((c.channels, d), at)
        stored = DELTA + "in_proj_qkv.weight"
        table.append(Rule(f"{TO}delta_{name}", stored, None, (rows, d), hf_part=part))
        at += rows
    for name, rows in (("z", values), ("b", c.heads), ("a", c.heads)):
        table.append(Rule(f"{TO}delta_{name}", f"{DELTA}in_proj_{name}.weight", None, (rows, d)))
    return table


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    # A model whose layers all have experts does not say how large its dense ones would be.
    if not keys.has("intermediate_size"):
        keys = keys.replaced({"intermediate_size": keys.raw("moe_intermediate_size")})
    return hybrid_from_hf("qwen3_5", keys)


FAMILIES = (
    Family(
        name="qwen3_5",
        models="Qwen3.5 (text), dense and MoE",
        hf_architectures=(
            *("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
            *("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
        ),
        gguf_architectures=(),
        config_from_hf=config_from_hf,
        config_from_gguf=None,
        rules=rules,
        build=build,
    ),
)
