"""Keys: reads a model's config.json or GGUF metadata. Every error names the key.

This is the door of a model: what passes here is trusted by everything after it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from elinvar.base.config import ModelConfig, RopeConfig, YarnConfig
from elinvar.base.errors import ModelError
from elinvar.nn.rope import ln, yarn_mscale
from elinvar.weights.tensor import HostTensor

MAX_SIZE = 1 << 24
MAX_LAYERS = 1 << 12
MAX_HEAD_DIM = 1024
"""Of the kernels' buffers (csrc/rows.h)."""
MAX_TAPS = 64
"""Of their convolutions (csrc/rows_recurrent.h)."""
MAX_HEAD_GROUP = 128
"""Query heads to a key-value head: rows of an attention tile (csrc/attention.h)."""
"""No text model comes near these; the numbers of a corrupt file often go beyond."""
MIN_DIVISOR = 0.7
"""LongRoPE has some a little below 1; frequencies beyond pi/2 would take nn/rope.py out of the
range in which its angles are exact."""


class Keys:
    """Typed look-ups in `values`. `prefix` is put before every key (a GGUF's architecture)."""

    def __init__(self, values: Mapping[str, Any], source: str, prefix: str = "") -> None:
        self._values, self._source, self._prefix = values, source, prefix

    def has(self, key: str) -> bool:
        return self._values.get(self._prefix + key) is not None

    def raw(self, key: str) -> Any:
        """The value; None where it is missing or null."""
        return self._values.get(self._prefix + key)

    def size(self, key: str, default: int | None = None, largest: int = MAX_SIZE) -> int:
        """A whole number from 1 to `largest`."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
            raise self.bad(key, f"a whole number from 1 to {largest}")
        return value

    def count(self, key: str, largest: int = MAX_LAYERS) -> int:
        """A whole number from 0 to `largest`; 0 where there is none."""
        value = self._value(key, 0)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= largest:
            raise self.bad(key, f"a whole number from 0 to {largest}")
        return value

    def number(self, key: str, default: float | None = None, smallest: float = 1e-15) -> float:
        """A number from `smallest` to 1e15, which float32 arithmetic can hold."""
        value = self._value(key, default)
        ok = isinstance(value, int | float) and not isinstance(value, bool)
        if not ok or not smallest <= value <= 1e15:
            raise self.bad(key, f"a number from {smallest:g} to 1e15")
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of `count` numbers."""
        value = self._value(key, None)
        items = value if isinstance(value, list) else []
        ok = all(isinstance(v, int | float) and not isinstance(v, bool) for v in items)
        if not ok or len(items) != count or not all(abs(v) <= 1e15 for v in items):
            raise self.bad(key, f"a list of {count} numbers")
        return tuple(float(v) for v in items)

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.bad(key, "true or false")
        return value

    def only(self, key: str, *supported: Any) -> None:
        """Refuses a model whose `key` is set to anything but one of `supported`."""
        value = self.raw(key)
        simple = isinstance(value, str | int | float)
        if value is not None and not (simple and value in supported):
            choices = " or ".join(json.dumps(s) for s in supported) or "null"
            raise ModelError(
                f"{self._source} sets {self._prefix}{key} to {_short(value)}, and only {choices} "
                "is supported; use another model."
            )

    def part(self, key: str) -> Keys:
        """The keys of an object inside this one; none where it is missing."""
        value = self.raw(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.bad(key, "an object")
        return Keys(value or {}, f"{self._source}, in {key},")

    def replaced(self, values: Mapping[str, Any]) -> Keys:
        """These, but for `values`."""
        return Keys({**self._values, **values}, self._source, self._prefix)

    def bad(self, key: str, expected: str) -> ModelError:
        return ModelError(
            f"{self._source} has {self._prefix}{key} = {_short(self.raw(key))}, which must be "
            f"{expected}; the file is damaged or not of this family."
        )

    def _value(self, key: str, default: Any) -> Any:
        value = self.raw(key)
        if value is None:
            value = default
        if value is None:
            raise ModelError(
                f"{self._source} lacks {self._prefix}{key}; the file is damaged or not of this "
                "family."
            )
        return value


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:  # just within what the reader of JSON takes
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:60] + "..."


