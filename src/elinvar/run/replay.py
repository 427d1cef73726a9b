"""Replay: what a drafter is worth, measured on answers that the target gave.

Drafts cannot change an answer, so recorded ones are all that is needed: each step asks the drafter, counts
what it has right, and lets the target compute as many tokens as it would.

Legend: T tokens, D model dim, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from elinvar.base.batch import DecodeBatch, ForwardBatch
from elinvar.base.config import BLOCK_SIZE, KVDtype
from elinvar.base.plan import PlanItem, RowStart
from elinvar.base.sampling import SamplingParams
from elinvar.nn.decoder import Decoder
from elinvar.ops.api import F32, Ops
from elinvar.ops.caches import LayerCache
from elinvar.run.drafters.api import Ask, Drafter, Seen
from elinvar.run.rows import Rows


@dataclass(frozen=True, slots=True)
class Recorded:
    token_ids: Sequence[int]
    """Prompt and answer."""
    num_prompt: int
    params: SamplingParams
    """With the seed that the answer was sampled by."""


@dataclass(slots=True)
class Worth:
    """Of drafts in one row at a time."""

    num_asked: list[int]
    """By their place in a chain: how often all before them were right."""
    num_right: list[int]
    num_tokens: int = 0
    """That the answers have."""
    step_s: list[float] = field(default_factory=list)
    """Seconds of each step."""

    @property
    def chances(self) -> list[float]:
        """By place: of being right where all before are."""
        pairs = zip(self.num_right, self.num_asked, strict=True)
        return [right / asked if asked else 0.0 for right, asked in pairs]

    @property
    def tokens_a_step(self) -> float:
        return self.num_tokens / max(len(self.step_s), 1)

    @property
    def tokens_a_second(self) -> float:
        """By its quicker steps, of ten the second: others may use the machine, too."""
        seconds = sorted(self.step_s)
        return self.tokens_a_step / seconds[len(seconds) // 10] if seconds else 0.0


def speed_up(plain: Worth, drafted: Worth) -> float:
    """Of drafting beside not, measured one after the other. A step is no quicker for its drafts."""
    return min(drafted.tokens_a_second / plain.tokens_a_second, drafted.tokens_a_step)


MakeDrafter = Callable[[Rows, list[LayerCache]], Drafter | None]


class Replay:
    """The target, with caches for one answer of up to `max_context` tokens."""

    def __init__(
        self, model: Decoder, ops: Ops, max_context: int, kv_dtype: KVDtype = "f16"
    ) -> None:
        self._model, self._ops = model, ops
        self._specs = model.kv_specs(kv_dtype)
        self._max_context = max_context + 1
        num_blocks = -(-self._max_context // BLOCK_SIZE)
        layers: dict[int, LayerCache] = {}
        for spec in self._specs:
            layers |= zip(spec.layers, ops.kv_layers(spec, num_blocks), strict=True)
        self._kv = [layers[i] for i in range(len(layers))]
        self._blocks = [list(range(num_blocks)) for _ in self._specs]

    def states(self, token_ids: Sequence[int]) -> F32:
        """What the target's `hidden` gives of all tokens of a text."""
        rows = Rows(1, self._max_context, self._specs)
        params = SamplingParams(seed=0)
        rows.start(RowStart("", 0, list(token_ids), params, self._blocks))
        batch, _, _ = rows.gather([self._item(0, len(token_ids), 0, sample=False)])
        return self._ops.fetch(self._hidden(batch))

    def _hidden(self, batch: ForwardBatch | DecodeBatch) -> F32:
        flat = batch if isinstance(batch, ForwardBatch) else batch.flat()
        return self._model.hidden(self._ops.upload(flat), self._kv, all_tokens=True)

    def measure(
        self, make: MakeDrafter, answers: Sequence[Recorded], most: int, num_tokens: int
    ) -> Worth:
        """make: of rows and caches; None: nothing is drafted. most: drafts in a step; num_tokens: of each
        answer, at most."""
        rows = Rows(1, self._max_context, self._specs)
        drafter = make(rows, self._kv)
        worth = Worth([0] * most, [0] * most)
        for answer in answers:
            known = list(answer.token_ids[: answer.num_prompt + num_tokens])
            start = RowStart("", 0, known, answer.params, self._blocks)
            rows.start(replace(start, num_prompt_tokens=answer.num_prompt))
            if drafter is not None:
                drafter.forget(0)
            self._answer(rows, drafter, known, answer.num_prompt, most, worth)
        return worth

    def _answer(
        self,
        rows: Rows,
        drafter: Drafter | None,
        known: list[int],
        num_prompt: int,
        most: int,
        worth: Worth,
    ) -> None:
        self._step(rows, drafter, 0, num_prompt, known[num_prompt : num_prompt + 1], 0)
        at = num_prompt + 1
        while at < len(known):
            began = time.perf_counter()
            room = min(most, len(known) - at)
            guess: list[int] = []
            if drafter is not None and room:
                guess = drafter.propose([Ask(0, at, room)])[0].tokens
            accepted = 0
            while accepted < len(guess) and guess[accepted] == known[at + accepted]:
                worth.num_right[accepted] += 1
                accepted += 1
            for place in range(min(accepted + 1, len(guess))):
                worth.num_asked[place] += 1
            # What was guessed wrong is computed, too, and then written again.
            rows.token_ids[0, at : at + len(guess)] = guess
            sampled = known[at : at + accepted + 1]
            self._step(rows, drafter, at - 1, 1 + len(guess), sampled, len(guess))
            rows.token_ids[0, at : at + len(guess)] = known[at : at + len(guess)]
            worth.step_s.append(time.perf_counter() - began)
            worth.num_tokens += min(accepted + 1, len(known) - at)
            at += accepted + 1

    def _step(
        self,
        rows: Rows,
        drafter: Drafter | None,
        start: int,
        num_tokens: int,
        sampled: list[int],
        num_drafts: int,
    ) -> None:
        item = self._item(start, num_tokens, num_drafts)
        batch, _, _ = rows.gather([item])
        hidden_TD = self._hidden(batch)
        self._ops.fetch(self._model.logits(hidden_TD[-num_drafts - 1 :]))
        if drafter is not None:
            seen = hidden_TD if drafter.reads_hidden else None
            drafter.observe(Seen([item], [sampled], seen, [0]))

    def _item(self, start: int, num_tokens: int, num_drafts: int, sample: bool = True) -> PlanItem:
        return PlanItem("", 0, start, num_tokens, sample, [[] for _ in self._specs], num_drafts)
