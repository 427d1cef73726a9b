"""Prompts files: JSONL lines in, one result line out per prompt, in the order of the input."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from elinvar.base.errors import InputError
from elinvar.base.plan import TokenLogprobs
from elinvar.base.sampling import SamplingParams
from elinvar.cli.terminal import read_text

if TYPE_CHECKING:
    from elinvar.engine.core import Engine
    from elinvar.engine.output import Completion
    from elinvar.engine.tokenizer import Tokenizer

KINDS = "prompt", "messages", "prompt_ids"
PARAMS = {f.name for f in fields(SamplingParams)} - {"grammar"}


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of a prompts file, or the --prompt of a command line."""

    where: str
    """What an error message calls it: "line 3 of prompts.jsonl"."""
    prompt: str | list[dict[str, Any]] | list[int]
    """A text to be continued, the messages of a chat, or token ids."""
    params: SamplingParams
    id: Any = None
    """Whatever JSON value the user gave; repeated in the result."""
    tenant: str = ""


def read_prompts(
    path: Path, defaults: SamplingParams, chat: bool, with_tenant: bool = False
) -> list[Prompt]:
    """The prompts of a JSONL file, - is stdin; blank lines are skipped.

    A line is an object with "prompt" (a text), "messages" (a chat) or "prompt_ids" (tokens),
    optionally "id", "tenant" where that means something, and any field of SamplingParams, which goes
    before `defaults`. With `chat`, a "prompt" is a user's message. Raises InputError naming the first
    bad line.
    """
    text = read_text(None if str(path) == "-" else path)
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"line {number} of {path}"
            try:
                prompts.append(_parse(line, where, defaults, chat, with_tenant))
            except InputError as error:
                raise InputError(error.field, f"Bad {where}: {error}") from None
    if not prompts:
        raise InputError("prompts_file", f"{path} holds no prompt; write one JSON object a line.")
    return prompts


def _parse(
    line: str, where: str, defaults: SamplingParams, chat: bool, with_tenant: bool
) -> Prompt:
    try:
        values = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise InputError("prompts_file", f"not JSON ({reason}).") from None
    if not isinstance(values, dict):
        raise InputError("prompts_file", 'must be a JSON object such as {"prompt": "Hello"}.')
    others = ["id", "tenant"] if with_tenant else ["id"]
    unknown = values.keys() - PARAMS - {*KINDS, *others}
    if unknown:
        known = ", ".join([*others, *sorted(PARAMS)])
        raise InputError(
            "prompts_file",
            f"unknown key {min(unknown)!r}; besides {', '.join(KINDS)} it takes {known}.",
        )
    if sum(kind in values for kind in KINDS) != 1:
        raise InputError("prompts_file", 'needs either "prompt", "messages" or "prompt_ids".')
    given = {name: value for name, value in values.items() if name in PARAMS}
    for name in ("stop", "stop_token_ids"):
        if name in given and not isinstance(given[name], str | list):
            raise InputError(name, f"{name} must be a list, got {json.dumps(given[name])}.")
    if isinstance(biases := given.get("logit_bias"), dict):  # whose keys JSON has as texts
        given["logit_bias"] = {int(k) if k.isdecimal() else k: v for k, v in biases.items()}
    tenant = values.get("tenant", "")
    if not isinstance(tenant, str):
        raise InputError("tenant", f'"tenant" must be a name, got {json.dumps(tenant)[:40]}.')
    params = replace(defaults, **given)
    return Prompt(where, _content(values, chat), params, values.get("id"), tenant)


def _content(values: dict[str, Any], chat: bool) -> str | list[dict[str, Any]] | list[int]:
    if "messages" in values:
        return _messages(values["messages"])
    if "prompt_ids" in values:
        ids = values["prompt_ids"]
        if not isinstance(ids, list) or any(type(token) is not int for token in ids):
            raise InputError("prompt_ids", '"prompt_ids" must be a list of token ids.')
        return ids
    text = values["prompt"]
    if not isinstance(text, str):
        raise InputError("prompt", f'"prompt" must be a text, got {json.dumps(text)[:40]}.')
    return user_message(text) if chat else text


def _messages(value: Any) -> list[dict[str, Any]]:
    good = (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
            for m in value
        )
    )
    if not good:
        raise InputError(
            "messages", '"messages" must be a list of objects with the texts "role" and "content".'
        )
    return list(value)


def encode(engine: Engine, prompt: Prompt) -> list[int]:
    if isinstance(prompt.prompt, str):
        return engine.tokenizer.encode(prompt.prompt)
    if prompt.prompt and isinstance(prompt.prompt[0], dict):
        return engine.encode_chat(prompt.prompt)
    return cast("list[int]", prompt.prompt)


def user_message(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def result(
    prompt: Prompt,
    completion: Completion,
    tokenizer: Tokenizer,
    explanation: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A finished answer as JSON. The seed is there so that the answer can be had again."""
    values: dict[str, Any] = {} if prompt.id is None else {"id": prompt.id}
    values |= {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "token_ids": completion.token_ids,
        "seed": completion.seed,
        "usage": {
            "prompt_tokens": len(completion.prompt_token_ids),
            "cached_tokens": completion.num_cached_tokens,
            "completion_tokens": len(completion.token_ids),
        },
    }
    if explanation is not None:
        values["explanation"] = explanation
    if completion.prompt_logprobs is not None:
        after = completion.prompt_token_ids[1:]
        values["prompt_logprobs"] = _logprobs(tokenizer, after, completion.prompt_logprobs)
    if completion.logprobs:
        values["logprobs"] = _logprobs(tokenizer, completion.token_ids, completion.logprobs)
    return values


def _logprobs(
    tokenizer: Tokenizer, ids: Sequence[int], told: Sequence[TokenLogprobs]
) -> list[dict[str, Any]]:
    return [
        {
            "id": token,
            "token": tokenizer.token_text(token),
            "logprob": step.logprob,
            "top": [
                {"id": i, "token": tokenizer.token_text(i), "logprob": value}
                for i, value in step.top
            ],
        }
        for token, step in zip(ids, told, strict=True)
    ]


class OrderedLines:
    """Writes each JSON line as soon as all lines before it are written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._next = 0
        self._held: dict[int, dict[str, Any]] = {}

    def put(self, index: int, values: dict[str, Any]) -> None:
        self._held[index] = {"index": index, **values}
        while self._next in self._held:
            self._write(self._held.pop(self._next))
            self._next += 1
        self._stream.flush()

    def close(self) -> None:
        """After an interruption: what is finished but had to wait for a line before it."""
        for index in sorted(self._held):
            self._write(self._held[index])
        self._held.clear()
        self._stream.flush()

    def _write(self, values: dict[str, Any]) -> None:
        self._stream.write(json.dumps(values, ensure_ascii=False) + "\n")
