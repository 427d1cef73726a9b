"""Grammars of one model, compiled: by llguidance, over the tokens of its vocabulary.

Owns what is kept compiled, and that no grammar takes the machine: sizes are bounded before, states and
steps by the library's own limits, and one is compiled at a time (docs/design/030-grammars.md).
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from elinvar.base.errors import EngineError
from elinvar.base.grammar import Grammar
from elinvar.engine.lark import refused, translated

if TYPE_CHECKING:
    from elinvar.engine.tokenizer import Tokenizer

MAX_KEPT = 64
"""Compiled grammars that wait for somebody to ask again; those in use are kept besides."""
MAX_CUT = 256
"""Texts of a grammar that must follow somewhere, kept as tokens."""
MAX_FORCED = 256
"""Bytes of such a text that are looked at."""
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 400_000,
    "max_grammar_size": 50_000,
    "max_items_in_row": 8_000,
    "max_lexer_states": 20_000,
    "verbose_errors": False,
}
"""Of the library, whose own are for a machine of one's own. A lexer of so many states has 40 MB."""


class Compiled:
    """A grammar that answers may follow. They share what its lexer has found out so far."""

    def __init__(self, source: str, library: _Library) -> None:
        self._source, self._library = source, library
        self._start = library.compile(source)
        self._cut: dict[bytes, list[int]] = {}

    def begin(self) -> Any:
        return self._start.deep_copy()

    def renew(self) -> Any:
        """As `begin`, from what nobody has used: the shared lexer may be full, or broken."""
        self._start = self._library.compile(self._source)
        return self.begin()

    def cut(self, text: bytes) -> list[int]:
        """Into tokens, as texts of their own are."""
        tokens = self._cut.get(text)
        if tokens is None:
            if len(self._cut) == MAX_CUT:
                self._cut.clear()
            tokens = self._cut[text] = self._library.cut(text)
        return tokens


class GrammarMatcher:
    """Where one answer stands; a run.grammar.Matcher."""

    def __init__(self, compiled: Compiled, at: GrammarMatcher | None = None) -> None:
        """at: where it begins, instead of the grammar's start."""
        self._compiled = compiled
        self._tokens: list[int] = at._tokens.copy() if at is not None else []
        self._num_past: int = at._num_past if at is not None else 0
        """Of these, at their end: which the library does not count, as it had nothing more to expect."""
        self._matcher: Any = at._matcher.deep_copy() if at is not None else compiled.begin()

    def copy(self) -> GrammarMatcher:
        return GrammarMatcher(self._compiled, self)

    def accept(self, tokens: Sequence[int]) -> None:
        self._tokens += tokens
        for token in tokens:
            if self._matcher.is_stopped():
                self._num_past += 1
            else:
                self._matcher.consume_token(token)

    def rewind(self, count: int) -> None:
        del self._tokens[-count:]
        past = min(count, self._num_past)
        self._num_past -= past
        # Lark rules that count tokens of theirs cannot be taken back: they begin again.
        if not self._matcher.rollback(count - past):
            self._begin_again(self._compiled.begin())

    def _begin_again(self, matcher: Any) -> None:
        tokens, self._tokens = self._tokens, []
        self._matcher, self._num_past = matcher, 0
        self.accept(tokens)

    def num_valid(self, tokens: Sequence[int]) -> int:
        return int(self._matcher.validate_tokens(list(tokens)))

    def take(self, tokens: Sequence[int]) -> int:
        if self._matcher.is_stopped():
            count = self.num_valid(tokens)
            self.accept(tokens[:count])
            return count
        count = int(self._matcher.try_consume_tokens(list(tokens)))
        self._tokens += tokens[:count]
        return count

    def forced(self) -> list[int]:
        text = self._matcher.compute_ff_bytes()
        tokens = self._compiled.cut(text)[:-1] if text else []  # the last one may go on
        return tokens[: self.num_valid(tokens)]

    def mask(self, into: NDArray[np.uint32]) -> None:
        self._fill(into)
        if self._matcher.is_error():
            self._begin_again(self._compiled.renew())
            self._fill(into)
            if self._matcher.is_error():
                reason = _reason(self._matcher.get_error())
                raise EngineError(f"The answer's grammar takes too much here: {reason}.")

    def _fill(self, into: NDArray[np.uint32]) -> None:
        self._matcher.unsafe_compute_mask_ptr(into.ctypes.data, into.nbytes)


