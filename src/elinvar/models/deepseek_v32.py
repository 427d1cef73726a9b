"""DeepSeek V3.2 and GLM-5: DeepSeek V3 with sparse attention (DeepSeek-AI, 2025). GLM's index rotates
interleaved pairs, DeepSeek's halves; in GLM's later ones some layers attend to what a layer before them
chose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from elinvar.base.config import IndexConfig, ModelConfig
from elinvar.models import deepseek
from elinvar.models.experts import feeds
from elinvar.models.family import Family
from elinvar.models.keys import MAX_HEAD_DIM, Keys
from elinvar.models.shared import HF, TO, by_layer
from elinvar.nn.decoder import Block
from elinvar.nn.indexed import IndexedAttention, IndexedDecoder, IndexWeights
from elinvar.nn.mla import LatentWeights
from elinvar.nn.norm import RMSNorm
from elinvar.ops.api import Ops
from elinvar.weights.rules import Fix, Rule, UnpermuteRows

_GLM = "glm_moe_dsa"
_INDEX = ("index_q", "index_k", "index_norm", "index_norm_bias", "index_weights")
_MAX_HEADS = 1 << 10


def build(config: ModelConfig, weights: Mapping[str, Any], ops: Ops) -> IndexedDecoder:
    def norm(gain: Any) -> RMSNorm:
        return RMSNorm(gain, config.norm_eps, ops)

    def block(w: dict[str, Any]) -> Block:
        latent = LatentWeights(**{name: w[name] for name in deepseek.ATTENTION if name in w})
        index = IndexWeights(*(w[name] for name in _INDEX)) if _INDEX[0] in w else None
        attention = IndexedAttention(config, latent, index, ops)
        return Block(norm(w["attn_norm"]), attention, norm(w["mlp_norm"]), feeds(config, w, ops))

    blocks = [block(w) for w in by_layer(weights, config.num_layers)]
    return IndexedDecoder(config, weights, ops, blocks, norm(weights["norm"]))


def rules(config: ModelConfig) -> list[Rule]:
    layered, outer = (
        [rule for rule in deepseek.rules(config) if ("{i}" in rule.name) == of_layer]
        for of_layer in (True, False)
    )
    return [*layered, *_index_rules(config), *outer]


def _index_rules(config: ModelConfig) -> list[Rule]:
    assert config.index is not None and config.latent is not None and config.latent.q_rank
    c, hf = config.index, HF + "self_attn.indexer."

    def turn(heads: int) -> Fix | None:
        glm = config.family == _GLM
        return UnpermuteRows(heads, config.latent.rope_dim) if glm and config.latent else None

    table = [
        ("index_q", "wq_b.weight", (c.heads * c.head_dim, config.latent.q_rank), turn(c.heads)),
        ("index_k", "wk.weight", (c.head_dim, config.dim), turn(1)),
        ("index_norm", "k_norm.weight", (c.head_dim,), turn(1)),
        ("index_norm_bias", "k_norm.bias", (c.head_dim,), turn(1)),
        ("index_weights", "weights_proj.weight", (c.heads, config.dim), None),
    ]
    return [
        Rule(TO + name, hf + stored, None, shape, hf_fix=fix, layers=c.layers)
        for name, stored, shape, fix in table
    ]


def deepseek_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    layers = range(keys.size("num_hidden_layers"))
    return _from_hf("deepseek_v32", metadata, keys, tuple(layers))


def glm_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    keys = Keys(metadata, "config.json")
    keys.only("indexer_rope_interleave", True)
    return _from_hf(_GLM, metadata, keys, _with_index(keys))


def _from_hf(
    family: str, metadata: Mapping[str, Any], keys: Keys, layers: tuple[int, ...]
) -> ModelConfig:
    """Heads that predict further tokens are left out: theirs have an index, too."""
    config = deepseek.config_from_hf(metadata)
    keys.size("q_lora_rank")  # the index sees the queries' latents
    sparse = () if config.moe is None else config.moe.layers
    types = ["sparse" if i in sparse else "dense" for i in range(config.num_layers)]
    if keys.has("mlp_layer_types") and keys.raw("mlp_layer_types") != types:
        raise keys.bad("mlp_layer_types", "dense first, sparse from first_k_dense_replace on")
    assert config.latent is not None
    head_dim = keys.size("index_head_dim", largest=MAX_HEAD_DIM)
    if head_dim < config.latent.rope_dim:
        raise keys.bad("index_head_dim", f"at least qk_rope_head_dim, {config.latent.rope_dim}")
    heads = keys.size("index_n_heads", largest=_MAX_HEADS)
    index = IndexConfig(heads, head_dim, keys.size("index_topk"), layers)
    return replace(config, family=family, index=index, mtp_layers=0)


def _with_index(keys: Keys) -> tuple[int, ...]:
    """Layers named "full" in indexer_types, or F in index_topk_pattern; or every index_topk_freq-th
    after the first index_skip_topk_offset - 1."""
    count = keys.size("num_hidden_layers")
    types = keys.raw("indexer_types") or keys.raw("index_topk_pattern")
    if types is None:
        every, offset = keys.size("index_topk_freq", 1), keys.size("index_skip_topk_offset", 2)
        return tuple(i for i in range(count) if max(i - offset + 1, 0) % every == 0)
    known = {"full": True, "F": True, "shared": False, "S": False}
    good = isinstance(types, list | str) and all(isinstance(t, str) and t in known for t in types)
    if not good or len(types) != count or not known[types[0]]:
        key = "indexer_types" if keys.has("indexer_types") else "index_topk_pattern"
        raise keys.bad(key, f'"full" or "shared" for each of {count} layers, the first "full"')
    return tuple(i for i, t in enumerate(types) if known[t])


FAMILIES = (
    Family(
        name="deepseek_v32",
        models="DeepSeek V3.2",
        hf_architectures=("DeepseekV32ForCausalLM",),
        gguf_architectures=(),
        config_from_hf=deepseek_from_hf,
        config_from_gguf=None,
        rules=rules,
        build=build,
    ),
    Family(
        name=_GLM,
        models="GLM-5",
        hf_architectures=("GlmMoeDsaForCausalLM",),
        gguf_architectures=(),
        config_from_hf=glm_from_hf,
        config_from_gguf=None,
        rules=rules,
        build=build,
    ),
)
