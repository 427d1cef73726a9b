"""How well documents answer a query, by three kinds of models: one that reads both at once, one that
says yes or no after reading both, and one that compares their vectors.

Legend: R documents, D model dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from elinvar.base.errors import InputError, ModelError
from elinvar.engine.encodings import Encodings
from elinvar.nn.decoder import Decoder
from elinvar.nn.encoder import Encoder
from elinvar.nn.pooling import Pooling
from elinvar.ops.api import F32, Ops
from elinvar.ops.layout import pack_float
from elinvar.run.texts import Text, TextRunner

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
"""Of Qwen3-Reranker where the user gives none."""
_BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n"
)
_AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
_WORDS = ("no", "yes")


class Scorer(Protocol):
    def encode(self, query: str, documents: Sequence[str], instruction: str | None) -> list[Text]:
        """The pairs as the model reads them."""
        ...

    def __call__(self, pairs: Sequence[Text]) -> F32:
        """The score [R] of each."""
        ...


class CrossEncoder:
    """A head with one label on the first token of the pair, perhaps with a sigmoid over it."""

    def __init__(self, runner: TextRunner, encodings: Encodings, sigmoid: bool, ops: Ops) -> None:
        assert isinstance(runner.model, Encoder)
        self._model, self._runner, self._encodings, self._ops = runner.model, runner, encodings, ops
        labels = self._model.encoder.num_labels
        if labels != 1:
            raise ModelError(
                f"This model tells {labels} labels apart and cannot rank; use a reranker, which has "
                "one label."
            )
        self._sigmoid = sigmoid
        self._first = Pooling(("cls",), ops)

    def encode(self, query: str, documents: Sequence[str], instruction: str | None) -> list[Text]:
        return self._encodings.pairs(query, documents)

    def __call__(self, pairs: Sequence[Text]) -> F32:
        first_RD, _ = self._runner.hidden(pairs, self._first.rows)
        scores_R1 = self._model.scores(first_RD)
        if self._sigmoid:  # what routing to one expert makes of its logit
            scores_R1 = self._ops.route(scores_R1, 1, "sigmoid", False, 1.0)[1]
        return self._ops.fetch(scores_R1)[:, 0]


class YesOrNo:
    """Qwen3-Reranker (Zhang et al., 2025): a decoder is asked, and the score is how much likelier "yes"
    is than "no" as its first word."""

    def __init__(self, runner: TextRunner, encodings: Encodings, ops: Ops) -> None:
        assert isinstance(runner.model, Decoder)
        self._model, self._runner, self._encodings, self._ops = runner.model, runner, encodings, ops
        words = np.array([encodings.token_id(word) for word in _WORDS], np.int32)
        rows = ops.embed(ops.place(words), self._model.head[0], 1.0)
        self._words = [pack_float("f32", ops.fetch(rows))]
        self._before, self._after = encodings.plain([_BEFORE, _AFTER])
        self._last = Pooling(("lasttoken",), ops)

    @staticmethod
    def fits(encodings: Encodings) -> bool:
        """Whether the model has the tokens that Qwen 3's prompt is made of."""
        return None not in map(encodings.token_id, (*_WORDS, "<|im_start|>", "<think>"))

    def encode(self, query: str, documents: Sequence[str], instruction: str | None) -> list[Text]:
        wanted = instruction or INSTRUCTION
        asked = [f"<Instruct>: {wanted}\n<Query>: {query}\n<Document>: {d}" for d in documents]
        around = len(self._before) + len(self._after)
        room = self._encodings.max_tokens - around
        if room < 1:
            raise InputError(
                "max_context",
                f"max_context must be above the {around} tokens of this model's question, got "
                f"{self._encodings.max_tokens}.",
            )
        return [
            Text([*self._before, *ids[:room], *self._after], truncated=len(ids) > room)
            for ids in self._encodings.plain(asked)
        ]

    def __call__(self, pairs: Sequence[Text]) -> F32:
        last_RD, _ = self._runner.hidden(pairs, self._last.rows)
        both_R2 = self._ops.linear(last_RD, self._words)
        return self._ops.fetch(self._ops.route(both_R2, 2, "softmax", False, 1.0)[1])[:, 1]
