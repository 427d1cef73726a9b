"""TextRunner: whole texts to vectors, one forward a batch, nothing kept.

Owns the batch's arrays. A layer's keys and values are needed by that layer alone, as every text is
computed in one step: all layers write to the arrays of one, a step after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from elinvar.base.batch import ForwardBatch
from elinvar.base.config import BLOCK_SIZE
from elinvar.nn.decoder import Decoder
from elinvar.nn.encoder import Encoder
from elinvar.ops.api import F32, I32, Ops
from elinvar.ops.caches import LayerCache


@dataclass(frozen=True, slots=True)
class Text:
    ids: Sequence[int]
    type_ids: Sequence[int] | None = None
    """One a token; None: all 0."""
    truncated: bool = False

    @property
    def num_blocks(self) -> int:
        return -(-len(self.ids) // BLOCK_SIZE)


class TextRunner:
    def __init__(self, model: Encoder | Decoder, ops: Ops) -> None:
        self.model, self._ops = model, ops
        self._specs = model.kv_specs(ops.widest_kv)
        self._num_groups = len(self._specs)
        self._num_blocks, self._kv = 0, list[LayerCache]()

    def hidden(self, texts: Sequence[Text], rows: Callable[[I32], I32]) -> tuple[F32, I32]:
        """The last layer's vectors of some tokens [L, D], and where each text begins among all
        [R + 1], from which `rows` tells the tokens that are wanted."""
        lengths = np.array([len(text.ids) for text in texts], np.int32)
        blocks = np.array([text.num_blocks for text in texts], np.int32)
        starts = np.cumsum([0, *lengths], dtype=np.int32)
        first_blocks = np.cumsum([0, *blocks], dtype=np.int32)[:-1]
        positions = np.arange(starts[-1], dtype=np.int32) - np.repeat(starts[:-1], lengths)
        slots = np.repeat(first_blocks * np.int32(BLOCK_SIZE), lengths) + positions
        tables = first_blocks[:, None] + np.arange(blocks.max(), dtype=np.int32)
        batch = ForwardBatch(
            input_ids=np.concatenate([np.asarray(text.ids, np.int32) for text in texts]),
            positions=positions,
            query_start_loc=starts,
            seq_lens=lengths,
            block_tables=(tables,) * self._num_groups,
            slot_mapping=(slots,) * self._num_groups,
            logit_rows=rows(starts),
            type_ids=np.concatenate([np.asarray(_types(text), np.int32) for text in texts]),
            last_keys=np.repeat(lengths - np.int32(1), lengths),
        )
        kv = self._cache(int(blocks.sum()))
        return self.model.hidden(self._ops.upload(batch), kv), starts

    def reserve(self, num_blocks: int) -> None:
        """Take the memory that batches of so many blocks need, weights and all."""
        texts = [Text([0] * BLOCK_SIZE)] * num_blocks
        self.hidden(texts, lambda starts: np.arange(starts[-1], dtype=np.int32))

    def _cache(self, num_blocks: int) -> list[LayerCache]:
        if num_blocks > self._num_blocks:
            self._num_blocks = 1 << (num_blocks - 1).bit_length()
            layers: dict[int, LayerCache] = {}
            for spec in self._specs:
                [one] = self._ops.kv_layers(replace(spec, layers=(0,)), self._num_blocks)
                layers |= dict.fromkeys(spec.layers, one)
            self._kv = [layers[i] for i in sorted(layers)]
        return self._kv


def _types(text: Text) -> Sequence[int]:
    return [0] * len(text.ids) if text.type_ids is None else text.type_ids


def batches(texts: Sequence[Text], max_blocks: int) -> Iterator[Sequence[Text]]:
    """The texts in their order, so many at a time that they take at most `max_blocks` blocks; one that
    takes more comes alone. Nothing is padded: like lengths need not meet."""
    first, total = 0, 0
    for i, text in enumerate(texts):
        if i > first and total + text.num_blocks > max_blocks:
            yield texts[first:i]
            first, total = i, 0
        total += text.num_blocks
    if first < len(texts):
        yield texts[first:]
