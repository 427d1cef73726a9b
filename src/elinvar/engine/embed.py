"""Embedder: vectors of texts, and documents ranked by how well they answer a query, for scripts.

Texts run whole and in their order, so many a batch as a budget of tokens holds; a vector or a score does
not depend on what else is in its batch. Blocking calls; one thread.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from elinvar.base.config import EngineConfig
from elinvar.engine.core import LoadProgress
from elinvar.engine.encodings import Input
from elinvar.engine.text_model import Task, TextModel
from elinvar.ops.api import F32
from elinvar.run.texts import batches

log = logging.getLogger(__name__)

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
    """Of the document, or of the pair where the model reads both."""
    truncated: bool


class Embedder:
    """An embedding model or a reranker, ready to work.

    model: an alias, `hf:org/name`, `pypi:name` or a path; or a TextModel that is there already.
    options: fields of EngineConfig, of which num_threads, weight_format, device and max_context (of
    the longest text) matter here. progress: told what is being loaded. Raises ModelError when the
    model cannot be found, read, or used so.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | TextModel,
        *,
        progress: LoadProgress | None = None,
        **options: Any,
    ) -> None:
        if isinstance(model, TextModel):
            self.model = model
        else:
            self.model = TextModel.load(model, EngineConfig(**options), progress)

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
        how: dict[str, Any] = {"prompt": prompt, "prompt_name": prompt_name, "truncate": truncate}
        found = list(self.stream(texts, **how, dimensions=dimensions, progress=progress))
        if num_truncated := sum(one.truncated for one in found):
            longest = self.model.max_tokens
            log.warning("%d of %d texts were cut to %d tokens.", num_truncated, len(found), longest)
        if not found:
            return np.empty((0, dimensions or self.model.num_dims), np.float32)
        return np.stack([one.vector for one in found])

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
        """The texts' vectors, in their order and as they come. A text may be its token ids.

        prompt: put before each text; or prompt_name, one that the model brings. dimensions: so many
        first ones, normalised again where the model normalises: for models that were trained for it.
        A text that is too long is cut; without `truncate` that is an InputError. Raises ModelError
        for a reranker, which makes no vectors.
        """
        rest, done = iter(texts), 0
        while window := list(islice(rest, _WINDOW)):
            task = self.model.embedding(window, prompt, prompt_name, dimensions, truncate)
            vectors = (task.finish(rows) for rows in self._rows(task))
            for text, vector in zip(task.texts, _each(vectors, done, progress), strict=True):
                yield Embedding(vector, len(text.ids), text.truncated)
            done += len(window)

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
        told to look for, or the prompt of an embedding model's query. What is too long is cut;
        without `truncate` that is an InputError.
        """
        if not documents:
            return []
        task = self.model.ranking(query, documents, instruction, truncate)
        rows = np.stack(list(_each(self._rows(task), 0, progress)))
        return ranked(task, task.finish(rows), top_n)

    def _rows(self, task: Task) -> Iterator[F32]:
        """By batch."""
        return (task.run(batch) for batch in batches(task.texts, self.model.batch_blocks))


def _each(parts: Iterator[F32], done: int, progress: Progress | None) -> Iterator[Any]:
    for rows in parts:
        yield from rows
        done += len(rows)
        if progress is not None:
            progress(done)


def ranked(task: Task, scores: F32, top_n: int | None) -> list[Ranked]:
    """The answer to a task of ranking."""
    texts, values = task.texts[-len(scores) :], scores.tolist()
    order = sorted(range(len(values)), key=lambda i: -values[i])[:top_n]
    return [Ranked(i, values[i], len(texts[i].ids), texts[i].truncated) for i in order]