def checked(config: ModelConfig, source: str) -> ModelConfig:
    """`config` itself, when its sizes fit together."""
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    problem = None
    if heads % kv_heads:
        problem = f"{heads} attention heads cannot share {kv_heads} key-value heads evenly"
    elif head_dim > MAX_HEAD_DIM or heads // kv_heads > MAX_HEAD_GROUP:
        problem = (
            f"its heads of {head_dim} dims, {heads // kv_heads} to a key-value head, are larger "
            f"than the kernels take ({MAX_HEAD_DIM} dims, {MAX_HEAD_GROUP} heads)"
        )
    elif head_dim % 2:
        problem = f"a head dim of {head_dim} is odd, and rotary pairs need an even one"
    elif any(rope.dim % 2 or not 0 <= rope.dim <= head_dim for rope in config.rope.values()):
        dims = sorted({rope.dim for rope in config.rope.values()})
        problem = f"{dims} of {head_dim} dims of a head are rotated, and pairs need an even part"
    elif len(config.layer_kinds) != config.num_layers:
        problem = f"{len(config.layer_kinds)} layer types are given for {config.num_layers} layers"
    elif any(not _good_divisors(rope) for rope in config.rope.values()):
        problem = f"its rotary divisors are not a number from {MIN_DIVISOR} up for each pair"
    if problem:
        raise ModelError(f"{source} describes a model that cannot be run: {problem}.")
    return config


def _good_divisors(rope: RopeConfig) -> bool:
    if rope.divisors is None:
        return True
    good = all(MIN_DIVISOR <= d <= 1e15 for d in rope.divisors)
    return good and len(rope.divisors) == rope.dim // 2


