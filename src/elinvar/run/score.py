"""Log-probs of prompts: the head over the rows of a span, a few at a time.

The logits of a row are the same whatever is computed beside it, and what is told of them is what
sampling tells: so the log-probs of a sequence as a prompt are those of its generation, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from elinvar.base.batch import I32, ForwardBatch
from elinvar.base.plan import PlanItem, TokenLogprobs
from elinvar.ops.api import F32
from elinvar.ops.arguments import SampleResult
from elinvar.run.graphs import Graphs

MOST_LOGITS = 2**22
"""Logits that are there at once: 16 MiB."""


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of a prompt that a step computes, each followed by one that is given."""

    item: int
    row: int
    start: int
    stop: int
    num_top: int


def prompt_spans(items: Sequence[PlanItem], scored: Mapping[int, tuple[int, int]]) -> list[Span]:
    """Of those rows that are `scored`: length of the prompt, number of alternatives."""
    spans = []
    for i, item in enumerate(items):
        num_prompt, num_top = scored.get(item.row, (0, 0))
        stop = min(item.start + item.num_tokens, num_prompt - 1)
        if item.start < stop:
            spans.append(Span(i, item.row, item.start, stop, num_top))
    return spans


def scored_rows(batch: ForwardBatch, spans: Sequence[Span]) -> I32:
    """Of the batch's tokens those whose logits are needed, with batch.logit_rows, in their order."""
    return np.unique(np.concatenate([batch.logit_rows, *_rows_of(batch, spans)])).astype(np.int32)


def _rows_of(batch: ForwardBatch, spans: Sequence[Span]) -> list[I32]:
    starts = batch.query_start_loc
    return [np.arange(starts[s.item], starts[s.item] + s.stop - s.start) for s in spans]


def score_prompts(
    graphs: Graphs, batch: ForwardBatch, spans: Sequence[Span], h_LD: F32, token_ids: I32
) -> tuple[F32, dict[int, list[TokenLogprobs]]]:
    """The logits of batch.logit_rows, and by items the log-probs of what follows each token. h_LD: what
    the head gets of `scored_rows`."""
    rows_L = scored_rows(batch, spans)

    def head(rows: I32) -> F32:
        return graphs.head(replace(batch, logit_rows=rows), h_LD[np.searchsorted(rows_L, rows)])

    scores: dict[int, list[TokenLogprobs]] = {}
    most = max(1, MOST_LOGITS // graphs.model.config.vocab_size)
    for span, rows in zip(spans, _rows_of(batch, spans), strict=True):
        next_ids = token_ids[span.row, span.start + 1 : span.stop + 1]
        values = scores[span.item] = []
        for at in range(0, len(rows), most):
            logits_LV = head(rows[at : at + most])
            result = graphs.ops.score(logits_LV, next_ids[at : at + most], span.num_top)
            values += [token_logprobs(result, i, span.num_top) for i in range(len(logits_LV))]
    return (head(batch.logit_rows) if len(batch.logit_rows) else h_LD[:0]), scores


def token_logprobs(result: SampleResult, at: int, num_top: int) -> TokenLogprobs:
    ids = result.top_ids[at, :num_top].tolist()
    values = result.top_logprobs[at, :num_top].tolist()
    return TokenLogprobs(float(result.logprobs[at]), list(zip(ids, values, strict=True)))
