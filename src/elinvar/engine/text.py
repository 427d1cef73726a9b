"""From sampled tokens to an answer's text: detokenise, leave out the end token, stop at stop texts."""

from __future__ import annotations

from collections.abc import Sequence

from elinvar.engine.detokenize import IncrementalDetokenizer
from elinvar.engine.stops import StopMatcher
from elinvar.engine.tokenizer import Tokenizer


class AnswerText:
    """The text of one answer as it grows. What it holds back comes with `finish`."""

    __slots__ = ("_detokenizer", "_stops")

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._stops = StopMatcher(stops) if stops else None

    def push(self, ids: Sequence[int]) -> tuple[str, int, str | None]:
        """(new text, how many of `ids` belong to the answer, the stop text that ended it).

        The token that completes a stop text is the last one of the answer, though some or all of
        its text is not part of it.
        """
        if self._stops is None:
            return self._detokenizer.push(ids), len(ids), None
        texts = []
        # One by one: where the answer ends must not depend on how many tokens a step brought.
        for count, token in enumerate(ids, 1):
            text, stopped = self._stops.push(self._detokenizer.push([token]))
            texts.append(text)
            if stopped is not None:
                return "".join(texts), count, stopped
        return "".join(texts), len(ids), None

    def finish(self) -> tuple[str, str | None]:
        """(the rest, the stop text that was in it)."""
        rest = self._detokenizer.finish()
        if self._stops is None:
            return rest, None
        text, stopped = self._stops.push(rest)
        return (text, stopped) if stopped else (text + self._stops.finish(), None)
