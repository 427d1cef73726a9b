"""Rows of requests without a scheduler, for drafters: answers are given, drafters are asked along them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from elinvar.base.plan import RowStart
from elinvar.base.sampling import SamplingParams
from elinvar.run.drafters.api import Ask, Drafter, Guess
from elinvar.run.drafters.model import DraftModel
from elinvar.run.rows import Rows
from engines import provider, tiny_model
from families.base import VOCAB

MAX_CONTEXT = 512


def rows_for(max_rows: int = 4) -> Rows:
    return Rows(max_rows, MAX_CONTEXT, ())


def start(
    rows: Rows, row: int, prompt: Sequence[int], namespace: bytes = b"", **params: Any
) -> None:
    chosen = SamplingParams(**{"seed": 7 + row, **params})
    ids = list(prompt)
    rows.start(RowStart("", row, ids, chosen, [], -1, len(ids), frozenset(), namespace))


def come(rows: Rows, row: int, num_known: int, tokens: Sequence[int]) -> int:
    """Tokens that the target sampled; how many the row has with them."""
    rows.token_ids[row, num_known : num_known + len(tokens)] = tokens
    return num_known + len(tokens)


def draft_model(
    rows: Rows,
    family: str = "llama",
    kind: str = "q4",
    num_blocks: int = 64,
    vocab_size: int = VOCAB,
    **options: Any,
) -> DraftModel:
    ops = provider()
    model = tiny_model(ops, family, kind)
    specs = model.kv_specs("f16")
    counts = [num_blocks] * len(specs)
    return DraftModel(rows, model, ops, specs, counts, MAX_CONTEXT, vocab_size, **options)


def guess(drafter: Drafter, row: int, num_known: int, most: int, least: float = 0.0) -> Guess:
    [found] = drafter.propose([Ask(row, num_known, most, least)])
    return found
