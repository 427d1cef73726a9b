"""InternLM 2 and 2.5 (Cai et al., 2024), published with code of their own: Llama's blocks under other
names, q, k and v in one matrix with each key-value head's rows together. InternLM 3 is Llama by name, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from elinvar.base.config import ModelConfig
from elinvar.models import llama
from elinvar.models.family import Family
from elinvar.models.keys import Keys, checked
from elinvar.models.shared import FULL, GGUF, HF, TO, one_rope_from_gguf, sizes_from_gguf
from elinvar.weights.fixes import UnpermuteRows
from elinvar.weights.rules import Part, Rule
from elinvar.weights.tensor import HostTensor


def rules(config: ModelConfig) -> list[Rule]:
    """llama.cpp's converter takes q, k and v apart and interleaves the rotary pairs of q and k."""
    d, f, v, head = config.dim, config.ff_dim, config.vocab_size, config.head_dim
    kv, group = config.num_kv_heads, config.num_heads // config.num_kv_heads
    stride = (group + 2) * head

    def part_of_qkv(name: str, first: int, heads: int) -> Rule:
        return Rule(
            TO + name,
            HF + "attention.wqkv.weight",
            f"{GGUF}attn_{name}.weight",
            (kv * heads * head, d),
            gguf_fix=None if name == "v" else UnpermuteRows(kv * heads),
            hf_part=Part((kv * stride, d), first * head, heads * head, stride),
        )

    table: list[tuple[str, str, str, tuple[int, ...]]] = [
        (TO + "attn_norm", HF + "attention_norm", GGUF + "attn_norm", (d,)),
        (TO + "mlp_norm", HF + "ffn_norm", GGUF + "ffn_norm", (d,)),
        (TO + "o", HF + "attention.wo", GGUF + "attn_output", (d, config.num_heads * head)),
        (TO + "gate", HF + "feed_forward.w1", GGUF + "ffn_gate", (f, d)),
        (TO + "up", HF + "feed_forward.w3", GGUF + "ffn_up", (f, d)),
        (TO + "down", HF + "feed_forward.w2", GGUF + "ffn_down", (d, f)),
        ("embed", "model.tok_embeddings", "token_embd", (v, d)),
        ("norm", "model.norm", "output_norm", (d,)),
        ("head", "output", "output", (v, d)),
    ]
    return [
        part_of_qkv("q", 0, group),
        part_of_qkv("k", group, 1),
        part_of_qkv("v", group + 1, 1),
        *(
            Rule(to, f"{hf}.weight", f"{gguf}.weight", shape)
            for to, hf, gguf, shape in table
            if to != "head" or not config.tied_head
        ),
    ]


def internlm2_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    Keys(metadata, "config.json").only("bias", False)
    return replace(llama.config_from_hf(metadata), family="internlm2")


def internlm3_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    keys = Keys(metadata, "config.json")
    keys.only("bias", False)
    keys.only("qkv_bias", False)
    return replace(llama.config_from_hf(metadata), family="internlm3")


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied."""
    keys = Keys(metadata, "The GGUF file", "internlm2.")
    sizes = sizes_from_gguf(keys, tensors)
    config = ModelConfig(
        family="internlm2",
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": one_rope_from_gguf(keys, tensors, sizes["head_dim"])},
        **sizes,
    )
    return checked(config, "The GGUF file")


FAMILIES = (
    Family(
        name="internlm2",
        models="InternLM2, InternLM2.5",
        hf_architectures=("InternLM2ForCausalLM",),
        gguf_architectures=("internlm2",),
        config_from_hf=internlm2_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=llama.build,
    ),
    Family(
        name="internlm3",
        models="InternLM3",
        hf_architectures=("InternLM3ForCausalLM",),
        gguf_architectures=(),  # llama.cpp calls them llama
        config_from_hf=internlm3_from_hf,
        config_from_gguf=None,
        rules=llama.rules,
        build=llama.build,
    ),
)
