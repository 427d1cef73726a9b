"""Which family a model writes like: told by its chat template, else by its vocabulary."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from elinvar.base.errors import InputError
from elinvar.engine.dialects.dialect import Dialect
from elinvar.engine.dialects.families import FAMILIES
from elinvar.engine.dialects.prompt import Takes
from elinvar.engine.dialects.words import Family, Thoughts

if TYPE_CHECKING:
    from elinvar.engine.tokenizer import Tokenizer

_TELLING: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("harmony", ("<|channel|>", "<|message|>")),
    ("deepseek-v3.2", ("｜DSML｜",)),
    ("deepseek-v3", ("<｜tool▁call▁begin｜>", "```json")),
    ("deepseek-v3.1", ("<｜tool▁call▁begin｜>",)),
    ("kimi", ("<|tool_call_begin|>",)),
    ("gemma4", ("<|tool_call>",)),
    ("function-gemma", ("<start_function_call>",)),
    ("minimax", ("<minimax:tool_call>",)),
    ("seed", ("<seed:tool_call>",)),
    ("solar", ("<|tool_call:begin|>",)),
    ("command", ("<|START_ACTION|>",)),
    ("apertus", ("<|tools_prefix|>",)),
    ("nemotron", ("<TOOLCALL>",)),
    ("apriel", ("<tool_calls>",)),
    ("lfm2", ("<|tool_call_start|>",)),
    ("lfm2", ("<|tool_response_start|>",)),
    ("glm-4.5", ("<arg_key>",)),
    ("qwen-xml", ("<function=", "<parameter=")),
    ("mistral-args", ("[TOOL_CALLS]", "[ARGS]")),
    ("mistral", ("[TOOL_CALLS]",)),
    ("hermes", ("<tool_call>",)),
    ("phi", ("<|tool_call|>", "<|/tool_call|>")),
    ("granite", ("<|tool_call|>",)),
    ("pythonic", ("func_name1(",)),
    ("llama", ('"parameters": ', '{"name": ')),
    ("glm-4", ("<|observation|>",)),
)
"""Families, and what in a template tells them: all of it; the first that is told counts."""

_MARKERS = {
    "[TOOL_CALLS]": "mistral",
    "<|tool_call_start|>": "lfm2",
    "<start_function_call>": "function-gemma",
    "<tool_call>": "hermes",
    "<|python_tag|>": "llama",
}
"""The same of tokens, where a template writes no calls."""

_ARCHITECTURES = {
    "gpt-oss": "harmony",
    "gpt_oss": "harmony",
    "gemma3": "pythonic",
    "gemma3_text": "pythonic",
    "llama4": "llama",
}

_OTHER_THOUGHTS = (
    Thoughts("Here is my thought process:", "Here is my response:"),
    Thoughts("[THINK]", "[/THINK]"),
    Thoughts("<think>", "</think>"),
)


def dialect_for(tokenizer: Tokenizer, architecture: str = "", name: str | None = None) -> Dialect:
    """The dialect of the model whose tokenizer this is; the rest as below."""
    template = tokenizer.chat_template
    source = "" if template is None else template.tool_source
    return dialect_of(source, tokenizer.whole_tokens, tokenizer.special_ids, architecture, name)


def dialect_of(
    template: str,
    tokens: Mapping[str, int],
    special_ids: Container[int],
    architecture: str = "",
    name: str | None = None,
) -> Dialect:
    """How a model writes thoughts and calls.

    template: its chat template's source, empty for none. tokens: ids of the tokens that are found
    whole in a text, of which special_ids have no text of their own in an answer. architecture: as
    its configuration names it. name: of a family, for who knows better; InputError where there is
    none of it.
    """
    if name is not None and name not in FAMILIES:
        raise InputError("dialect", f"dialect must be one of {', '.join(FAMILIES)}, got {name!r}.")
    family = FAMILIES[name or _told(template, tokens, architecture)]
    return Dialect(
        _with_thoughts(family, template),
        {token: i for token, i in tokens.items() if i in special_ids},
        tokens,
        Takes.of(template),
    )


def _told(template: str, tokens: Mapping[str, int], architecture: str) -> str:
    for name, telling in _TELLING:
        if all(text in template for text in telling):
            return name
    known = _ARCHITECTURES.get(architecture)
    if known is None:
        known = next((name for marker, name in _MARKERS.items() if marker in tokens), None)
    return known or "json"


def _with_thoughts(family: Family, template: str) -> Family:
    """A template may say that its model thinks otherwise than its family does."""
    thoughts = family.thoughts
    if thoughts is None or thoughts.open in template:
        return family
    told = (other for other in _OTHER_THOUGHTS if other.open in template)
    return replace(family, thoughts=next(told, thoughts))
