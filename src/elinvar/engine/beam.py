"""Beam search: the likeliest answers that a bounded search finds, without any noise.

It stands on top of the engine and knows nothing of it: each step asks for the log-probs that follow
each beam, as requests of one token, which find all but the last token of their beam in the prefix
cache. Ends count as in transformers: of the likeliest continuations of w beams those that end are
answers where they are among the first w, and the first w that do not end go on.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from elinvar.base.errors import InputError
from elinvar.base.plan import TokenLogprobs
from elinvar.base.sampling import MAX_LOGPROBS, SamplingParams

MAX_WIDTH = MAX_LOGPROBS // 2
MAX_PENALTY = 10.0
"""With it the longest answer's score is a float yet."""


@dataclass(frozen=True, slots=True)
class BeamParams:
    """Raises InputError naming the field when a value is out of range."""

    width: int
    """Beams that go on side by side, and most answers there are; 1 to 10."""
    max_tokens: int = 256
    length_penalty: float = 1.0
    """Answers are compared by the sum of their log-probs over (number of tokens) ** length_penalty."""
    logprobs: int | None = None
    """As in SamplingParams."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end an answer, besides the model's own."""
    ignore_eos: bool = False
    adapter: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.width, bool) or not 1 <= self.width <= MAX_WIDTH:
            message = f"width must be from 1 to {MAX_WIDTH} beams, got {self.width!r}."
            raise InputError("width", message)
        if not -MAX_PENALTY <= self.length_penalty <= MAX_PENALTY:
            most, got = MAX_PENALTY, self.length_penalty
            message = f"length_penalty must be from {-most:g} to {most:g}, got {got!r}."
            raise InputError("length_penalty", message)
        # What is said as in SamplingParams is checked as there.
        SamplingParams(
            max_tokens=self.max_tokens, logprobs=self.logprobs, stop_token_ids=self.stop_token_ids
        )

    @property
    def step(self) -> SamplingParams:
        """What is asked of each beam: as many continuations as there are, since some end."""
        return SamplingParams(
            max_tokens=1, temperature=0, seed=0, logprobs=MAX_LOGPROBS, adapter=self.adapter
        )

    def ends(self, eos_ids: frozenset[int]) -> frozenset[int]:
        """All tokens that end an answer."""
        own = frozenset(self.stop_token_ids)
        return own if self.ignore_eos else own | eos_ids


@dataclass(frozen=True, slots=True)
class Beam:
    """The beginning of an answer, or a whole one."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    total: float = 0.0
    """The sum of its tokens' log-probs, in their order."""


def _one_beam() -> list[Beam]:
    return [Beam()]


@dataclass(slots=True)
class BeamSearch:
    """The search for answers to one prompt. While it is not `done`, ask for what follows each of
    `live` and `push` it."""

    params: BeamParams
    end_ids: Collection[int]
    """Tokens that end an answer."""
    live: list[Beam] = field(default_factory=_one_beam)
    """Likeliest first."""
    _found: list[tuple[float, Beam]] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return not self.live

    def push(self, following: Sequence[TokenLogprobs]) -> None:
        """following: of each of `live`, the log-probs of its likeliest next tokens."""
        width, last = self.params.width, len(self.live[0].token_ids) + 1 == self.params.max_tokens
        candidates = [
            (-(beam.total + logprob), i, token, logprob)
            for i, (beam, told) in enumerate(zip(self.live, following, strict=True))
            for token, logprob in told.top
        ]
        live: list[Beam] = []
        for rank, (loss, i, token, logprob) in enumerate(sorted(candidates)):
            beam, top = self.live[i], following[i].top[: self.params.logprobs or 0]
            told = (*beam.logprobs, TokenLogprobs(logprob, top))
            grown = Beam((*beam.token_ids, token), told, -loss)
            if last or token in self.end_ids:
                if rank < width:
                    self._found.append((self._score(-loss, len(told)), grown))
            elif len(live) < width:
                live.append(grown)
        self._found.sort(key=lambda found: -found[0])
        del self._found[width:]
        self.live = live if self._may_improve(live) else []

    def best(self, count: int) -> list[Beam]:
        """The best answers, best first."""
        return [beam for _, beam in self._found[:count]]

    def _score(self, total: float, num_tokens: int) -> float:
        return total / num_tokens**self.params.length_penalty

    def _may_improve(self, live: Sequence[Beam]) -> bool:
        """Whether what is live can still become better than what was found. Sums only fall, so their
        best score is that of now at the length that flatters most."""
        if not live or len(self._found) < self.params.width:
            return bool(live)
        longer = self.params.length_penalty > 0
        length = self.params.max_tokens if longer else len(live[0].token_ids) + 1
        return self._score(live[0].total, length) > self._found[-1][0]