class Grammars:
    """vocab_size: of the model's logits. Any thread may ask."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._library: _Library | None = None
        self._kept: OrderedDict[Grammar, Compiled] = OrderedDict()
        self._used: WeakValueDictionary[Grammar, Compiled] = WeakValueDictionary()
        self._lock, self._compiling = threading.Lock(), threading.Lock()
        self.worker = ThreadPoolExecutor(1, "elinvar-grammar")
        """For those who cannot wait while one is compiled."""

    def find(self, grammar: Grammar) -> Compiled | None:
        """The grammar, where it is compiled."""
        with self._lock:
            compiled = self._used.get(grammar)
            if compiled is not None:
                self._keep(grammar, compiled)
            return compiled

    def compile(self, grammar: Grammar) -> Compiled:
        """The grammar, compiled if need be, which may take some 0.1 s. Raises InputError (`grammar`) for
        one that is wrong, too large, or not supported."""
        if (compiled := self.find(grammar)) is not None:
            return compiled
        with self._compiling:
            if (compiled := self.find(grammar)) is not None:
                return compiled
            if self._library is None:
                self._library = _Library(self._tokenizer, self._vocab_size)
            library = self._library
            source = translated(grammar, library.control, library.is_token)
            compiled = Compiled(source, library)
            with self._lock:
                self._used[grammar] = compiled
                self._keep(grammar, compiled)
        return compiled

    def _keep(self, grammar: Grammar, compiled: Compiled) -> None:
        self._kept[grammar] = compiled
        self._kept.move_to_end(grammar)
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)

    def matcher(self, grammar: Grammar) -> GrammarMatcher:
        return GrammarMatcher(self.compile(grammar))

    def close(self) -> None:
        self.worker.shutdown(wait=False, cancel_futures=True)


class _Library:
    """llguidance with a vocabulary: a token is its bytes, control tokens are none of a text's.

    Making it holds the interpreter's lock: 0.1 s of 49k tokens, 0.6 s and 80 MB of 262k."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        import llguidance

        ends = sorted(i for i in tokenizer.eos_ids if i < vocab_size)
        if not ends:
            raise refused("The model has no end token, so an answer could not end its grammar.")
        special = sorted(i for i in tokenizer.special_ids if i < vocab_size)
        vocabulary: Any = _Vocabulary(tokenizer, vocab_size, special, ends[0])
        self.control = {vocabulary.tokens[i].decode(): i for i in special}
        self._tokenizer = tokenizer
        self._words = -(-vocab_size // 32)
        self._make = llguidance.LLMatcher
        self._limits = llguidance.LLParserLimits(**LIMITS)
        self._tokens = llguidance.LLTokenizer(vocabulary, eos_token=ends)
        vocabulary.tokens = []  # it has copied them

    def is_token(self, text: str) -> bool:
        return len(self._tokenizer.encode(text, add_special=False)) == 1

    def cut(self, text: bytes) -> list[int]:
        whole = text[:MAX_FORCED].decode("utf-8", "ignore")
        return self._tokenizer.encode(whole, add_special=False)

    def compile(self, source: str) -> Any:
        matcher = self._make(self._tokens, source, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise refused(f"The grammar is not supported: {_reason(matcher.get_error())}.")
        # The first mask is everybody's, and tells whether any text fits.
        first = matcher.deep_copy()
        mask = np.zeros(self._words, np.uint32)
        first.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if first.is_error():
            raise refused("The grammar has no text, or takes too much to begin with.")
        return matcher


class _Vocabulary:
    """As the library wants it. It asks for the tokens of texts only where it may force them."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, size: int, special: Sequence[int], end: int) -> None:
        self.tokens = tokenizer.spellings(size)
        self.special_token_ids, self.eos_token_id = special, end
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special=False)


_WHERE = re.compile(
    r"^(at )?\d+\(\d+\): |failed to compile JSON schema: |invalid regex .* \(in regex\): "
)


def _reason(error: str) -> str:
    """What the library says, without where in our source that is."""
    lines = [line for line in error.splitlines() if not re.match(r"\s+(\d+ \||\^)", line)]
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    first = _WHERE.sub("", "".join(lines[:1]))
    if unknown := re.fullmatch(r"Unimplemented keys: \[(.*)\]", first):
        return f"the keywords {unknown[1]}"
    return (" ".join([first, *said]) or "no text fits")[:300].rstrip(". ")
