"""Drafts of a model with another tokenizer: known tokens become text and its tokens, and its drafts the
other way round.

Two tokenizers cut a text at different places, so care is taken at both ends. What the draft model reads of a
text that goes on is cut anew from a few tokens back. Of what it wrote only target tokens are proposed whose
text is settled: behind them a word or a number has ended, and whatever follows would not be cut into them.
Noise is a function of token ids and cannot be shared across vocabularies: it drafts greedily, which then
is accepted most often.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from typing import Protocol

from elinvar.run.drafters.api import Ask, Drafter, Guess, Seen
from elinvar.run.rows import Rows

TAIL = 8
"""Last draft tokens that are cut anew when the text goes on."""
EXTRA = 2
"""Draft tokens more than target tokens asked for: the last word is seldom settled."""
_BEFORE = "", "\n", "a"
"""Texts before a piece: some tokenizers put a space before the first word of a text."""


class Spelling(Protocol):
    """What is needed of a tokenizer."""

    bos_id: int | None

    @property
    def special_ids(self) -> Set[int]: ...

    def encode(self, text: str, add_special: bool = True) -> list[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...


@dataclass(slots=True)
class _Text:
    """A row's known text."""

    num_seen: int = 0
    """Target tokens of it."""
    ids: list[int] = field(default_factory=list)
    """Its draft tokens."""
    rest: bytes = b""
    """First bytes of a character of which the others did not come yet."""
    is_lost: bool = False
    """It cannot be followed."""


class Retokenised:
    """longest: draft tokens of a sequence; make: the drafter over the rows that it is given, which hold
    draft tokens and ask for greedy sampling."""

    is_instant = False
    reads_hidden = False

    def __init__(
        self,
        rows: Rows,
        longest: int,
        target: Spelling,
        draft: Spelling,
        make: Callable[[Rows], Drafter],
    ) -> None:
        self._rows, self._target, self._draft = rows, target, draft
        self._own = Rows(rows.token_ids.shape[0], longest, ())
        self._drafter = make(self._own)
        self.name = self._drafter.name
        self._texts: dict[int, _Text] = {}

    def propose(self, asks: Sequence[Ask]) -> list[Guess]:
        own = {ask.row: draft_ask for ask in asks if (draft_ask := self._in_draft_tokens(ask))}
        found = dict(zip(own, self._drafter.propose(list(own.values())), strict=True))
        return [
            self._in_target_tokens(found[ask.row], ask.most) if ask.row in found else Guess()
            for ask in asks
        ]

    def observe(self, seen: Seen) -> None:
        pass

    def forget(self, row: int) -> None:
        self._texts.pop(row, None)
        self._drafter.forget(row)

    # ---- from target to draft ---------------------------------------------------------------

    def _in_draft_tokens(self, ask: Ask) -> Ask | None:
        text = self._texts.setdefault(ask.row, _Text())
        if text.is_lost:
            return None
        new = self._rows.token_ids[ask.row, text.num_seen : ask.num_tokens].tolist()
        spelled = b"".join([self._target.token_bytes(i) for i in new if i != self._target.bos_id])
        text.num_seen = ask.num_tokens
        whole, text.rest = _whole(text.rest + spelled)
        first = self._extend(text, whole)
        count, longest = len(text.ids), self._own.token_ids.shape[1]
        if first is None or count >= longest:
            text.is_lost = True
            return None
        self._own.token_ids[ask.row, first:count] = text.ids[first:]
        self._own.namespaces[ask.row] = self._rows.namespaces[ask.row]
        if text.rest or not count:
            return None
        return Ask(ask.row, count, min(ask.most + EXTRA, longest - count))

    def _extend(self, text: _Text, new: bytes) -> int | None:
        """The index of the first draft token that may have changed; None: it has no tokens."""
        if not text.ids:
            text.ids = self._draft.encode(new.decode("utf-8", "replace")) if new else []
            return 0
        first = len(text.ids)
        if not new:
            return first
        # Back to where a character begins.
        spelled = [self._draft.token_bytes(i) for i in text.ids[-TAIL:]]
        while spelled and 0x80 <= (spelled[0] or b"\x80")[0] < 0xC0:
            del spelled[0]
        for tail in (spelled, []):
            piece = spell(self._draft, b"".join(tail) + new)
            if piece is not None:
                first -= len(tail)
                text.ids[first:] = piece
                return first
        return None

    # ---- and back ---------------------------------------------------------------------------

    def _in_target_tokens(self, guess: Guess, most: int) -> Guess:
        drafts = guess.tokens
        # Behind a control token stands no text; the text before it is all there is.
        end = next((i for i, t in enumerate(drafts) if t in self._draft.special_ids), len(drafts))
        spelled = [self._draft.token_bytes(i) for i in drafts[:end]]
        text, _ = _whole(b"".join(spelled))
        tokens = spell(self._target, text) if text else None
        if tokens is None:
            return Guess()
        size = len(text) if end < len(drafts) else _num_settled(text)
        ends = list(accumulate(len(self._target.token_bytes(i)) for i in tokens))
        count = min(most, sum(stop <= size for stop in ends))
        begins = [0, *accumulate(map(len, spelled))]
        chances = [
            prod(
                chance
                for begin, chance in zip(begins, guess.chances, strict=False)
                if start <= begin < stop
            )
            for start, stop in zip([0, *ends], ends[:count], strict=False)
        ]
        return Guess(tokens[:count], chances)


def spell(tokenizer: Spelling, piece: bytes) -> list[int] | None:
    """Tokens of a piece amid a text, which stand for its bytes and no others; None where there are
    none such."""
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return None
    for before in _BEFORE:
        ids = tokenizer.encode(before + text, add_special=False)
        size, first = 0, len(ids)
        while size < len(piece) and first:
            first -= 1
            size += len(tokenizer.token_bytes(ids[first]))
        if b"".join([tokenizer.token_bytes(i) for i in ids[first:]]) == piece:
            return ids[first:]
    return None


def _whole(spelled: bytes) -> tuple[bytes, bytes]:
    """Its whole characters, and the first bytes of one that is not."""
    for count in range(1, min(4, len(spelled) + 1)):
        lead = spelled[-count]
        if lead >= 0xC0:
            missing = (lead >= 0xE0) + (lead >= 0xF0) + 2 - count
            return (spelled[:-count], spelled[-count:]) if missing > 0 else (spelled, b"")
        if lead < 0x80:
            break
    return spelled, b""


def _num_settled(spelled: bytes) -> int:
    """Its first bytes that no further text would be cut together with: all before its last word,
    number or other run, and the space before that."""
    text = spelled.decode("utf-8", "replace")
    at = len(text) - 1
    while at > 0 and _kind(text[at - 1]) == _kind(text[-1]):
        at -= 1
    if at > 0 and text[at - 1] == " ":
        at -= 1
    return len(text[:at].encode())


def _kind(character: str) -> str:
    if character.isspace():
        return "space"
    return "letter" if character.isalpha() else "digit" if character.isdigit() else "other"
