"""Embedder: vectors of texts, and documents ranked by how well they answer a query.

Texts run whole and in their order, so many a batch as a budget of tokens holds; a vector or a score does
not depend on what else is in its batch. Synchronous and not thread-safe.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from elinvar.base.config import BLOCK_SIZE, EngineConfig
from elinvar.base.errors import InputError, ModelError
from elinvar.engine.core import LoadProgress
from elinvar.engine.encodings import Encodings, Input, encoder_backend
from elinvar.engine.memory import give_back
from elinvar.engine.recipe import Recipe, read_recipe
from elinvar.engine.scorers import CrossEncoder, Scorer, YesOrNo
from elinvar.models.load import load_encoder
from elinvar.nn.pooling import Dense, Normalize, Pooling
from elinvar.ops import load_provider
from elinvar.ops.api import F32
from elinvar.ops.layout import pack_float
from elinvar.run.texts import Text, TextRunner, batches
from elinvar.weights.cache import cache_root
from elinvar.weights.checkpoint import Checkpoint, open_checkpoint
from elinvar.weights.sources import resolve

log = logging.getLogger(__name__)

BATCH_TOKENS = 2048
"""Of a batch, in whole blocks: enough to read the weights seldom, few enough to stay in the caches."""
_WINDOW = 1024
"""Texts that are encoded at once."""
Progress = Callable[[int], None]
"""Called after each batch with the number of texts that are done."""


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    vector: F32
    """[D]"""
    num_tokens: int
    truncated: bool
    """Whether the text was longer than the model takes."""


@dataclass(frozen=True, slots=True)
class Ranked:
    index: int
    """Of the document."""
    score: float
    num_tokens: int
    truncated: bool


class Embedder:
    """An embedding model or a reranker, ready to work.

    model: an alias, `hf:org/name`, `pypi:name` or a path. options: fields of EngineConfig, of which
    num_threads, weight_format, provider and max_context (of the longest text) matter here. progress:
    told what is being loaded. Raises ModelError when the model cannot be found, read, or used so.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        config: EngineConfig | None = None,
        *,
        progress: LoadProgress | None = None,
        **options: Any,
    ) -> None:
        config = config or EngineConfig(**options)
        tell = progress or (lambda what, done, total: None)
        path = resolve(os.fspath(model), lambda what, done, total: tell(what, done, total or 0))
        checkpoint = open_checkpoint(path)
        try:
            self._load(checkpoint, config, lambda done, total: tell("packing", done, total))
        finally:
            checkpoint.close()
        give_back()

    def _load(
        self, checkpoint: Checkpoint, config: EngineConfig, packing: Callable[[int, int], None]
    ) -> None:
        ops = self._ops = load_provider(config.provider, config.num_threads)
        told = logging.getLogger("elinvar.weights").info
        model = load_encoder(checkpoint, ops, config.weight_format, cache_root(), told, packing)
        self.config, self.name = model.config, checkpoint.path.name
        self.runner = TextRunner(model, ops)
        self.recipe: Recipe = read_recipe(checkpoint, model.config, ops)
        """How vectors are made, prompts, and what was assumed (note)."""
        longest = min(self.recipe.max_tokens, config.max_context or self.recipe.max_tokens)
        backend = encoder_backend(checkpoint)
        self.encodings = Encodings(backend, longest, self.recipe.lower_case)
        self._pooling = Pooling(self.recipe.modes, ops)
        self._head: Scorer | None = None
        if self.reranks:
            self._head = CrossEncoder(self.runner, self.encodings, checkpoint.metadata, ops)

    @property
    def max_tokens(self) -> int:
        """Of the longest text."""
        return self.encodings.max_tokens

    @property
    def reranks(self) -> bool:
        """Whether the model reads a query and a document together, and makes no vectors."""
        return self.config.encoder is not None and self.config.encoder.num_labels > 0

    def embed(
        self,
        texts: Sequence[Input],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        dimensions: int | None = None,
        truncate: bool = True,
        progress: Progress | None = None,
    ) -> F32:
        """The vectors [N, D] of the texts; see `stream`. The log tells how many were truncated."""
        vectors: list[F32] = []
        truncated = 0
        for one in self.stream(
            texts,
            prompt=prompt,
            prompt_name=prompt_name,
            dimensions=dimensions,
            truncate=truncate,
            progress=progress,
        ):
            vectors.append(one.vector)
            truncated += one.truncated
        if truncated:
            log.warning(
                "%d of %d texts were cut to %d tokens.", truncated, len(vectors), self.max_tokens
            )
        if not vectors:
            return np.empty((0, dimensions or self.num_dims), np.float32)
        return np.stack(vectors)

    def stream(
        self,
        texts: Iterable[Input],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        dimensions: int | None = None,
        truncate: bool = True,
        progress: Progress | None = None,
    ) -> Iterator[Embedding]:
        """The texts' vectors, in their order and as they come.

        prompt: put before each text; or prompt_name, one that the model brings. dimensions: so many
        first ones, normalised again where the model normalises: for models that were trained for it.
        A text that is too long is cut to `max_tokens`; without `truncate` that is an InputError.
        Raises ModelError for a reranker, which makes no vectors.
        """
        if self.reranks:
            raise ModelError(
                f"{self.name} is a reranker and makes no vectors; use 'elinvar rerank', or embed with "
                "another model."
            )
        if dimensions is not None and not 1 <= dimensions <= self.num_dims:
            raise InputError(
                "dimensions",
                f"dimensions must be from 1 to {self.num_dims}, got {dimensions!r}.",
            )
        before = self._prompt(prompt, prompt_name)
        return self._stream(iter(texts), before, dimensions, truncate, progress)

    def _stream(
        self,
        texts: Iterator[Input],
        before: str,
        dimensions: int | None,
        truncate: bool,
        progress: Progress | None,
    ) -> Iterator[Embedding]:
        done = 0
        while window := list(islice(texts, _WINDOW)):
            prompted = [before + text if isinstance(text, str) else text for text in window]
            encoded = self.encodings.texts(prompted, self.config.vocab_size, truncate)
            for batch in batches(encoded, BATCH_TOKENS // BLOCK_SIZE):
                for text, vector in zip(batch, self.vectors(batch, dimensions), strict=True):
                    yield Embedding(vector, len(text.ids), text.truncated)
                done += len(batch)
                if progress is not None:
                    progress(done)

    def vectors(self, batch: Sequence[Text], dimensions: int | None = None) -> F32:
        """Of one batch -> [R, D]."""
        hidden_LD, starts = self.runner.hidden(batch, self._pooling.rows)
        x_RD = self._pooling(hidden_LD, starts)
        for step in self.recipe.after:
            x_RD = step(x_RD)
        if dimensions is not None and dimensions < x_RD.shape[1]:
            x_RD = np.ascontiguousarray(x_RD[:, :dimensions])
            if any(isinstance(step, Normalize) for step in self.recipe.after):
                x_RD = Normalize(self._ops)(x_RD)
        return x_RD

    @property
    def num_dims(self) -> int:
        """Of a vector."""
        dense = [step for step in self.recipe.after if isinstance(step, Dense)]
        return dense[-1].num_dims if dense else self.config.dim * len(self.recipe.modes)

    def _prompt(self, prompt: str | None, name: str | None) -> str:
        prompts = self.recipe.prompts
        if prompt is not None:
            return prompt
        name = self.recipe.default_prompt if name is None else name
        if name is None:
            return ""
        if name not in prompts:
            known = f"it has {', '.join(prompts)}" if prompts else "it has none"
            raise InputError("prompt_name", f"{self.name} has no prompt {name!r}; {known}.")
        return prompts[name]

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_n: int | None = None,
        instruction: str | None = None,
        truncate: bool = True,
        progress: Progress | None = None,
    ) -> list[Ranked]:
        """The documents, best first, equal ones in their order.

        A reranker reads each with the query. Of an embedding model the vectors are compared, made
        with its prompts `query` and `document`, if it has them. instruction: what Qwen3-Reranker is
        told to look for, or the prompt of an embedding model's query. Raises as `stream`.
        """
        scorer = self._scorer()
        if scorer is None:
            pairs, score = self._compared(query, documents, instruction)
        else:
            pairs, score = scorer.encode(query, documents, instruction), scorer
        for i, pair in enumerate(pairs):
            if pair.truncated and not truncate:
                raise InputError(
                    "documents",
                    f"Document {i} with the query is longer than the {self.max_tokens} tokens that "
                    "this model takes; shorten it or let it be truncated.",
                )
        scores: list[float] = []
        for batch in batches(pairs, BATCH_TOKENS // BLOCK_SIZE):
            scores += score(batch).tolist()
            if progress is not None:
                progress(len(scores))
        order = sorted(range(len(scores)), key=lambda i: -scores[i])[:top_n]
        return [Ranked(i, scores[i], len(pairs[i].ids), pairs[i].truncated) for i in order]

    def _scorer(self) -> Scorer | None:
        """None: the model makes vectors, which are compared. A decoder that says nothing of vectors
        is taken for Qwen3-Reranker."""
        if self._head is None and self.config.encoder is None and self.recipe.note is not None:
            self._head = YesOrNo(self.runner, self.encodings, self._ops)
        return self._head

    def _compared(
        self, query: str, documents: Sequence[str], instruction: str | None
    ) -> tuple[list[Text], Callable[[Sequence[Text]], F32]]:
        """The documents, and how much the vector of each is like that of the query."""
        prompts = self.recipe.prompts
        before = prompts.get("query", "") if instruction is None else instruction
        behind = next((prompts[n] for n in ("document", "passage", "corpus") if n in prompts), "")
        size = self.config.vocab_size
        compare = [] if self.recipe.dot else [Normalize(self._ops)]

        def vectors(batch: Sequence[Text]) -> F32:
            x_RD = self.vectors(batch)
            for step in compare:
                x_RD = step(x_RD)
            return x_RD

        wanted = pack_float("f32", vectors(self.encodings.texts([before + query], size)))
        texts = self.encodings.texts([behind + document for document in documents], size)
        return texts, lambda batch: self._ops.linear(vectors(batch), [wanted])[:, 0]
