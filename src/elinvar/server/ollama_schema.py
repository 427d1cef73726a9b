"""The bodies of Ollama's API. What the values mean is ollama_messages' business.

Unknown fields are refused, a null counts as not given.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class OllamaOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    num_ctx: int | None = None
    num_predict: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    typical_p: float | None = None
    # Not served; most of them say how the model is loaded, which is for who starts the server.
    tfs_z: float | None = None
    mirostat: int | None = None
    mirostat_eta: float | None = None
    mirostat_tau: float | None = None
    penalize_newline: bool | None = None
    num_keep: int | None = None
    draft_num_predict: int | None = None
    embedding_only: bool | None = None
    f16_kv: bool | None = None
    logits_all: bool | None = None
    low_vram: bool | None = None
    main_gpu: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    num_thread: int | None = None
    numa: bool | None = None
    use_mlock: bool | None = None
    use_mmap: bool | None = None
    vocab_only: bool | None = None


UNSERVED_OPTIONS: dict[str, tuple[object, ...]] = {
    "tfs_z": (1.0,),
    "mirostat": (0,),
    "mirostat_eta": (),
    "mirostat_tau": (),
    "penalize_newline": (),
    "num_keep": (),
    "draft_num_predict": (0,),
    "embedding_only": (False,),
    "f16_kv": (),
    "logits_all": (False,),
    "low_vram": (False,),
    "main_gpu": (),
    "num_batch": (),
    "num_gpu": (),
    "num_thread": (),
    "numa": (),
    "use_mlock": (),
    "use_mmap": (),
    "vocab_only": (False,),
}
"""Options that are not served, with the values that ask for nothing."""


class OllamaFunction(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class OllamaTool(msgspec.Struct, forbid_unknown_fields=True):
    function: OllamaFunction
    type: Literal["function"] | None = None


class OllamaCalledFunction(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    arguments: dict[str, Any]
    index: int | None = None
    description: str | None = None


class OllamaCall(msgspec.Struct, forbid_unknown_fields=True):
    function: OllamaCalledFunction
    id: str | None = None
    type: Literal["function"] | None = None


class OllamaMessage(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    tool_calls: list[OllamaCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    images: list[Any] | None = None


class OllamaRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What both ways to ask for a text share."""

    model: str
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    options: OllamaOptions | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    # Accepted: the models of this server stay.
    keep_alive: float | str | None = None
    # Not Ollama's: as with OpenAI's API.
    priority: int | None = None
    session_id: str | None = None
    expect_return_s: float | None = None
    pause_kind: str | None = None
    # Not served: what is too long is an error.
    shift: bool | None = None
    truncate: bool | None = None


class OllamaChatRequest(OllamaRequest, kw_only=True):
    messages: list[OllamaMessage] | None = None
    tools: list[OllamaTool] | None = None


class OllamaGenerateRequest(OllamaRequest, kw_only=True):
    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    # Not served.
    context: list[int] | None = None
    height: int | None = None
    images: list[Any] | None = None
    steps: int | None = None
    suffix: str | None = None
    template: str | None = None
    width: int | None = None


UNSERVED: dict[str, tuple[object, ...]] = {
    "context": ([],),
    "height": (0,),
    "images": ([],),
    "shift": (False,),
    "steps": (0,),
    "suffix": ("",),
    "template": ("",),
    "truncate": (False,),
    "width": (0,),
}
"""Fields that are not served, with the values that ask for nothing."""


class OllamaShowRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: str | None = None
    name: str | None = None
    """As it was called once."""
    verbose: bool | None = None
    system: str | None = None
    template: str | None = None
    options: dict[str, Any] | None = None


class OllamaEmbedRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: str
    input: str | list[str]
    truncate: bool | None = None
    dimensions: int | None = None
    keep_alive: float | str | None = None
    options: OllamaOptions | None = None


class OllamaEmbeddingsRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The older endpoint's: one text."""

    model: str
    prompt: str
    keep_alive: float | str | None = None
    options: OllamaOptions | None = None
