"""A smaller model that drafts, loaded beside the model that it drafts for or in a process of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from elinvar.base.config import EngineConfig
from elinvar.base.errors import ModelError
from elinvar.engine.memory import available_memory
from elinvar.engine.plan_kv import plan_kv
from elinvar.engine.tokenizer import Tokenizer, load_tokenizer
from elinvar.models.load import load_model
from elinvar.ops import Ops, load_provider
from elinvar.run.drafters.api import Drafter
from elinvar.run.drafters.model import DraftModel
from elinvar.run.drafters.retokenised import TAIL, Retokenised
from elinvar.run.rows import Rows
from elinvar.weights.cache import cache_root
from elinvar.weights.checkpoint import Checkpoint, open_checkpoint

KV_SHARE = 4
"""Its cache takes a quarter of what the model's own does,"""
LEAST_KV = 32 << 20
"""or so many bytes."""


def is_model(checkpoint: Checkpoint) -> bool:
    """Whether there is a whole model in it, of a family that is known."""
    from elinvar.models.load import find_family

    try:
        find_family(checkpoint)
    except ModelError:
        return False
    return True


def same_tokens(checkpoint: Checkpoint, tokenizer: Tokenizer) -> bool:
    """Whether its tokens are spelled as the tokenizer's are."""
    own = load_tokenizer(checkpoint, cache_root())
    count = min(own.vocab_size, tokenizer.vocab_size)
    return own.spellings(count) == tokenizer.spellings(count)


@dataclass(frozen=True)
class DraftModelMaker:
    """Plain data, so that it may be called in another process."""

    path: str
    target: str | None
    """The model whose tokens are others; None: they are the same."""
    config: EngineConfig
    kv_bytes: int = LEAST_KV
    vocab_size: int = 0

    def sized(self, kv_bytes: int, vocab_size: int) -> DraftModelMaker:
        """For a model whose cache takes so many bytes, and whose logits are so many."""
        return replace(self, kv_bytes=max(LEAST_KV, kv_bytes // KV_SHARE), vocab_size=vocab_size)

    def __call__(self, rows: Rows) -> Drafter:
        return self.make(rows, load_provider(self.config.provider, self.config.num_threads))

    def make(self, rows: Rows, ops: Ops) -> Drafter:
        """The drafter, over a provider that may have other models. Raises ModelError."""
        checkpoint = open_checkpoint(Path(self.path))
        try:
            model = load_model(checkpoint, ops, self.config.weight_format, cache_root())
            own = None if self.target is None else load_tokenizer(checkpoint, cache_root())
        finally:
            checkpoint.close()
        specs = model.kv_specs(self.config.kv_dtype)
        plan = plan_kv(specs, model.config.max_context, available_memory(), kv_memory=self.kv_bytes)

        def drafter(rows: Rows, vocab_size: int, unsettled: int = 0) -> DraftModel:
            longest = plan.max_context
            return DraftModel(
                *(rows, model, ops, specs, plan.num_blocks, longest, vocab_size, unsettled)
            )

        if own is None:
            return drafter(rows, self.vocab_size)
        target = open_checkpoint(Path(self.target or ""))
        try:
            whole = load_tokenizer(target, cache_root())
        finally:
            target.close()
        size = model.config.vocab_size
        return Retokenised(
            rows, model.config.max_context, whole, own, lambda r: drafter(r, size, TAIL + 8)
        )
