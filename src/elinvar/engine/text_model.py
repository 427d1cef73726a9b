"""TextModel: a loaded embedding model or reranker, and what it is asked as tasks.

A task is texts, what turns a batch of them into rows, and what makes the answer of all rows. Rows do not
depend on the batch: whoever runs tasks may cut and mix them as it likes. Not thread-safe.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from elinvar.base.config import BLOCK_SIZE, EngineConfig
from elinvar.base.errors import InputError, ModelError
from elinvar.engine.core import LoadProgress
from elinvar.engine.encodings import Encodings, Input, encoder_backend
from elinvar.engine.memory import give_back
from elinvar.engine.recipe import Recipe, read_recipe
from elinvar.engine.scorers import CrossEncoder, Scorer, YesOrNo
from elinvar.models.load import load_encoder
from elinvar.models.registry import find_encoder
from elinvar.nn.pooling import Dense, Normalize, Pooling
from elinvar.ops import Ops, load_provider, on_host
from elinvar.ops.api import F32
from elinvar.ops.layout import pack_float
from elinvar.run.texts import Text, TextRunner
from elinvar.weights.cache import cache_root
from elinvar.weights.checkpoint import Checkpoint, open_checkpoint
from elinvar.weights.sources import resolve

Run = Callable[[Sequence[Text]], F32]


@dataclass(frozen=True, slots=True)
class Task:
    texts: list[Text]
    run: Run
    """A batch of texts to a row each; batches of tasks with the same one may be mixed."""
    finish: Callable[[F32], F32]
    """All rows to the answer."""

    @property
    def num_tokens(self) -> int:
        return sum(len(text.ids) for text in self.texts)

    @property
    def num_truncated(self) -> int:
        return sum(text.truncated for text in self.texts)


def is_text_model(path: Path) -> bool:
    """Whether a model's files say that it makes vectors or scores, and generates nothing."""
    checkpoint = open_checkpoint(path)
    try:
        kind = f"{checkpoint.architecture}.pooling_type"
        said = kind in checkpoint.metadata or (path / "modules.json").exists()
        return said or find_encoder(checkpoint) is not None
    finally:
        checkpoint.close()


