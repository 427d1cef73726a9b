"""DeepSeek V3.2 and GLM-5: DeepSeek V3 with sparse attention (DeepSeek-AI, 2025). GLM's index rotates
interleaved pairs, DeepSeek's halves; in GLM's later ones some layers attend to what a layer before them
chose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from elinvar.base.config import IndexConfig, ModelConfig
from elinvar.base.errors import ModelError
from elinvar.models import deepseek
from elinvar.models.deepseek_gguf import latent_from_gguf
from elinvar.models.experts import feeds
from elinvar.models.family import Family
from elinvar.models.keys import MAX_HEAD_DIM, Keys
from elinvar.models.mtp import NEXTN, heads
from elinvar.models.shared import GGUF, HF, TO, by_layer
from elinvar.nn.decoder import Block
from elinvar.nn.indexed import IndexedAttention, IndexedDecoder, IndexWeights
from elinvar.nn.mla import LatentWeights
from elinvar.nn.norm import RMSNorm
from elinvar.ops.api import Ops
from elinvar.weights.fixes import Fix, UnpermuteRows
from elinvar.weights.rules import Rule
from elinvar.weights.tensor import HostTensor

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
    own = heads(config, weights, norm, block)
    return IndexedDecoder(config, weights, ops, blocks, norm(weights["norm"]), own)


def rules(config: ModelConfig) -> list[Rule]:
    layered, outer = (
        [rule for rule in deepseek.rules(config) if ("{i}" in rule.name) == of_layer]
        for of_layer in (True, False)
    )
    return [*layered, *_index_rules(config), *outer]


def _index_rules(config: ModelConfig) -> list[Rule]:
    assert config.index is not None and config.latent is not None and config.latent.q_rank
    c, hf, gguf = config.index, HF + "self_attn.indexer.", GGUF + "indexer."

    def turn(heads: int) -> Fix | None:
        glm = config.family == _GLM
        return UnpermuteRows(heads, config.latent.rope_dim) if glm and config.latent else None

    q, k, vector = turn(c.heads), turn(1), (c.head_dim,)
    table = [
        ("wq_b.weight", "attn_q_b.weight", (c.heads * c.head_dim, config.latent.q_rank), q),
        ("wk.weight", "attn_k.weight", (c.head_dim, config.dim), k),
        ("k_norm.weight", "k_norm.weight", vector, k),
        ("k_norm.bias", "k_norm.bias", vector, k),
        ("weights_proj.weight", "proj.weight", (c.heads, config.dim), None),
    ]
    return [
        Rule(TO + name, hf + ours, gguf + theirs, shape, fix, fix, layers=c.layers)
        for name, (ours, theirs, shape, fix) in zip(_INDEX, table, strict=True)
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
    config = deepseek.config_from_hf(metadata)
    keys.size("q_lora_rank")  # the index sees the queries' latents
    sparse = () if config.moe is None else config.moe.layers
    types = ["sparse" if i in sparse else "dense" for i in range(config.num_layers)]
    if keys.has("mlp_layer_types") and keys.raw("mlp_layer_types") != types:
        raise keys.bad("mlp_layer_types", "dense first, sparse from first_k_dense_replace on")
    names = "index_n_heads", "index_head_dim", "index_topk"
    return _indexed(replace(config, family=family), keys, names, layers)


def _indexed(
    config: ModelConfig, keys: Keys, names: tuple[str, str, str], layers: tuple[int, ...]
) -> ModelConfig:
    """names: of the numbers of heads, of a head's dims, of keys to choose."""
    assert config.latent is not None
    rope_dim, dim = config.latent.rope_dim, keys.size(names[1], largest=MAX_HEAD_DIM)
    if dim < rope_dim:
        raise keys.bad(names[1], f"at least the {rope_dim} dims that are rotated")
    index = IndexConfig(keys.size(names[0], largest=_MAX_HEADS), dim, keys.size(names[2]), layers)
    return replace(config, index=index)


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


def deepseek_from_gguf(
    metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]
) -> ModelConfig:
    """From a GGUF file's keys and its tensors, which tell the layers with an index."""
    return _from_gguf("deepseek_v32", Keys(metadata, "The GGUF file", "deepseek32."), tensors)


def glm_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    return _from_gguf(_GLM, Keys(metadata, "The GGUF file", "glm-dsa."), tensors)


def _from_gguf(family: str, keys: Keys, tensors: Mapping[str, HostTensor]) -> ModelConfig:
    config = latent_from_gguf(family, keys, tensors, glm=family == _GLM)
    keys.size("attention.q_lora_rank")
    own = range(config.num_layers)
    layers = tuple(i for i in own if f"blk.{i}.indexer.proj.weight" in tensors)
    if not layers or layers[0]:
        raise ModelError("The GGUF file lacks the tensor blk.0.indexer.proj.weight.")
    head_count, key_length, top_k = (
        f"attention.indexer.{name}" for name in ("head_count", "key_length", "top_k")
    )
    return _indexed(config, keys, (head_count, key_length, top_k), layers)


FAMILIES = (
    Family(
        name="deepseek_v32",
        models="DeepSeek V3.2",
        hf_architectures=("DeepseekV32ForCausalLM",),
        gguf_architectures=("deepseek32",),
        config_from_hf=deepseek_from_hf,
        config_from_gguf=deepseek_from_gguf,
        rules=rules,
        build=build,
        mtp=NEXTN,
    ),
    Family(
        name=_GLM,
        models="GLM-5",
        hf_architectures=("GlmMoeDsaForCausalLM",),
        gguf_architectures=("glm-dsa",),
        config_from_hf=glm_from_hf,
        config_from_gguf=glm_from_gguf,
        rules=rules,
        build=build,
        mtp=NEXTN,
    ),
)
