"""Vectors of texts, in the shape of BGE-large (24 layers of 1,024 dims, f16): tokens a second for texts of some
lengths, and whether a text has the bits alone that it has in a batch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elinvar.models.registry import find_encoder, read_config
from elinvar.nn.encoder import Encoder
from elinvar.nn.pooling import Pooling
from elinvar.ops import load_provider
from elinvar.run.texts import Text, TextRunner
from elinvar.weights.checkpoint import Checkpoint
from elinvar.weights.rules import bind
from gpu_parts.base import Part
from gpu_parts.models import make_on_device, unmade

LARGE = {
    "architectures": ["BertModel"],
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "max_position_embeddings": 512,
    "vocab_size": 30522,
    "layer_norm_eps": 1e-12,
}
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 64}
SMALL |= {"num_attention_heads": 2}


class Vectors:
    """Means over texts."""

    def __init__(self, part: Part) -> None:
        settings = LARGE | (SMALL if part.small else {})
        checkpoint = Checkpoint(Path("config.json"), "safetensors", "BertModel", settings, {}, "")
        family, config = find_encoder(checkpoint), read_config(checkpoint)
        assert family is not None
        weights: dict[str, Any] = {}
        for one in bind(family.rules(config), "safetensors", config.num_layers):
            assert one.shape is not None
            if len(one.shape) == 2:
                weights[one.name] = unmade("f16", one.shape, one.name)
            else:
                value = float(one.name.endswith("norm"))
                weights[one.name] = np.full(one.shape, value, np.float32)
        self.ops: Any = load_provider("cuda")
        make_on_device()
        self.ops.prepare(weights)
        model = family.build(config, weights, self.ops)
        assert isinstance(model, Encoder)
        self.runner, self.pooling = TextRunner(model, self.ops), Pooling(("mean",), self.ops)
        self.vocab_size, self.full_batch = config.vocab_size, self.ops.full_batch

    def texts(self, lengths: list[int]) -> list[Text]:
        rng = np.random.default_rng(0)
        return [Text(rng.integers(0, self.vocab_size, n).tolist()) for n in lengths]

    def __call__(self, texts: list[Text]) -> torch.Tensor:
        found: torch.Tensor = self.pooling(*self.runner.hidden(texts, self.pooling.rows))
        return found


def measure(part: Part) -> None:
    vectors = Vectors(part)
    part.attempt("right", lambda: right(vectors, [3, 33] if part.small else [7, 512, 33, 128, 1]))
    for length in (5,) if part.small else (16, 64, 512):
        part.attempt(f"speed/{length}", partial(speed, part, vectors, length))


def right(vectors: Vectors, lengths: list[int]) -> dict[str, Any]:
    texts = vectors.texts(lengths)
    whole = vectors(texts)
    alone = [torch.equal(vectors([text])[0], row) for text, row in zip(texts, whole, strict=True)]
    return {"finite": bool(whole.isfinite().all()), "alone_as_in_a_batch": all(alone)}


def speed(part: Part, vectors: Vectors, length: int) -> dict[str, Any]:
    """Of batches as the engine makes them, and of a text alone."""
    batch = vectors.texts([length] * (2 if part.small else vectors.full_batch // length))
    taken = part.seconds([partial(vectors, batch)])
    alone = part.seconds([partial(vectors, batch[:1])])
    return {"tokens_per_s": len(batch) * length / taken, "alone_ms": alone * 1e3}
