"""From sampled tokens to an answer's text: detokenise, leave out the end token, stop at stop texts."""

from __future__ import annotations

from collections.abc import Sequence

from elinvar.base.sampling import SamplingParams
from elinvar.engine.detokenize import IncrementalDetokenizer
from elinvar.engine.stops import StopMatcher
from elinvar.engine.tokenizer import Tokenizer


class AnswerText:
    """The text of one answer as it grows. What it holds back comes with `finish`."""

    __slots__ = ("_detokenizer", "_params", "_stops", "_too_early")

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._params = params
        skips = params.skip_special_tokens
        shown = params.special_text if skips else tokenizer.special_ids
        self._detokenizer = IncrementalDetokenizer(tokenizer, shown)
        keep = params.include_stop_str_in_output
        self._stops = StopMatcher(params.stop, keep) if params.stop else None
        self._too_early = params.min_tokens if params.stop else 0
        """Tokens yet to come in whose text no stop text counts."""

    def shows(self, end: int) -> bool:
        """Whether the token that ended the answer has a text in it."""
        params = self._params
        return params.include_stop_str_in_output and end in params.stop_token_ids

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
            if self._too_early:
                self._too_early -= 1
                texts.append(self._detokenizer.push([token]))
                continue
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
