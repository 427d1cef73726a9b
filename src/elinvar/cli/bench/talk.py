"""What each request of a load says: token ids, or messages, turn by turn. All of it follows from the
seed, and in later turns from the answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from elinvar.cli.bench.workload import Arrival, Content, prompts

if TYPE_CHECKING:
    from numpy.typing import NDArray

Message = dict[str, Any]
NEW_TOKENS = 16
"""Of a later turn, where the first one's length is not known."""


def conversations(
    arrivals: Sequence[Arrival], seed: int, vocab_size: int, chat: bool
) -> list[Conversation]:
    """Of each request. chat: its prompt is messages, whatever it was given as."""
    first = prompts(arrivals, seed, vocab_size)
    return [
        Conversation(one, ids, (seed, i), vocab_size, chat)
        for i, (one, ids) in enumerate(zip(arrivals, first, strict=True))
    ]


class Conversation:
    def __init__(
        self,
        arrival: Arrival,
        first: NDArray[Any],
        key: tuple[int, int],
        vocab_size: int,
        chat: bool,
    ) -> None:
        """first: the tokens of its first turn. key: the seed and the request's number."""
        self._arrival, self._key, self._vocab_size = arrival, key, vocab_size
        prefix = arrival.shared[1] if arrival.shared else 0
        self._num_new = arrival.prompt_tokens - prefix or NEW_TOKENS
        given = arrival.content
        self._messages: list[Message] | None = None
        if is_messages(given):
            self._messages = list(given)  # type: ignore[arg-type]
        elif chat:
            text = given if isinstance(given, str) else in_words(first.tolist())
            self._messages = [{"role": "user", "content": text}]
        self._ids: list[int] = list(given) if isinstance(given, list) else first.tolist()  # type: ignore[arg-type]

    def ask(self, turn: int, answer: str | None) -> Content:
        """What is asked at this turn, from the answer before it. An answer of token ids is not known
        to its client: as many made-up ones take its place."""
        if self._messages is not None:
            if turn:
                new = in_words(self._new(turn, self._num_new))
                self._messages.append({"role": "assistant", "content": answer})
                self._messages.append({"role": "user", "content": new})
            return list(self._messages)
        if not turn:
            text = self._arrival.content
            return text if isinstance(text, str) else list(self._ids)
        self._ids += self._new(-turn, self._arrival.output_tokens)
        self._ids += self._new(turn, self._num_new)
        return list(self._ids)

    def _new(self, turn: int, count: int) -> list[int]:
        """Tokens that are nobody else's. turn: below 0, those of an answer."""
        seed, number = self._key
        alone = replace(self._arrival, prompt_tokens=count, prefix=(), shared=None)
        made = prompts([alone], seed, self._vocab_size, (4, number, turn % 2**32))
        ids: list[int] = made[0].tolist()
        return ids


def is_messages(content: Content | None) -> bool:
    return isinstance(content, list) and bool(content) and isinstance(content[0], dict)


def in_words(ids: Iterable[int]) -> str:
    """A text of about as many tokens: short words that most vocabularies have."""
    return " ".join(_WORDS[one % len(_WORDS)] for one in ids)


_TEXT = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or "
    "had an they which one you were all her she there would their we him been has when who will no "
    "more if out so up said what its about than into them can only other time new some could these "
    "two may first then do any like my now over such our man me even most made after also did many"
)
_WORDS = _TEXT.split()


def warm_up(seed: int, vocab_size: int, chat: bool) -> Content:
    """Other tokens than any prompt's: what is cached of them must not help."""
    ids: list[int] = prompts([Arrival(0.0, 16, 2)], seed + 1, vocab_size)[0].tolist()
    return [{"role": "user", "content": in_words(ids)}] if chat else ids
