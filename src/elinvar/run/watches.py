"""Watches: what the last tokens of a prompt attend to, and which of its blocks are kept by that
(docs/design/028-what-a-prompt-attends-to.md).

A block is worth the largest share that any head of any layer gives it, of any of these tokens: a
largest value has no order, so it does not matter in which steps they are computed.

Legend: W watched tokens of this step, B blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elinvar.base.batch import Watch
from elinvar.base.config import BLOCK_SIZE
from elinvar.base.plan import PlanItem
from elinvar.base.sampling import WATCHED

F32 = NDArray[np.float32]


@dataclass(slots=True, eq=False)
class _Prompt:
    num_tokens: int
    num_kept: int
    shares: F32
    """[B] of the watched tokens that were computed."""


class Watches:
    def __init__(self) -> None:
        self._prompts: dict[int, _Prompt] = {}
        """By row."""

    def start(self, row: int, num_tokens: int, num_kept: int | None) -> None:
        """A prompt of so many tokens, of which so many blocks are to be kept; None: all."""
        self._prompts.pop(row, None)
        if num_kept is not None:
            shares = np.zeros(-(-num_tokens // BLOCK_SIZE), np.float32)
            self._prompts[row] = _Prompt(num_tokens, num_kept, shares)

    def gather(self, items: Sequence[PlanItem]) -> Watch | None:
        """What the forward of `items` is to watch; None: nothing."""
        if not self._prompts:
            return None
        sequences, tokens, positions = [], [], []
        at = 0
        for i, item in enumerate(items):
            prompt = self._prompts.get(item.row)
            stop = item.start + item.num_tokens
            if prompt is not None and prompt.num_tokens - WATCHED < stop <= prompt.num_tokens:
                first = max(item.start, prompt.num_tokens - WATCHED)
                sequences.append(i)
                positions.append(np.arange(first, stop, dtype=np.int32))
                tokens.append(positions[-1] + (at - item.start))
            at += item.num_tokens
        if not sequences:
            return None
        all_tokens, width = (
            np.concatenate(tokens),
            -(-max(p[-1] + 1 for p in positions) // BLOCK_SIZE),
        )
        return Watch(
            np.array(sequences, np.int32),
            np.cumsum([0, *map(len, tokens)], dtype=np.int32),
            all_tokens,
            np.concatenate(positions),
            np.zeros((len(all_tokens), width), np.float32),
        )

    def choose(self, items: Sequence[PlanItem], watch: Watch) -> dict[int, list[int]]:
        """After the forward: the blocks kept of each prompt that ends here, by its item's index."""
        chosen = {}
        starts = watch.query_start_loc.tolist()
        for i, first, stop in zip(watch.sequences.tolist(), starts, starts[1:], strict=False):
            item = items[i]
            prompt = self._prompts[item.row]
            count = min(len(prompt.shares), watch.shares.shape[1])
            shares_B = prompt.shares[:count]
            np.maximum(shares_B, watch.shares[first:stop, :count].max(0), out=shares_B)
            if item.start + item.num_tokens == prompt.num_tokens:
                chosen[i] = most_seen(prompt.shares, prompt.num_tokens, prompt.num_kept)
                del self._prompts[item.row]
        return chosen


def most_seen(shares_B: F32, num_tokens: int, count: int) -> list[int]:
    """The `count` blocks of a prompt with the largest shares, of equal ones the earlier; the first block
    and those of the last tokens are always among them. Ascending."""
    worth = shares_B.copy()
    worth[0] = worth[(num_tokens - WATCHED) // BLOCK_SIZE :] = np.inf
    return sorted(np.argsort(-worth, kind="stable")[:count].tolist())
