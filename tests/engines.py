"""Tiny engines with random weights and a tokenizer of bytes: quick, no files, no torch."""

from __future__ import annotations

import codecs
from collections.abc import Container, Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np

from elinvar.base.config import EngineConfig, KVSpec
from elinvar.base.plan import TokenLogprobs
from elinvar.base.sampling import SamplingParams
from elinvar.engine.adapters import Adapters
from elinvar.engine.core import Engine
from elinvar.engine.output import CompletionBuilder
from elinvar.models.family import Family, Model
from elinvar.models.load import Loaded
from elinvar.models.registry import FAMILIES
from elinvar.ops import Ops, Weight, load_provider
from elinvar.ops.adapted import AdaptedOps
from elinvar.ops.layout import (
    GROUP,
    StoredParts,
    pack_float,
    pack_q4,
    pack_q5,
    pack_q8,
    pack_stored,
    stored_parts,
)
from elinvar.ops.stored import STORED
from elinvar.weights.rules import bind
from families import ENGINES
from families.base import VOCAB

EOS = 256


class ByteTokenizer:
    """Token i below 256 is byte i; 256 ends an answer; the rest have no text."""

    vocab_size = VOCAB
    eos_ids = frozenset([EOS])
    bos_id = None
    chat_template = None
    special_ids = frozenset(range(EOS, VOCAB))

    def spellings(self, count: int) -> list[bytes]:
        names = [b"<end>", *(b"<%d>" % i for i in range(EOS + 1, VOCAB))]
        return [*(bytes([i]) for i in range(EOS)), *names][:count]

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < EOS else b""

    def text_bytes(self, ids: Iterable[int], hidden: Container[int] | None = None) -> bytes:
        shown = b"<end>" if hidden is not None and 256 not in hidden else b""
        return b"".join(bytes([i]) if i < 256 else shown * (i == EOS) for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        return codecs.decode(self.text_bytes(ids), "utf-8", "replace")


def random_weight(rng: np.random.Generator, kind: Any, n: int, k: int) -> Weight:
    if kind in STORED:
        return pack_stored(kind, random_parts(rng, kind, n, k))
    w = rng.standard_normal((n, k)).astype(np.float32) / np.sqrt(k, dtype=np.float32)
    if kind == "f16":
        return pack_float("f16", w.astype(np.float16))
    if kind == "bf16":
        return pack_float("bf16", (w.view(np.uint32) >> 16).astype(np.uint16))
    if kind == "f32":
        return pack_float("f32", w)
    groups = w.reshape(n, k // GROUP, GROUP)
    if kind == "q8":
        scales = (np.abs(groups).max(-1) / 127).astype(np.float16)
        codes = np.rint(groups / scales[..., None].astype(np.float32)).clip(-127, 127)
        return pack_q8(codes.reshape(n, k).astype(np.int8), scales)
    mins = groups.min(-1).astype(np.float16)
    pack, largest = (pack_q4, 15) if kind == "q4" else (pack_q5, 31)
    scales = ((groups.max(-1) - mins) / largest).astype(np.float16)
    codes = np.rint((groups - mins[..., None]) / scales[..., None].astype(np.float32))
    return pack(codes.clip(0, largest).reshape(n, k).astype(np.uint8), scales, mins)


def random_parts(rng: np.random.Generator, kind: Any, n: int, k: int) -> StoredParts:
    """Numbers about 1 / sqrt(k) in a format of files."""
    form, size = STORED[kind], k**-0.5
    codes = rng.integers(0, 256, (n, k // form.in_byte), np.uint8)
    if kind.startswith("fp8"):
        codes = codes & 0x8F | 0x30  # 0.5 to 1, of both signs
    parts: StoredParts = {"codes": codes}
    if form.factors:
        of = {"int8": 1 / 64, "nvfp4": 1 / 64}.get(kind, 1)
        parts["factors"] = (rng.uniform(0.5, 1, (n, 1)) * size * of).astype(np.float32)
    if form.group:
        rows, columns, _ = stored_parts(kind, k)["scales"]
        shape = (-(-n // 16) if rows == 1 else n), columns
        if kind == "fp8-blocks":
            parts["scales"] = (rng.uniform(0.5, 1, shape) * size).astype(np.float32)
        else:  # exponents; and 16 to 30
            low, high = (123, 126) if kind == "mxfp4" else (0x58, 0x60)
            parts["scales"] = rng.integers(low, high, shape, np.uint8)
    return parts


@cache
def tiny_weights(family: str, kind: str) -> dict[str, Any]:
    """Random ones, of the shapes that the family's rules tell."""
    config, rules = ENGINES[family], _family(family).rules(ENGINES[family])
    rng = np.random.default_rng(7)
    weights: dict[str, Any] = {}
    for binding in bind(rules, "safetensors", config.num_layers):
        assert binding.shape is not None
        if len(binding.shape) == 2:
            weights[binding.name] = random_weight(rng, kind, *binding.shape)
        elif binding.name.endswith("norm"):
            weights[binding.name] = rng.uniform(0.5, 1.5, binding.shape).astype(np.float32)
        else:
            weights[binding.name] = (rng.standard_normal(binding.shape) / 8).astype(np.float32)
    return weights


def _family(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def tiny_model(ops: Ops, family: str = "llama", kind: str = "q4") -> Model:
    return _family(family).build(ENGINES[family], tiny_weights(family, kind), ops)


def tiny_parts(family: str = "llama", kind: str = "q4") -> Loaded:
    config, found = ENGINES[family], _family(family)
    return Loaded(found, config, found.rules(config), tiny_weights(family, kind))


@cache
def provider(name: str = "cpu", num_threads: int = 1, simd: str | None = None) -> Ops:
    return load_provider(name, num_threads, simd)


def kv_bytes(specs: Sequence[KVSpec], num_blocks: int) -> int:
    """Memory for about `num_blocks` blocks of each group."""
    return num_blocks * sum(spec.block_bytes for spec in specs)


def tiny_engine(
    family: str = "llama",
    kind: str = "q4",
    ops: Ops | None = None,
    model: Model | None = None,
    **options: Any,
) -> Engine:
    """`num_blocks` among the options: the size of the cache, in blocks of each group; `drafting` as
    Engine takes it. With AdaptedOps it takes adapters."""
    model = model or tiny_model(ops or provider(), family, kind)
    config = {"kv_memory": 2**24, "max_rows": 8, **options}
    drafting = config.pop("drafting", None)
    num_blocks = config.pop("num_blocks", None)
    if num_blocks is not None:
        specs = model.kv_specs(config.get("kv_dtype", "f16"))
        config["kv_memory"] = kv_bytes(specs, num_blocks)
    tokenizer: Any = ByteTokenizer()
    adapters = None
    if isinstance(ops, AdaptedOps):
        adapters = Adapters(tiny_parts(family, kind), ops, EngineConfig(**config).max_adapters)
    used: Any = model.ops  # type: ignore[attr-defined]
    named = f"{family} {kind}"
    return Engine(
        model, used, tokenizer, EngineConfig(**config), named, adapters, drafting=drafting
    )


Answer = tuple[list[int], list[TokenLogprobs], str]


def answers(
    engine: Engine, prompts: Sequence[list[int]], params: Sequence[SamplingParams]
) -> list[Answer]:
    """Tokens, log-probs and text of all prompts in one batch; the engine ends empty."""
    builders = {
        engine.add(ids, one): CompletionBuilder(ids)
        for ids, one in zip(prompts, params, strict=True)
    }
    done = {}
    while engine.has_work:
        for delta in engine.step():
            if completion := builders[delta.request_id].push(delta):
                done[delta.request_id] = completion
    assert engine.scheduler.num_running == engine.scheduler.num_waiting == 0
    engine.scheduler.check()
    return [(done[i].token_ids, done[i].logprobs, done[i].text) for i in builders]
