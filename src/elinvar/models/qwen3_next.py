"""Qwen3-Next (Qwen Team, 2025): gated delta nets and gated attention, with mixtures of many experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from elinvar.base.config import ModelConfig
from elinvar.models.family import Family
from elinvar.models.hybrid import DELTA, build, common_rules, hybrid_from_hf, on_layers
from elinvar.models.keys import Keys
from elinvar.models.mtp import PREDICTOR
from elinvar.models.shared import TO
from elinvar.weights.rules import Part, Rule


def rules(config: ModelConfig) -> list[Rule]:
    """What a delta net multiplies its input by lies in two matrices, by key heads."""
    return [*common_rules(config), *on_layers(config, "linear", _merged_rules(config))]


def _merged_rules(config: ModelConfig) -> list[Rule]:
    c, d = config.delta, config.dim
    if c is None:
        return []
    each = c.heads // c.key_heads
    table: list[Rule] = []
    for matrix, sizes in (
        ("qkvz", [c.key_dim, c.key_dim, each * c.value_dim, each * c.value_dim]),
        ("ba", [each, each]),
    ):
        whole, at = sum(sizes), 0
        for name, size in zip(matrix, sizes, strict=True):
            part = Part((c.key_heads * whole, d), at, size, whole)
            stored = f"{DELTA}in_proj_{matrix}.weight"
            table.append(
                Rule(f"{TO}delta_{name}", stored, None, (c.key_heads * size, d), hf_part=part)
            )
            at += size
    return table


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    return replace(hybrid_from_hf("qwen3_next", Keys(metadata, "config.json")), mtp_layers=1)


FAMILIES = (
    Family(
        name="qwen3_next",
        models="Qwen3-Next-80B-A3B",
        hf_architectures=("Qwen3NextForCausalLM",),
        gguf_architectures=(),
        config_from_hf=config_from_hf,
        config_from_gguf=None,
        rules=rules,
        build=build,
        mtp=PREDICTOR,
    ),
)
