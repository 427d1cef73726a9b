"""Sampling parameters: validated once, here, at the door."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from elinvar.base.config import BLOCK_SIZE
from elinvar.base.errors import InputError
from elinvar.base.grammar import Grammar
from elinvar.base.thinking import ThinkingBudget

MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
"""Characters of a stop text."""
MAX_STOP_TOKENS = 1024
MAX_BIASES = 1024
MAX_BAD_WORDS = 256
MAX_BAD_LENGTH = 256
"""Characters of a bad word."""
MAX_SPELLINGS = 1024
"""Bad words as token ids, and tokens of one: a text has three spellings, a character up to four tokens."""
SINKS = 4
"""Tokens that suffice (Xiao et al., 2024)."""
WATCHED = 32
"""Last tokens of a prompt whose attention says what an attention_budget keeps of it."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What decides a request's tokens, together with its prompt.

    Nothing is taken from the model's generation_config: what is not said has the default below.
    Raises InputError naming the field when a value is out of range.
    """

    max_tokens: int = 256
    """Most tokens to generate."""
    temperature: float = 1.0
    """0 is greedy; otherwise logits are divided by it."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches p."""
    min_p: float = 0.0
    """Keep tokens at least min_p times as likely as the likeliest."""
    typical_p: float = 1.0
    """Keep the tokens whose surprise is nearest to what is to be expected, until their probability
    reaches p (Meister et al., 2023)."""
    repetition_penalty: float = 1.0
    """Of tokens of the prompt and the answer: a positive logit is divided by it, another multiplied
    (Keskar et al., 2019); above 1 makes them less likely."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that the answer has."""
    frequency_penalty: float = 0.0
    """Taken from the logits of tokens of the answer, once for each time they are in it."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """What is added to the logits of tokens, -100 to 100; a mapping of ids is taken, too."""
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    """Texts, or token ids, that the answer must not go on to: the last token of one is forbidden
    where those before it, of prompt and answer, are its others. Of a text that is each way in which
    it is written alone, after a space, and after another text."""
    min_tokens: int = 0
    """Tokens before which none that ends the answer is sampled, and no stop text ends it."""
    seed: int | None = None
    """64-bit seed of the sampling noise; None: drawn at random (the result tells which)."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    include_stop_str_in_output: bool = False
    """Or they are, and so is the text of one of stop_token_ids."""
    skip_special_tokens: bool = True
    """Control tokens have no text; else they have their names."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer, besides the model's own end tokens."""
    ignore_eos: bool = False
    """Go on after the model's end token (for benchmarks)."""
    special_text: tuple[int, ...] = ()
    """Control tokens that have a text in the answer, their name: those by which it is understood."""
    thinking: ThinkingBudget | None = None
    """How many tokens of thoughts there may be; None: any number."""
    logprobs: int | None = None
    """None: none; k: the sampled token's log-prob and those of the k likeliest tokens, as the model has
    them: before temperature and all that changes logits."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens but the first. The prompt is computed, whatever is cached of it."""
    grammar: Grammar | None = None
    """What the answer keeps to: tokens that leave it are not sampled, and where it is complete and
    nothing may follow, only tokens that end the answer are. None: any text. Where other parameters
    forbid all that it allows, it has the last word."""
    adapter: str | None = None
    """Name of the loaded LoRA adapter that answers; None: the model as it is."""
    attention_window: int | None = None
    """LOSSY: layers of full attention see the last so many tokens and the first `attention_sinks`
    alone (StreamingLLM: Xiao et al., 2024), in whole blocks of 32: at least so many, at most 31 more.
    Memory stays bounded however long the sequence grows. None: they see everything."""
    attention_sinks: int = SINKS
    """First tokens that are always seen where there is an attention_window; rounded up to 32s."""
    attention_budget: int | None = None
    """LOSSY: in layers of full attention the answer sees so many tokens of the prompt alone, in whole
    blocks of 32, and all of itself. Decided once, when the prompt has been read: kept are the first
    block, those of the last 32 tokens, and those that these attend to most (after SnapKV: Li et al.,
    2024), the same in all layers. The others' memory is given back. None: it sees everything."""

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", _tuple("stop", stop))
        object.__setattr__(self, "stop_token_ids", _tuple("stop_token_ids", self.stop_token_ids))
        _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _number("temperature", self.temperature, 0.0, 100.0)
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise InputError("top_p", "top_p must be above 0 and at most 1, got 0.")
        _number("min_p", self.min_p, 0.0, 1.0)
        self._check_edits()
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**64 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        if len(self.stop) > MAX_STOPS:
            raise InputError("stop", f"stop takes at most {MAX_STOPS} texts, got {len(self.stop)}.")
        if any(not isinstance(s, str) or not s for s in self.stop):
            raise InputError("stop", "stop must hold non-empty texts.")
        for text in self.stop:
            _at_most("stop", text, MAX_STOP_LENGTH, "characters a text")
        _at_most("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKENS, "tokens")
        object.__setattr__(self, "special_text", _tuple("special_text", self.special_text))
        for name in ("stop_token_ids", "special_text"):
            for t in getattr(self, name):
                _integer(name, t, 0, 2**31 - 1)
        self._check_grammar()
        if self.adapter is not None and not isinstance(self.adapter, str):
            raise InputError("adapter", f"adapter must be a name, got {self.adapter!r}.")
        _integer("attention_sinks", self.attention_sinks, 1, 2**31 - 1)
        if self.attention_window is not None:
            _integer("attention_window", self.attention_window, 1, 2**31 - 1)
        elif self.attention_sinks != SINKS:
            raise InputError("attention_sinks", "attention_sinks needs an attention_window, too.")
        if self.attention_budget is not None:
            _integer("attention_budget", self.attention_budget, 1, 2**31 - 1)
            if self.attention_window is not None:
                raise InputError(
                    "attention_budget",
                    "attention_budget and attention_window exclude each other: leave one out.",
                )
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                got = getattr(self, name)
                raise InputError(name, f"{name} must be true or false, got {got!r}.")

    def _check_grammar(self) -> None:
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            message = f"grammar must be one of elinvar.base.grammar, got {self.grammar!r}."
            raise InputError("grammar", message)
        try:
            hash(self.grammar)  # it is looked up by it
        except (TypeError, RecursionError):
            message = (
                "The parts of a grammar are tuples of others, not too deep; a schema is JSON text."
            )
            raise InputError("grammar", message) from None

    def _check_edits(self) -> None:
        """Of what changes logits before a token is chosen."""
        _number("typical_p", self.typical_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0)
        for name in ("typical_p", "repetition_penalty"):
            if getattr(self, name) == 0.0:
                raise InputError(name, f"{name} must be above 0, got 0.")
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        biases = self.logit_bias
        biases = tuple(biases.items()) if isinstance(biases, Mapping) else biases
        object.__setattr__(self, "logit_bias", _tuple("logit_bias", biases))
        _at_most("logit_bias", self.logit_bias, MAX_BIASES, "tokens")
        for bias in self.logit_bias:
            if not isinstance(bias, tuple) or len(bias) != 2:
                raise InputError("logit_bias", f"logit_bias must map ids to biases, got {bias!r}.")
            _integer("logit_bias", bias[0], 0, 2**31 - 1)
            _number("logit_bias", bias[1], -100.0, 100.0)
        if len({token for token, _ in self.logit_bias}) < len(self.logit_bias):
            raise InputError("logit_bias", "logit_bias has a token twice.")
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.min_tokens > self.max_tokens:
            message = f"min_tokens ({self.min_tokens}) exceeds max_tokens ({self.max_tokens})."
            raise InputError("min_tokens", message)
        bad = (self.bad_words,) if isinstance(self.bad_words, str) else self.bad_words
        listed = _tuple("bad_words", bad)
        words = tuple(w if isinstance(w, str) else _tuple("bad_words", w) for w in listed)
        object.__setattr__(self, "bad_words", words)
        _at_most("bad_words", [w for w in words if isinstance(w, str)], MAX_BAD_WORDS, "texts")
        _at_most("bad_words", words, MAX_SPELLINGS, "words")
        for word in words:
            if not word:
                raise InputError("bad_words", "bad_words must hold no empty text.")
            if isinstance(word, str):
                _at_most("bad_words", word, MAX_BAD_LENGTH, "characters a word")
                continue
            _at_most("bad_words", word, MAX_SPELLINGS + 8, "tokens a word")
            for token in word:
                _integer("bad_words", token, 0, 2**31 - 1)

    @property
    def edits_logits(self) -> bool:
        """Whether anything changes logits, or filters by typical_p."""
        return bool(
            self.logit_bias
            or self.bad_words
            or self.min_tokens
            or self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1.0
            or self.typical_p != 1.0
        )

    @property
    def kept_blocks(self) -> tuple[int, int] | None:
        """Blocks that are seen of a long sequence: the first ones, and the last ones before that of
        the token that looks, which it sees, too. None: all."""
        if self.attention_window is None:
            return None
        return -(-self.attention_sinks // BLOCK_SIZE), -(-self.attention_window // BLOCK_SIZE)

    def kept_of_prompt(self, num_tokens: int) -> int | None:
        """Blocks of a prompt of so many tokens that its answer sees. None: all."""
        if self.attention_budget is None:
            return None
        num_blocks = -(-num_tokens // BLOCK_SIZE)
        always = 1 + num_blocks - max(0, num_tokens - WATCHED) // BLOCK_SIZE
        kept = max(always, -(-self.attention_budget // BLOCK_SIZE))
        return kept if kept < num_blocks else None


def _tuple(name: str, value: object) -> tuple[object, ...]:
    if not isinstance(value, Sequence | Set):
        raise InputError(name, f"{name} must be a list, got {value!r}.")
    return tuple(value)


def _at_most(name: str, values: Sequence[object], most: int, what: str) -> None:
    if len(values) > most:
        raise InputError(name, f"{name} takes at most {most} {what}, got {len(values)}.")


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(
            name, f"{name} must be an integer between {low} and {high}, got {value!r}."
        )


def _number(name: str, value: object, low: float, high: float) -> None:
    # A NaN compares as false, and an integer too large for a float compares well.
    ok = isinstance(value, int | float) and not isinstance(value, bool)
    if not ok or not low <= value <= high:  # type: ignore[operator]
        raise InputError(
            name, f"{name} must be a number between {low:g} and {high:g}, got {value!r}."
        )
