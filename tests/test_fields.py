"""Every documented field of every API does something, or is refused by its name.

The fields are those of the clients' own types. Each has a probe: a value, and what comes of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_create_params as beta_params
from ollama import _types as ollama_types
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params

from elinvar.engine.text_aio import AsyncTextModel
from elinvar.engine.text_model import TextModel
from elinvar.server.app import create_text_app
from fuzz_server import NAME, tiny_server
from serving import running

Body = dict[str, Any]
SAID = [{"role": "user", "content": "Once upon a time there was"}]
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
CLAUDE_TOOL = {"name": "f", "input_schema": {"type": "object"}}


@dataclass(frozen=True)
class Probe:
    """A value, in a request that has `beside`, too."""

    value: Any
    beside: Body = field(default_factory=dict)


@dataclass(frozen=True)
class Used(Probe):
    """The answer is another one than without the field."""


@dataclass(frozen=True)
class Refused(Probe):
    """400, and the error names the field."""


@dataclass(frozen=True)
class Taken(Probe):
    """It is for whoever runs the server, or for billing: no answer depends on it."""


@dataclass(frozen=True)
class Needed(Probe):
    """There is no request without it."""


@dataclass(frozen=True)
class Api:
    path: str
    body: Body
    documented: frozenset[str]
    probes: Mapping[str, Probe]
    inside: str = ""
    """The object that has the fields; "": the body."""
    texts: bool = False
    """It is asked of a model that makes vectors of texts."""


def names(*types: Any) -> frozenset[str]:
    return frozenset(name for one in types for name in one.__annotations__)


STOPS = [chr(code) for code in range(32, 48)]
SEEDED: Body = {"seed": 3, "max_tokens": 8, "temperature": 1.5}
OPENAI_COMMON: dict[str, Probe] = {
    "model": Needed(NAME),
    "frequency_penalty": Used(2.0, {"temperature": 0}),
    "logit_bias": Used({"97": 100}),
    "max_tokens": Used(3),
    "n": Used(2),
    "presence_penalty": Used(2.0, {"temperature": 0}),
    "seed": Used(4),
    "stop": Used(STOPS, {"max_tokens": 48, "ignore_eos": True}),
    "stream": Used(True),
    "stream_options": Used({"include_usage": True}, {"stream": True}),
    "temperature": Used(0.0),
    "top_p": Used(0.01),
    "user": Taken("u"),
}
OPENAI_CHAT = Api(
    "/v1/chat/completions",
    {"model": NAME, "messages": SAID, **SEEDED},
    names(chat_params.CompletionCreateParamsBase) | {"stream"},
    OPENAI_COMMON
    | {
        "messages": Used([{"role": "user", "content": "Hi"}]),
        "audio": Refused({"format": "wav", "voice": "alloy"}),
        "function_call": Refused({"name": "f"}),
        "functions": Refused([FUNCTION]),
        "logprobs": Used(True),
        "max_completion_tokens": Used(3, {"max_tokens": None}),
        "metadata": Taken({"a": "b"}),
        "modalities": Refused(["text", "audio"]),
        "moderation": Refused({}),
        "prediction": Refused({"type": "content", "content": "x"}),
        "prompt_cache_key": Taken("k"),
        "prompt_cache_options": Refused({"mode": "x"}),
        "prompt_cache_retention": Refused("24h"),
        "reasoning_effort": Refused("low"),
        "response_format": Used({"type": "json_object"}),
        "safety_identifier": Taken("u"),
        "service_tier": Used("flex"),
        "store": Refused(True),
        "tool_choice": Used("required", {"tools": [TOOL]}),
        "tools": Used([TOOL]),
        "top_logprobs": Used(2, {"logprobs": True}),
        "verbosity": Refused("low"),
        "web_search_options": Refused({}),
    },
)
OPENAI_COMPLETIONS = Api(
    "/v1/completions",
    {"model": NAME, "prompt": "Once upon a time there was", **SEEDED},
    names(completion_create_params.CompletionCreateParamsBase) | {"stream"},
    OPENAI_COMMON
    | {
        "prompt": Used("Hi"),
        "best_of": Used(3),
        "echo": Used(True),
        "logprobs": Used(2),
        "suffix": Refused("the end"),
    },
)
ELSEWHERE = {"parallel_tool_calls"}
"""What a model must call tools for: tests/test_dialects_grammar.py."""

ANTHROPIC_PROMPT: dict[str, Probe] = {
    "model": Needed(NAME),
    "messages": Used([{"role": "user", "content": "Hi"}]),
    "system": Used("Be brief."),
    "context_management": Refused({"edits": []}),
    "mcp_servers": Refused([{"type": "url", "url": "x", "name": "x"}]),
    "speed": Refused("fast"),
}
ANTHROPIC = Api(
    "/v1/messages",
    {"model": NAME, "messages": SAID, **SEEDED},
    names(message_create_params.MessageCreateParamsBase, beta_params.MessageCreateParamsBase)
    | {"stream", "temperature", "top_k", "top_p"},
    ANTHROPIC_PROMPT
    | {
        "max_tokens": Used(3),
        "billing_policy": Refused({}),
        "cache_control": Used({"type": "ephemeral"}),
        "compaction": Refused({}),
        "container": Refused("c"),
        "diagnostics": Refused({"previous_message_id": None}),
        "fallback_credit_token": Refused("x"),
        "fallbacks": Refused([]),
        "inference_geo": Refused("eu"),
        "metadata": Taken({"user_id": "u"}),
        "output_config": Used({"format": {"type": "json_schema", "schema": {"type": "array"}}}),
        "output_format": Refused({"type": "json_schema", "schema": {}}),
        "service_tier": Taken("standard_only"),
        "stop_sequences": Used(STOPS, {"max_tokens": 40}),
        "stream": Used(True),
        "temperature": Used(0.0),
        "thinking": Refused({"type": "enabled", "budget_tokens": 1024}),
        "thread": Refused({}),
        "tool_choice": Used({"type": "any"}, {"tools": [CLAUDE_TOOL]}),
        "tools": Used([CLAUDE_TOOL]),
        "top_k": Used(1),
        "top_p": Used(0.01),
    },
)
ANTHROPIC_COUNT = Api(
    "/v1/messages/count_tokens",
    {"model": NAME, "messages": SAID},
    names(message_count_tokens_params.MessageCountTokensParams),
    ANTHROPIC_PROMPT
    | {
        "cache_control": Taken({"type": "ephemeral"}),
        "output_config": Refused({"effort": "low"}),
        "thinking": Refused({"type": "enabled", "budget_tokens": 1024}),
        "tool_choice": Used({"type": "none"}, {"tools": [CLAUDE_TOOL]}),
        "tools": Used([CLAUDE_TOOL]),
    },
)
HEADERS = {"betas", "user_profile_id", "workspace_id"}
"""What Anthropic's client takes beside the body."""

