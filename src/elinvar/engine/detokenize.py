"""Tokens to text while they arrive. Owns the rule that no half character is ever shown.

A token is a sequence of bytes, and a text is the UTF-8 decoding of the joined bytes with U+FFFD for
what is malformed. So decoding in pieces is exact and costs the same for every token: only an
unfinished character (at most three bytes) is held back.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterable

from elinvar.engine.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """The text of one sequence, token by token.

    The concatenation of all pieces and of finish() equals tokenizer.decode of all the ids.
    """

    __slots__ = ("_decoder", "_hidden", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, shown: Collection[int] = ()) -> None:
        """shown: control tokens that have a text here, their name."""
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids.difference(shown)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` make certain; control tokens that are not shown have none."""
        return self._decoder.decode(self._tokenizer.text_bytes(ids, self._hidden))

    def finish(self) -> str:
        """What an unfinished character at the end becomes: U+FFFD, or nothing."""
        return self._decoder.decode(b"", final=True)
