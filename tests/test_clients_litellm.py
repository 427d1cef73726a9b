"""LiteLLM against a real server over real models, by each of the three APIs that it speaks.

Its tools need the package mcp, and what that brings; the other clients call some.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elinvar.base.config import EngineConfig
from elinvar.base.limits import TenantLimits
from elinvar.engine.text_aio import AsyncTextModel
from elinvar.engine.text_model import TextModel
from elinvar.server.app import create_text_app
from elinvar.server.tenants import Tenants, hash_key
from scripted import use_script
from serving import Serving, running, serving

# It would fetch a list of prices when it is imported.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

SKY: Any = [{"role": "user", "content": "Why is the sky blue? Answer in one sentence."}]
APIS = {"openai": "/v1", "anthropic": "", "ollama_chat": ""}
"""Its providers, and where their APIs begin here."""


@pytest.fixture(scope="module")
def served(smollm2_gguf: Path) -> Iterator[Serving]:
    limits = {"ann": TenantLimits()}
    tenants = Tenants(limits, ((bytes.fromhex(hash_key("sk-a")), "ann"),))
    config = EngineConfig(kv_memory=64 * 2**20, num_threads=2, max_context=512, tenants=limits)
    with serving(smollm2_gguf, "smol", config, tenants=tenants) as found:
        yield found


def options(served: Serving, api: str, **more: Any) -> dict[str, Any]:
    common = {"messages": SKY, "max_tokens": 16, "temperature": 0, "num_retries": 0}
    where = {"api_base": served.url + APIS[api], "api_key": "sk-a"}
    return {"model": f"{api}/smol"} | common | where | more


@pytest.fixture(params=APIS)
def api(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_whole_and_stream(served: Serving, api: str) -> None:
    whole: Any = litellm.completion(**options(served, api))
    (choice,) = whole.choices
    assert "sky" in choice.message.content
    assert choice.finish_reason == "length"
    assert whole.usage.completion_tokens == 16
    assert whole.usage.prompt_tokens == len(served.core.encode_chat(SKY))
    chunks: Any = litellm.completion(**options(served, api, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == choice.message.content


def test_async(served: Serving, api: str) -> None:
    async def ask() -> str:
        chunks: Any = await litellm.acompletion(**options(served, api, stream=True))
        parts = [chunk.choices[0].delta.content or "" async for chunk in chunks]
        return "".join(parts)

    assert "sky" in asyncio.run(ask())


def test_stop_and_system(served: Serving, api: str) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *SKY]
    stopped: Any = litellm.completion(**options(served, api, messages=messages, stop=[" is"]))
    assert stopped.choices[0].finish_reason == "stop"
    assert " is" not in stopped.choices[0].message.content


def test_format(served: Serving, api: str) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    more: dict[str, Any] = {"response_format": form, "max_tokens": 60}
    answer: Any = litellm.completion(**options(served, api, **more))
    assert json.loads(answer.choices[0].message.content).keys() == {"a"}


def test_errors(served: Serving) -> None:
    for api in ("openai", "anthropic"):
        with pytest.raises(litellm.AuthenticationError):
            litellm.completion(**options(served, api, api_key="sk-b"))
        with pytest.raises(litellm.NotFoundError):
            litellm.completion(**options(served, api, model=f"{api}/other"))
        with pytest.raises(litellm.BadRequestError, match="temperature"):
            litellm.completion(**options(served, api, temperature=-1))
    with pytest.raises(litellm.BadRequestError, match="num_gpu"):
        litellm.completion(**options(served, "ollama_chat", num_gpu=1))


def test_too_many(tiny_gguf: Path) -> None:
    """A tenant that may have one answer at once asks for a second one."""
    limits = {"ann": TenantLimits(max_running=1, max_waiting=0)}
    tenants = Tenants(limits, ((bytes.fromhex(hash_key("sk-a")), "ann"),))
    config = EngineConfig(kv_memory=64 * 2**20, num_threads=2, tenants=limits)
    with serving(tiny_gguf, "smol", config, tenants=tenants) as served:
        use_script(served.core, lambda prompt: " ".join(map(str, range(400))))
        for api in ("openai", "anthropic"):
            long = options(served, api, stream=True, max_tokens=800)
            chunks: Any = litellm.completion(**long)
            next(iter(chunks))
            with pytest.raises(litellm.RateLimitError):
                litellm.completion(**options(served, api))
            assert len(list(chunks)) > 100


def test_embeddings(minilm: Path) -> None:
    engine = AsyncTextModel(TextModel.load(str(minilm), EngineConfig(num_threads=2)))
    with running(create_text_app(engine, "mini")) as (port, _):
        url = f"http://127.0.0.1:{port}"
        one: Any = litellm.embedding(
            "openai/mini", ["a cat"], api_base=f"{url}/v1", api_key="x", encoding_format="float"
        )
        two: Any = litellm.embedding("ollama/mini", ["a cat"], api_base=url)
        assert one.data[0]["embedding"] == pytest.approx(two.data[0]["embedding"])