OPTIONS: Body = {"seed": 3, "num_predict": 8, "temperature": 1.5}
OLLAMA_COMMON: dict[str, Probe] = {
    "model": Needed(NAME),
    "format": Used("json"),
    "keep_alive": Taken("5m"),
    "logprobs": Used(True),
    "options": Used({**OPTIONS, "seed": 4}),
    "stream": Used(True),
    "think": Refused(True),
    "top_logprobs": Used(2, {"logprobs": True}),
}
OLLAMA_CHAT = Api(
    "/api/chat",
    {"model": NAME, "messages": SAID, "stream": False, "options": OPTIONS},
    frozenset(ollama_types.ChatRequest.model_fields),
    OLLAMA_COMMON
    | {
        "messages": Used([{"role": "user", "content": "Hi"}]),
        "tools": Used([TOOL]),
        "shift": Refused(True),
        "truncate": Refused(True),
    },
)
OLLAMA_GENERATE = Api(
    "/api/generate",
    {"model": NAME, "prompt": "Once upon", "stream": False, "options": OPTIONS},
    frozenset(ollama_types.GenerateRequest.model_fields),
    OLLAMA_COMMON
    | {
        "prompt": Used("Hi"),
        "context": Refused([1, 2]),
        "height": Refused(8),
        "images": Refused(["eA=="]),
        "raw": Used(True),
        "steps": Refused(2),
        "suffix": Refused("the end"),
        "system": Used("Be brief."),
        "template": Refused("{{ .Prompt }}"),
        "width": Refused(8),
    },
)
LONG: Body = {"temperature": 0, "num_predict": 40}
OLLAMA_OPTIONS = Api(
    "/api/generate",
    {"model": NAME, "prompt": "Once upon", "stream": False, "options": OPTIONS},
    frozenset(ollama_types.Options.model_fields),
    {
        "frequency_penalty": Used(2.0, LONG),
        "min_p": Used(0.9),
        "num_ctx": Used(32),
        "num_predict": Used(3),
        "presence_penalty": Used(2.0, LONG),
        "repeat_last_n": Refused(64),
        "repeat_penalty": Used(2.0, LONG),
        "seed": Used(4),
        "stop": Used(STOPS, {"num_predict": 40}),
        "temperature": Used(0.0),
        "top_k": Used(1),
        "top_p": Used(0.01),
        "typical_p": Used(0.1),
        "embedding_only": Refused(True),
        "f16_kv": Refused(True),
        "logits_all": Refused(True),
        "low_vram": Refused(True),
        "main_gpu": Refused(1),
        "mirostat": Refused(1),
        "mirostat_eta": Refused(0.1),
        "mirostat_tau": Refused(5.0),
        "num_batch": Refused(8),
        "num_gpu": Refused(1),
        "num_keep": Refused(4),
        "num_thread": Refused(2),
        "numa": Refused(True),
        "penalize_newline": Refused(True),
        "tfs_z": Refused(0.5),
        "use_mlock": Refused(True),
        "use_mmap": Refused(False),
        "vocab_only": Refused(True),
    },
    inside="options",
)
RESPONSES_TOOL = {"type": "function", **FUNCTION}
OPENAI_RESPONSES = Api(
    "/v1/responses",
    {"model": NAME, "input": "Once upon", "seed": 3, "max_output_tokens": 8, "temperature": 1.5},
    names(response_create_params.ResponseCreateParamsBase) | {"stream"},
    {
        "model": Needed(NAME),
        "input": Used("Hi"),
        "access_programs": Refused({"a": 1}),
        "background": Used(True),
        "background_options": Refused({"completion_window": "x"}),
        "context_management": Refused([{"type": "compaction"}]),
        "conversation": Refused("c"),
        "image": Refused({}),
        "include": Used(["message.output_text.logprobs"]),
        "instructions": Used("Be brief."),
        "max_output_tokens": Used(3),
        "max_tool_calls": Used(1),
        "metadata": Used({"a": "b"}),
        "moderation": Refused({}),
        "parallel_tool_calls": Used(False),
        "previous_response_id": Refused("resp_none"),
        "prompt": Refused({"id": "p"}),
        "prompt_cache_key": Used("k"),
        "prompt_cache_options": Refused({"mode": "x"}),
        "prompt_cache_retention": Refused("24h"),
        "reasoning": Refused({"effort": "low"}),
        "safety_identifier": Used("u"),
        "service_tier": Used("flex"),
        "store": Used(False),
        "stream": Used(True),
        "stream_options": Refused({"include_usage": True}, {"stream": True}),
        "temperature": Used(0.0),
        "text": Used({"format": {"type": "json_object"}}),
        "tool_choice": Used("required", {"tools": [RESPONSES_TOOL]}),
        "tools": Used([RESPONSES_TOOL]),
        "top_logprobs": Used(2, {"include": ["message.output_text.logprobs"]}),
        "top_p": Used(0.01),
        "truncation": Used("auto"),
        "user": Used("u"),
    },
)
TEXT = "What is it?"
OPENAI_EMBEDDINGS = Api(
    "/v1/embeddings",
    {"model": NAME, "input": [TEXT]},
    names(embedding_create_params.EmbeddingCreateParams),
    {
        "model": Needed(NAME),
        "input": Needed(["x"]),
        "dimensions": Used(8),
        "encoding_format": Used("base64"),
        "prompt_name": Refused("none"),
        "truncate": Refused(False, {"input": ["word " * 999]}),
        "user": Taken("u"),
    },
    texts=True,
)
RERANK = Api(
    "/v1/rerank",
    {"model": NAME, "query": TEXT, "documents": ["a", "b c"]},
    frozenset(),  # Jina's and Cohere's clients are not installed
    {
        "model": Needed(NAME),
        "query": Needed("x"),
        "documents": Needed(["x"]),
        "top_n": Used(1),
        "return_documents": Used(False),
        "truncate": Refused(False, {"documents": ["word " * 999]}),
        "max_chunks_per_doc": Refused(2),
        "max_tokens_per_doc": Refused(8),
        "priority": Refused(1),
        "rank_fields": Refused(["text"]),
    },
    texts=True,
)
OLLAMA_EMBED = Api(
    "/api/embed",
    {"model": NAME, "input": [TEXT]},
    frozenset(ollama_types.EmbedRequest.model_fields),
    {
        "model": Needed(NAME),
        "input": Needed(["x"]),
        "dimensions": Used(8),
        "keep_alive": Taken("5m"),
        "options": Refused({"num_gpu": 1}),
        "truncate": Refused(False, {"input": ["word " * 999]}),
    },
    texts=True,
)
APIS = (
    OPENAI_EMBEDDINGS,
    RERANK,
    OLLAMA_EMBED,
    OPENAI_CHAT,
    OPENAI_COMPLETIONS,
    OPENAI_RESPONSES,
    ANTHROPIC,
    ANTHROPIC_COUNT,
    OLLAMA_CHAT,
    OLLAMA_GENERATE,
    OLLAMA_OPTIONS,
)
CASES = [(api, name) for api in APIS for name in api.probes]