def head_dim_of(keys: Keys, key: str, dim: int, num_heads: int) -> int:
    """The head dim at `key`, or dim / num_heads where it is not given."""
    if not keys.has(key) and dim % num_heads:
        raise keys.bad(key, f"given, as {num_heads} heads do not divide a dim of {dim}")
    return keys.size(key, dim // num_heads)


def rope_from_hf(
    params: Keys,
    base: float,
    head_dim: int,
    max_context: int,
    partial: float | None = None,
    original_context: int | None = None,
) -> RopeConfig:
    """From `rope_parameters` (transformers 5) or `rope_scaling` (before), either may be empty.

    base, partial: rope_theta and partial_rotary_factor where `params` gives none; a family without
    `partial` rotates whole heads. original_context: original_max_position_embeddings where
    config.json gives it outside of `params`.

    Dynamic scaling begins beyond max_position_embeddings, where contexts end: it is none. LongRoPE
    has factors for sequences within the original context and for longer ones. transformers chooses
    by the longest sequence at hand, and so a result would depend on what else is in the batch, and
    keys in the cache on what comes after them: here the model's context (max_position_embeddings)
    chooses, as if every sequence could become that long.
    """
    type_key = "rope_type" if params.has("rope_type") else "type"
    params.only(type_key, "default", "linear", "dynamic", "llama3", "yarn", "longrope", "su")
    if partial is None:
        params.only("partial_rotary_factor", 1.0)
    dim = int(head_dim * params.number("partial_rotary_factor", partial or 1.0, smallest=0))
    base = params.number("rope_theta", base, smallest=1)
    kind = params.raw(type_key)
    if kind == "linear":
        return RopeConfig(base, dim, factor=params.number("factor", smallest=1))
    if kind not in ("llama3", "yarn", "longrope", "su"):
        return RopeConfig(base, dim)
    context = original_context or params.size("original_max_position_embeddings", max_context)
    if kind == "llama3":
        low, high = params.number("low_freq_factor"), params.number("high_freq_factor")
        if low > high:
            raise params.bad("high_freq_factor", "at least low_freq_factor")
        factor = params.number("factor", smallest=1)
        return RopeConfig(base, dim, llama3=(factor, low, high, context))
    factor = params.number("factor", max_context / context)
    if kind == "yarn":
        return _yarn_from_hf(params, base, dim, factor, context)
    divisors = params.numbers("long_factor" if max_context > context else "short_factor", dim // 2)
    default = math.sqrt(1 + ln(factor) / ln(context)) if factor > 1 < context else 1.0
    attention = params.number("attention_factor", default)
    return RopeConfig(base, dim, divisors=divisors, attention_factor=attention)


def _yarn_from_hf(params: Keys, base: float, dim: int, factor: float, context: int) -> RopeConfig:
    if factor < 1:
        raise params.bad("factor", "at least 1")
    fast, slow = params.number("beta_fast", 32.0), params.number("beta_slow", 1.0)
    if fast < slow:
        raise params.bad("beta_fast", "at least beta_slow")
    if base == 1:
        raise params.bad("rope_theta", "above 1 for yarn")
    mscale = params.number("mscale", 0.0, smallest=0)
    all_dim = params.number("mscale_all_dim", 0.0, smallest=0)
    default = yarn_mscale(factor)
    if mscale and all_dim:  # DeepSeek: the rest goes into the softmax scale
        default = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    yarn = YarnConfig(factor, context, fast, slow, params.flag("truncate", True))
    attention = params.number("attention_factor", default)
    return RopeConfig(base, dim, yarn=yarn, attention_factor=attention)


def rope_from_gguf(
    keys: Keys,
    tensors: Mapping[str, HostTensor],
    head_dim: int,
    max_context: int,
    base: float = 10_000.0,
) -> RopeConfig:
    """From a GGUF file's rope.* keys and its tensors of rotary factors. base: where the file gives
    none. Of LongRoPE's factors the model's context chooses, as in rope_from_hf."""
    base = keys.number("rope.freq_base", base, smallest=1)
    dim = keys.size("rope.dimension_count", head_dim)
    keys.only("rope.scaling.type", "none", "linear", "yarn", "longrope")
    attention = keys.number("rope.scaling.attn_factor", 1.0)
    context = keys.size("rope.scaling.original_context_length", max_context)
    if keys.raw("rope.scaling.type") == "yarn":
        factor = keys.number("rope.scaling.factor", smallest=1)
        if base == 1:
            raise keys.bad("rope.freq_base", "above 1 for yarn")
        fast = keys.number("rope.scaling.yarn_beta_fast", 32.0)
        slow = keys.number("rope.scaling.yarn_beta_slow", 1.0)
        if fast < slow:
            raise keys.bad("rope.scaling.yarn_beta_fast", "at least yarn_beta_slow")
        yarn = YarnConfig(factor, context, fast, slow)
        attention *= yarn_mscale(factor)
        return RopeConfig(base, dim, yarn=yarn, attention_factor=attention)
    length = "long" if max_context > context else "short"
    divisors = rope_divisors_from_gguf(tensors, f"rope_factors_{length}.weight")
    if divisors is not None:
        return RopeConfig(base, dim, divisors=divisors, attention_factor=attention)
    return RopeConfig(
        base, dim, rope_factor_from_gguf(keys), divisors=rope_divisors_from_gguf(tensors)
    )


def rope_factor_from_gguf(keys: Keys) -> float:
    """The linear scaling factor of a GGUF's rope.scaling.* keys; 1 where there is none."""
    keys.only("rope.scaling.type", "none", "linear")
    if keys.raw("rope.scaling.type") == "linear":
        return keys.number("rope.scaling.factor", smallest=1)
    return keys.number("rope.scale_linear", 1.0, smallest=1)


def rope_divisors_from_gguf(
    tensors: Mapping[str, HostTensor], name: str = "rope_freqs.weight"
) -> tuple[float, ...] | None:
    """One divisor a rotary frequency from the tensor `name`. None where there is none."""
    tensor = tensors.get(name)
    if tensor is None:
        return None
    if tensor.dtype != "F32":
        raise ModelError(f"{name} of the GGUF file is {tensor.dtype} and must be F32.")
    return tuple(np.ravel(tensor.data).view(np.float32).tolist())


def vocab_size_from_gguf(keys: Keys, tensors: Mapping[str, HostTensor]) -> int:
    """Rows of the embedding: files often leave the key out, or count the tokenizer's tokens."""
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        return keys.size("vocab_size")
    return embedding.shape[0]