class TextModel:
    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str],
        config: EngineConfig | None = None,
        progress: LoadProgress | None = None,
    ) -> TextModel:
        """Of a named model, pulled where it is not here yet. Raises ModelError when it cannot be
        found, read, or used so."""
        config = config or EngineConfig()
        tell = progress or (lambda what, done, total: None)
        path = resolve(os.fspath(model), lambda what, done, total: tell(what, done, total or 0))
        checkpoint = open_checkpoint(path)
        try:
            ops = load_provider(config.device, config.num_threads, cache=cache_root())
            return cls(checkpoint, config, ops, lambda done, total: tell("packing", done, total))
        finally:
            checkpoint.close()
            give_back()

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: EngineConfig,
        ops: Ops,
        packing: Callable[[int, int], None] | None = None,
    ) -> None:
        told = logging.getLogger("elinvar.weights").info
        model = load_encoder(checkpoint, ops, config.weight_format, cache_root(), told, packing)
        self.config, self.name, self._ops = model.config, checkpoint.path.name, ops
        runner = self._runner = TextRunner(model, ops)
        self.batch_blocks = ops.full_batch // BLOCK_SIZE
        """Of the texts of a batch."""
        if ops.available_memory() is not None:  # who is loaded later takes what is left there
            runner.reserve(self.batch_blocks)
        # What follows is little, and wants all digits: it is done where the answer is to be.
        self._host = on_host(ops, config.num_threads)
        self.recipe: Recipe = read_recipe(checkpoint, model.config, self._host)
        longest = min(self.recipe.max_tokens, config.max_context or self.recipe.max_tokens)
        backend = encoder_backend(checkpoint)
        self.encodings = Encodings(backend, model.config, longest, self.recipe.lower_case)
        self._pooling = Pooling(self.recipe.modes, ops)
        labels = 0 if model.config.encoder is None else model.config.encoder.num_labels
        self.reranks = labels > 0
        """Whether it reads a query and a document together, and makes no vectors."""
        self._scorer: Scorer | None = None
        if self.reranks:
            self._scorer = CrossEncoder(runner, self.encodings, self.recipe.sigmoid, ops)
        elif model.config.encoder is None and self.recipe.note and YesOrNo.fits(self.encodings):
            self._scorer = YesOrNo(runner, self.encodings, ops)

    @property
    def max_tokens(self) -> int:
        """Of the longest text."""
        return self.encodings.max_tokens

    @property
    def num_dims(self) -> int:
        """Of a vector."""
        dense = [step for step in self.recipe.after if isinstance(step, Dense)]
        return dense[-1].num_dims if dense else self.config.dim * len(self.recipe.modes)

    def notes(self, ranking: bool) -> str | None:
        """What was assumed of the model."""
        if self.reranks or self.recipe.note is None:
            return None
        if ranking and self._scorer is not None:
            return f"{self.name} is taken for Qwen3-Reranker: the score is its yes against its no."
        return self.recipe.note

    def vectors(self, batch: Sequence[Text]) -> F32:
        """[R, D]"""
        hidden_LD, starts = self._runner.hidden(batch, self._pooling.rows)
        x_RD = self._ops.fetch(self._pooling(hidden_LD, starts))
        for step in self.recipe.after:
            x_RD = step(x_RD)
        return x_RD

    def embedding(
        self,
        texts: Sequence[Input],
        prompt: str | None = None,
        prompt_name: str | None = None,
        dimensions: int | None = None,
        truncate: bool = True,
    ) -> Task:
        """The answer: vectors [R, D]. Each is that of its text, so that rows may be finished as they
        come. The arguments are those of Embedder.stream."""
        if self.reranks:
            raise ModelError(
                f"{self.name} is a reranker and makes no vectors; use 'elinvar rerank', or embed with "
                "another model."
            )
        if dimensions is not None and not 1 <= dimensions <= self.num_dims:
            raise InputError(
                "dimensions", f"dimensions must be from 1 to {self.num_dims}, got {dimensions!r}."
            )
        before = self._prompt(prompt_name) if prompt is None else prompt
        prompted = [before + text if isinstance(text, str) else text for text in texts]
        encoded = self.encodings.texts(prompted, truncate)
        return Task(encoded, self.vectors, lambda x_RD: self._shortened(x_RD, dimensions))

    def ranking(
        self,
        query: str,
        documents: Sequence[str],
        instruction: str | None = None,
        truncate: bool = True,
    ) -> Task:
        """The answer: a score [R] for each document, of which the last texts of the task are. The
        arguments are those of Embedder.rank."""
        if self._scorer is None:
            texts, begin = self._to_compare(query, documents, instruction), 1
            task = Task(texts, self.vectors, self._compared)
        else:
            texts, begin = self._scorer.encode(query, documents, instruction), 0
            task = Task(texts, self._scorer, lambda scores_R: scores_R)
        if not truncate and task.num_truncated:
            first = next(i for i, text in enumerate(texts) if text.truncated) - begin
            which = "The query" if first < 0 else f"Document {first}"
            raise InputError(
                "documents",
                f"{which} is longer than fits into the {self.max_tokens} tokens that this model "
                "takes; shorten it or let it be truncated.",
            )
        return task

    def _prompt(self, name: str | None) -> str:
        prompts = self.recipe.prompts
        name = self.recipe.default_prompt if name is None else name
        if name is None:
            return ""
        if name not in prompts:
            known = f"it has {', '.join(prompts)}" if prompts else "it brings none, give its text"
            raise InputError("prompt_name", f"{self.name} has no prompt {name!r}; {known}.")
        return prompts[name]

    def _shortened(self, x_RD: F32, dimensions: int | None) -> F32:
        if dimensions is None or dimensions == x_RD.shape[1]:
            return x_RD
        x_RD = np.ascontiguousarray(x_RD[:, :dimensions])
        normalises = any(isinstance(step, Normalize) for step in self.recipe.after)
        return Normalize(self._host)(x_RD) if normalises else x_RD

    def _to_compare(
        self, query: str, documents: Sequence[str], instruction: str | None
    ) -> list[Text]:
        """The query, then the documents, each with the prompt that the model has for it."""
        prompts = self.recipe.prompts
        before = prompts.get("query", "") if instruction is None else instruction
        behind = next((prompts[n] for n in ("document", "passage", "corpus") if n in prompts), "")
        texts = [before + query, *(behind + document for document in documents)]
        return self.encodings.texts(texts)

    def _compared(self, x_RD: F32) -> F32:
        """How much the vector of each is like the first."""
        if not self.recipe.dot:
            x_RD = Normalize(self._host)(x_RD)
        return self._host.linear(x_RD[1:], [pack_float("f32", x_RD[:1])])[:, 0]
