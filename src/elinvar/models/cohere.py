"""Command R (Cohere, 2024 and 2025): one layer norm without bias before attention and MLP, which lie side
by side; rotary pairs (2i, 2i + 1); a factor on the logits. The later ones, from R7B on, have sliding
windows on three layers of four, and positions on those alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elinvar.base.config import LayerKind, ModelConfig, RopeConfig
from elinvar.models import ernie
from elinvar.models.family import Family
from elinvar.models.granite import Granite
from elinvar.models.keys import Keys, checked
from elinvar.models.shared import (
    FULL,
    TO,
    by_layer,
    every_nth_full,
    kinds_from_hf,
    one_rope_from_gguf,
    one_rope_from_hf,
    sizes_from_gguf,
    sizes_from_hf,
)
from elinvar.nn.attention import Attention
from elinvar.nn.decoder import Decoder, ParallelBlock
from elinvar.nn.mlp import GatedMLP
from elinvar.nn.norm import LayerNorm
from elinvar.nn.rope import MAX_POSITIONS
from elinvar.ops.api import Ops
from elinvar.weights.rules import Rule
from elinvar.weights.tensor import HostTensor

PATTERN = 4
"""Every fourth layer is full."""


def build(config: ModelConfig, weights: Mapping[str, Any], ops: Ops) -> Decoder:
    def norm(gain: Any) -> LayerNorm:
        return LayerNorm(gain, None, config.norm_eps, ops)

    def block(i: int, w: dict[str, Any]) -> ParallelBlock:
        attention = Attention(config, i, (w["q"], w["k"], w["v"]), w["o"], ops)
        mlp = GatedMLP(w["gate"], w["up"], w["down"], config.activation, ops)
        return ParallelBlock(norm(w["attn_norm"]), attention, None, mlp, ops)

    blocks = [block(*one) for one in enumerate(by_layer(weights, config.num_layers))]
    return Granite(config, weights, ops, blocks, norm(weights["norm"]))


def rules(config: ModelConfig) -> list[Rule]:
    return [rule for rule in ernie.rules(config) if rule.name != TO + "mlp_norm"]


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("hidden_act", "silu")
    keys.only("attention_bias", False)
    keys.only("use_qk_norm", False)
    keys.only("rotary_pct", 1.0)
    sizes = sizes_from_hf(keys, tied=True)
    if keys.has("model_max_length"):  # the other key's 8192 is not what it was trained for
        sizes["max_context"] = min(keys.size("model_max_length"), MAX_POSITIONS)
    window, kinds = None, FULL * sizes["num_layers"]
    if metadata["architectures"][0] == "Cohere2ForCausalLM":
        window = keys.size("sliding_window", 4096)
        pattern = keys.size("sliding_window_pattern", PATTERN)
        kinds = kinds_from_hf(keys, every_nth_full(pattern, sizes["num_layers"]))
    scale = keys.number("logit_scale", 0.0625)
    rope = one_rope_from_hf(keys, sizes["head_dim"])
    config = _config(sizes, kinds, rope, window, keys.number("layer_norm_eps"), scale)
    return checked(config, "config.json")


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied."""
    keys = Keys(metadata, "The GGUF file", f"{metadata['general.architecture']}.")
    sizes = sizes_from_gguf(keys, tensors)
    window, kinds = None, FULL * sizes["num_layers"]
    if keys.has("attention.sliding_window"):
        window = keys.size("attention.sliding_window")
        kinds = every_nth_full(PATTERN, sizes["num_layers"])
    rope = one_rope_from_gguf(keys, tensors, sizes["head_dim"])
    eps, scale = keys.number("attention.layer_norm_epsilon"), keys.number("logit_scale")
    return checked(_config(sizes, kinds, rope, window, eps, scale), "The GGUF file")


def _config(
    sizes: Mapping[str, Any],
    kinds: tuple[LayerKind, ...],
    rope: RopeConfig,
    window: int | None,
    eps: float,
    logit_scale: float,
) -> ModelConfig:
    """Where there is a window, layers without it have no positions."""
    ropes = {"full": rope if window is None else RopeConfig(rope.base, 0), "sliding": rope}
    return ModelConfig(
        family="cohere",
        norm_eps=eps,
        layer_kinds=kinds,
        rope={kind: ropes[kind] for kind in kinds},
        window=window,
        logit_scale=logit_scale,
        parallel=True,
        **sizes,
    )


FAMILIES = (
    Family(
        name="cohere",
        models="Command R, R7B and A; Aya 23 and Expanse",
        hf_architectures=("CohereForCausalLM", "Cohere2ForCausalLM"),
        gguf_architectures=("command-r", "cohere2"),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=build,
    ),
)
