"""The draft model: loaded beside the target or in a process of its own, and the memory its cache gets.

Its cache is bounded by SHARE and comes on top of the target's: drafts only save time, so no request is
refused, shortened or made to wait for their sake. A sequence that it has no blocks for gets no drafts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from elinvar.base.config import EngineConfig, KVDtype
from elinvar.base.errors import ModelError
from elinvar.engine.memory import give_back
from elinvar.engine.plan_kv import describe_blocks, plan_kv
from elinvar.engine.tokenizer import Tokenizer, load_tokenizer
from elinvar.models.family import Model
from elinvar.models.load import load_parts
from elinvar.ops import Ops, load_provider
from elinvar.run.drafters.api import Drafter
from elinvar.run.drafters.aside import Aside
from elinvar.run.drafters.model import CATCH_UP, DraftModel
from elinvar.run.drafters.retokenised import TAIL, Retokenised
from elinvar.run.rows import Rows
from elinvar.run.runner import Runner
from elinvar.weights.cache import cache_root
from elinvar.weights.checkpoint import open_checkpoint
from elinvar.weights.sources import resolve

log = logging.getLogger(__name__)

SHARE = 4
"""Its cache gets a quarter of the bytes of the target's, or what `max_rows` sequences need if that is less."""
SAME = 0.99
"""Of the tokens that two vocabularies both have, the share that must be spelled alike for ids to mean the
same: versions of a model rename control tokens."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    model: Model
    tokenizer: Tokenizer
    ops: Ops


def open_draft_model(
    config: EngineConfig,
    target: Path,
    tokenizer: Tokenizer,
    ops: Ops,
    progress: Progress | None = None,
) -> Callable[[Runner], Drafter]:
    """What makes the drafter of config.draft_model, which runs where the target does, or `is_aside`.
    Raises ModelError as load_draft_model does; of a process of its own what goes wrong is in the log."""
    assert config.draft_model is not None
    name = config.draft_model
    if is_aside(config):
        path = resolve(name)
        there = replace(config, device="cpu", kv_dtype=_on_cpu(config.kv_dtype))

        def beside(runner: Runner) -> Drafter:
            sizes = runner.model.config.vocab_size, runner.kv_bytes
            make = partial(_load_there, str(path), str(target), *sizes, there)
            return Aside(runner.rows, make)

        return beside
    loaded = load_draft_model(name, config, ops, progress)

    def here(runner: Runner) -> Drafter:
        sizes = runner.model.config.vocab_size, runner.kv_bytes
        return drafter_of(loaded, runner.rows, tokenizer, *sizes, config)

    return here


def is_aside(config: EngineConfig) -> bool:
    """Whether the draft model runs in a process of its own, on the CPU."""
    return "aside" in (config.drafters or ())


def _on_cpu(kv_dtype: KVDtype) -> KVDtype:
    return "int8" if kv_dtype == "fp8" else kv_dtype


def load_draft_model(
    name: str, config: EngineConfig, ops: Ops, progress: Progress | None = None
) -> Loaded:
    """Of a named model (see weights.sources). Raises ModelError when it cannot be found or read."""
    tell = progress or (lambda what, done, total: None)
    path = resolve(name, lambda what, done, total: tell(what, done, total or 0))
    checkpoint = open_checkpoint(path)
    try:
        told, packing = logging.getLogger("elinvar.weights").info, partial(tell, "packing")
        also = config.weight_format, cache_root(), told, packing
        parts = load_parts(checkpoint, *also, stored=ops.stored)
        return Loaded(parts.build(ops), load_tokenizer(checkpoint, cache_root()), ops)
    finally:
        checkpoint.close()
        give_back()


def drafter_of(
    loaded: Loaded,
    rows: Rows,
    target: Tokenizer,
    vocab_size: int,
    kv_bytes: int,
    config: EngineConfig,
) -> Drafter:
    """vocab_size, kv_bytes: of the target's logits and cache. Raises ModelError where the model cannot
    draft."""
    model = loaded.model
    if model.config.delta is not None:
        raise ModelError(
            "draft_model must take drafts back, which a model with recurrent layers cannot: name one "
            "whose layers are all attention."
        )
    specs = model.kv_specs(config.kv_dtype)
    plan = plan_kv(
        specs,
        min(model.config.max_context, rows.token_ids.shape[1]),
        kv_bytes,
        kv_memory=kv_bytes // SHARE,
        max_rows=rows.token_ids.shape[0],
        max_step_tokens=CATCH_UP,
    )
    what = describe_blocks(specs, plan.num_blocks)
    log.info("KV cache of the draft model: %s; %d bytes", what, plan.num_bytes)
    parts = model, loaded.ops, specs, plan.num_blocks, plan.max_context
    if same_ids(target, loaded.tokenizer):
        return DraftModel(rows, *parts, vocab_size)
    log.info("The draft model has another tokenizer: it drafts greedily, through text.")
    own = model.config.vocab_size
    return Retokenised(
        rows,
        plan.max_context,
        target,
        loaded.tokenizer,
        lambda texts: DraftModel(texts, *parts, own, unsettled=TAIL),
    )


def same_ids(target: Tokenizer, draft: Tokenizer) -> bool:
    """Whether a token's id means the same to both."""
    count = min(target.vocab_size, draft.vocab_size)
    pairs = zip(target.spellings(count), draft.spellings(count), strict=True)
    return sum(a == b for a, b in pairs) >= SAME * count


def _load_there(
    draft: str, target: str, vocab_size: int, kv_bytes: int, config: EngineConfig, rows: Rows
) -> Drafter:
    loaded = load_draft_model(draft, config, load_provider(config.device, config.num_threads))
    checkpoint = open_checkpoint(resolve(target))
    try:
        tokenizer = load_tokenizer(checkpoint, cache_root())
    finally:
        checkpoint.close()
    return drafter_of(loaded, rows, tokenizer, vocab_size, kv_bytes, config)