Urls = dict[bool, str]
"""Of a model that makes vectors of texts, and of one that writes them."""


@pytest.fixture(scope="module")
def urls(bert: Path) -> Iterator[Urls]:
    vectors = create_text_app(AsyncTextModel(TextModel.load(bert)), NAME, matryoshka=True)
    with tiny_server(max_context=512) as found, running(vectors) as (port, _):
        yield {False: found, True: f"http://127.0.0.1:{port}"}


def test_every_documented_field_has_a_probe() -> None:
    for api in APIS:
        assert api.documented <= api.probes.keys() | ELSEWHERE | HEADERS, api.path


def bodies(api: Api, name: str) -> tuple[Body, Body]:
    """Without the field, or with its usual value, and with that of the probe."""
    probe = api.probes[name]
    beside = {key: value for key, value in probe.beside.items() if value is not None}
    left_out = {key for key, value in probe.beside.items() if value is None}
    inner: Body = api.body[api.inside] if api.inside else api.body
    plain = {key: value for key, value in inner.items() if key not in left_out} | beside
    asked = plain | {name: probe.value}
    if not api.inside:
        return plain, asked
    return api.body | {api.inside: plain}, api.body | {api.inside: asked}


def said(url: str, api: Api, body: Body) -> Any:
    """The answer, without what is another each time."""
    answer = httpx.post(url + api.path, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    if "json" not in answer.headers["content-type"] or "x-ndjson" in answer.headers["content-type"]:
        return answer.headers["content-type"], answer.text.count("usage")
    found = answer.json()
    for key in list(found):
        if key in ("id", "created", "created_at", "completed_at") or key.endswith("_duration"):
            del found[key]
    for item in found.get("output", ()):  # of a response: each has an id of its own
        for key in ("id", "call_id"):
            item.pop(key, None)
    # What is cached depends on what was asked before.
    found["usage"] = cached_or_not(found.get("usage", {}))
    return found


def cached_or_not(usage: Body | None) -> Body:
    usage = usage or {}
    for details in "prompt_tokens_details", "input_tokens_details":
        usage.pop(details, None)
    read = usage.pop("cache_read_input_tokens", 0)
    if "cache_creation_input_tokens" in usage:
        made = usage["cache_creation_input_tokens"]
        counted = "cache_creation_input_tokens" if made else "input_tokens"
        usage[counted] += read
    return usage


@pytest.mark.parametrize(("api", "name"), CASES, ids=[f"{a.path}-{n}" for a, n in CASES])
def test_field(urls: Urls, api: Api, name: str) -> None:
    probe, url = api.probes[name], urls[api.texts]
    plain, asked = bodies(api, name)
    match probe:
        case Used():
            assert said(url, api, asked) != said(url, api, plain)
        case Taken():
            assert said(url, api, asked) == said(url, api, plain)
        case Refused():
            answer = httpx.post(url + api.path, json=asked, timeout=60)
            assert answer.status_code == 400, answer.text
            where = f"{api.inside}.{name}" if api.inside else name
            assert where in answer.text
        case Needed():
            del asked[name]
            answer = httpx.post(url + api.path, json=asked, timeout=60)
            assert (answer.status_code, name in answer.text) == (400, True)


def test_a_field_that_nobody_knows_is_refused(urls: Urls) -> None:
    for api in APIS:
        inner = {"tempurature": 1}
        answer = httpx.post(urls[api.texts] + api.path, json=api.body | inner, timeout=60)
        assert answer.status_code == 400
        assert "tempurature" in answer.text
