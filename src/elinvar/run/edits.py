"""Edits: what requests ask to be done to logits before a token is chosen, as data of SampleArgs.

All of it follows from a request's parameters and the tokens before the one that is sampled. So
nothing is counted from step to step, nothing has to be restored after a preemption, and a position
amid drafts is asked for like any other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from elinvar.base.batch import I32
from elinvar.base.plan import RowStart
from elinvar.ops.arguments import F32, Biases, Penalties, SampleArgs

_Ids = tuple[int, ...]
_NONE = np.zeros(0, np.int32), np.zeros(0, np.float32)


class RowEdits:
    """Of one request."""

    def __init__(self, started: RowStart) -> None:
        params = started.params
        self.typical_p = params.typical_p
        self.repetition = params.repetition_penalty
        self.presence, self.frequency = params.presence_penalty, params.frequency_penalty
        self.looks_back = self.repetition != 1.0 or bool(self.presence or self.frequency)
        """Whether it depends on what was there before."""
        self.num_prompt = started.num_prompt_tokens
        self._first_end = self.num_prompt + params.min_tokens
        """The index at which an end may be."""
        self._ends = sorted(started.stop_ids)
        forbidden: list[int] = []
        self._after: dict[int, list[_Ids]] = {}
        """Bad words of more than one token, by the last but one."""
        for word in params.bad_words:
            assert isinstance(word, tuple), "the engine spells what is given as text"
            if len(word) == 1:
                forbidden.append(word[0])
            else:
                self._after.setdefault(word[-2], []).append(word)
        ids, values = zip(*params.logit_bias, strict=True) if params.logit_bias else ((), ())
        self._always = _forbid(np.array(ids, np.int32), np.array(values, np.float32), forbidden)

    @property
    def reads_tokens(self) -> bool:
        """It must know the tokens before, not only how many they are."""
        return self.looks_back or bool(self._after)

    def biases(self, tokens: I32) -> tuple[I32, F32]:
        """Ids and values for the token that follows `tokens`, the whole sequence so far."""
        forbidden: list[int] = []
        if len(tokens) < self._first_end:
            forbidden += self._ends
        if self._after:
            for word in self._after.get(tokens.item(-1), ()):
                if tuple(tokens[1 - len(word) :].tolist()) == word[:-1]:
                    forbidden.append(word[-1])
        return _forbid(*self._always, forbidden) if forbidden else self._always


def edit(args: SampleArgs, edits: Sequence[RowEdits | None], tokens: Sequence[I32]) -> None:
    """Gives `args` what its rows ask for. edits: of each of them, None: nothing; tokens: what comes
    before the one that each samples."""
    if any(e is not None and e.typical_p < 1 for e in edits):
        args.typical_p = np.array([1.0 if e is None else e.typical_p for e in edits], np.float32)
    biases = [_NONE if e is None else e.biases(t) for e, t in zip(edits, tokens, strict=True)]
    ids, values = zip(*biases, strict=True)
    if any(len(some) for some in ids):
        args.biases = Biases(_starts(ids), np.concatenate(ids), np.concatenate(values))
    if any(e is not None and e.looks_back for e in edits):
        args.penalties = _penalties(edits, tokens)


def _penalties(edits: Sequence[RowEdits | None], tokens: Sequence[I32]) -> Penalties:
    pairs = list(zip(edits, tokens, strict=True))
    past = [t if e is not None and e.looks_back else t[:0] for e, t in pairs]

    def floats(name: str, default: float) -> F32:
        return np.array([getattr(e, name, default) for e in edits], np.float32)

    return Penalties(
        _starts(past),
        np.concatenate(past),
        np.array([0 if e is None else e.num_prompt for e in edits], np.int32),
        floats("repetition", 1.0),
        floats("presence", 0.0),
        floats("frequency", 0.0),
    )


def _forbid(ids: I32, values: F32, forbidden: Sequence[int]) -> tuple[I32, F32]:
    """These too."""
    more = np.array(forbidden, np.int32)
    least = np.full(len(more), -np.inf, np.float32)
    return np.concatenate([ids, more]), np.concatenate([values, least])


def _starts(parts: Sequence[I32]) -> I32:
    return np.cumsum([0, *map(len, parts)], dtype=np.int32)
