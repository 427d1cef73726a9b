"""A model's dialect: how it writes thoughts and calls of tools, and how it wants to read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from elinvar.base.errors import InputError
from elinvar.base.grammar import Grammar
from elinvar.base.thinking import ThinkingBudget
from elinvar.engine.chat import Message
from elinvar.engine.dialects.grammar import answer_grammar, said_grammar
from elinvar.engine.dialects.prompt import Takes, prepared
from elinvar.engine.dialects.reader import AnswerReader
from elinvar.engine.dialects.schema import functions
from elinvar.engine.dialects.words import Channels, Family, markers
from elinvar.engine.pieces import Reader


@dataclass(frozen=True)
class Dialect:
    """Of one model. Made by `dialect_of`."""

    family: Family
    special: Mapping[str, int]
    """Control tokens by name: they have no text in an answer unless it is asked for."""
    tokens: Mapping[str, int]
    """All tokens that are found whole in a text."""
    takes: Takes
    """What its chat template takes."""

    @property
    def name(self) -> str:
        return self.family.name

    @property
    def opening(self) -> str | None:
        """What opens a thought; None: it has none."""
        words, thoughts = self.family.calls, self.family.thoughts
        if isinstance(words, Channels):
            return words.channel
        return None if thoughts is None else thoughts.open.strip()

    @cached_property
    def special_text(self) -> tuple[int, ...]:
        """Control tokens that its reader must see in the text (see SamplingParams.special_text)."""
        written = markers(self.family)
        return tuple(
            sorted(i for token, i in self.special.items() if any(token in m for m in written))
        )

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer, for SamplingParams.stop_token_ids."""
        return tuple(sorted(self.tokens[end] for end in self.family.ends if end in self.tokens))

    def thinking_budget(
        self, max_tokens: int, begins_in_thought: bool, encode: Callable[[str], Sequence[int]]
    ) -> ThinkingBudget:
        """For SamplingParams.thinking. encode: ids of a text that names control tokens. Raises
        InputError (`max_thinking_tokens`) where no single token ends a thought."""
        words, thoughts = self.family.calls, self.family.thoughts
        if isinstance(words, Channels):
            opens, close = f"{words.channel}{words.thoughts}{words.message}", words.ends[0]
        elif thoughts is not None:
            opens, close = thoughts.open.strip(), thoughts.close
        if (thoughts is None and not isinstance(words, Channels)) or close not in self.tokens:
            message = (
                "This model has no token that ends its thoughts; leave max_thinking_tokens out."
            )
            raise InputError("max_thinking_tokens", message)
        end, begin = (self.tokens[close],), tuple(encode(opens))
        return ThinkingBudget(max_tokens, end, begin, begins_in_thought)

    def begins_in_thought(self, prompt: str) -> bool:
        """Whether the prompt, as text, ends in an open thought."""
        words = self.family.calls
        if isinstance(words, Channels):
            return prompt.endswith(f"{words.channel}{words.thoughts}{words.message}")
        thoughts = self.family.thoughts
        return thoughts is not None and prompt.rstrip().endswith(thoughts.open.strip())

    def reader(
        self,
        tools: Sequence[Mapping[str, Any]],
        begins_in_thought: bool,
        ids: Callable[[], str],
    ) -> Reader:
        """Reads one answer. Without tools all calls are texts. ids: makes the id of a call that the
        model gives none. Raises InputError for tools without a name."""
        return AnswerReader(self.family, functions(tools), begins_in_thought, ids)

    def grammar(
        self,
        tools: Sequence[Mapping[str, Any]],
        choice: str,
        parallel: bool = True,
        thinking: bool = True,
        begins_in_thought: bool = False,
    ) -> Grammar | None:
        """What an answer keeps to. choice: `auto`, `required` or the name of a tool. parallel: there may
        be several calls. thinking: it may think first. None where there is nothing to keep to: `auto`
        without strict tools. Raises InputError for a choice that is no tool."""
        return answer_grammar(
            self.family,
            frozenset(self.special),
            functions(tools),
            choice,
            parallel=parallel,
            thinking=thinking,
            in_thought=begins_in_thought,
        )

    def saying(
        self, grammar: Grammar, thinking: bool = True, begins_in_thought: bool = False
    ) -> Grammar:
        """What an answer keeps to whose words, without its thoughts, keep to `grammar`."""
        special = frozenset(self.special)
        return said_grammar(
            self.family, special, grammar, thinking=thinking, in_thought=begins_in_thought
        )

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[list[dict[str, Any]], Sequence[Mapping[str, Any]] | None]:
        """Messages and tools as the model's chat template takes them, from OpenAI's: arguments as objects,
        ids of its kind, one call a message, texts where it knows no tools. Raises InputError naming
        what is not well-formed."""
        return prepared(self.family, self.takes, messages, tools)
