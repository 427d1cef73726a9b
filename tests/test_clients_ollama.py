"""Ollama's own client against a real server over real models."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ollama
import pytest

from elinvar.base.config import EngineConfig
from elinvar.base.limits import TenantLimits
from elinvar.engine.text_aio import AsyncTextModel
from elinvar.engine.text_model import TextModel
from elinvar.server.app import create_text_app
from elinvar.server.tenants import Tenants, hash_key
from scripted import use_script
from serving import Serving, running, serving

SKY: Any = [{"role": "user", "content": "Why is the sky blue? Answer in one sentence."}]
GREEDY: Any = {"temperature": 0, "num_predict": 24}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def served(smollm2_gguf: Path) -> Iterator[Serving]:
    config = EngineConfig(kv_memory=64 * 2**20, num_threads=2, max_context=512)
    with serving(smollm2_gguf, "smol", config) as running_:
        yield running_


@pytest.fixture(scope="module")
def client(served: Serving) -> ollama.Client:
    return ollama.Client(served.url)


def test_chat(client: ollama.Client, served: Serving) -> None:
    answer = client.chat("smol", SKY, options=GREEDY)
    assert "sky" in (answer.message.content or "")
    assert (answer.model, answer.done, answer.done_reason) == ("smol", True, "length")
    assert answer.prompt_eval_count == len(served.core.encode_chat(SKY))
    assert answer.eval_count == 24
    total, prompt, rest = (
        answer.total_duration,
        answer.prompt_eval_duration,
        answer.eval_duration,
    )
    assert total and rest and prompt is not None and total >= prompt + rest > 0


def test_stream_equals_whole(client: ollama.Client) -> None:
    whole = client.chat("smol", SKY, options=GREEDY)
    *parts, last = client.chat("smol", SKY, options=GREEDY, stream=True)
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert not any(part.done for part in parts)
    assert (last.done, last.done_reason, last.eval_count) == (True, "length", 24)
    assert len(parts) > 1


def test_generate(client: ollama.Client, served: Serving) -> None:
    templated = client.generate("smol", SKY[0]["content"], options=GREEDY)
    assert templated.response == client.chat("smol", SKY, options=GREEDY).message.content
    raw = client.generate("smol", "The capital of France is", raw=True, options=GREEDY)
    assert raw.prompt_eval_count == len(served.core.tokenizer.encode("The capital of France is"))
    assert "Paris" in (raw.response or "")
    said = client.generate("smol", SKY[0]["content"], system="Say no.", options=GREEDY)
    assert said.response != templated.response


def test_a_stream_is_the_default(served: Serving) -> None:
    body = {"model": "smol", "messages": SKY, "options": {"num_predict": 3}}
    response = served.post("/api/chat", body)
    assert response.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert [line["done"] for line in lines] == [*[False] * (len(lines) - 1), True]


def test_options(client: ollama.Client, served: Serving) -> None:
    whole = client.chat("smol", SKY, options=GREEDY).message.content or ""
    word = whole.split()[4]
    stopped = client.chat("smol", SKY, options=GREEDY | {"stop": [word]})
    assert stopped.message.content == whole[: whole.index(word)]
    assert stopped.done_reason == "stop"
    hot = {"temperature": 5.0, "num_predict": 8, "seed": 4}
    one, two = (client.chat("smol", SKY, options=hot).message.content for _ in range(2))
    assert one == two
    assert client.chat("smol", SKY, options=hot | {"seed": 5}).message.content != one
    greedily = client.chat("smol", SKY, options=hot | {"top_k": 1}).message.content or ""
    assert whole.startswith(greedily)
    prompt = len(served.core.encode_chat(SKY))
    short = client.chat("smol", SKY, options={"num_ctx": prompt + 5, "temperature": 0})
    assert (short.eval_count, short.done_reason) == (5, "length")


def test_logprobs(client: ollama.Client) -> None:
    answer = client.chat("smol", SKY, options=GREEDY, logprobs=True, top_logprobs=2)
    assert answer.logprobs and len(answer.logprobs) == 24
    assert all(len(one.top_logprobs or ()) == 2 for one in answer.logprobs)
    parts = client.chat("smol", SKY, options=GREEDY, logprobs=True, stream=True)
    streamed = [one.logprob for part in parts for one in part.logprobs or ()]
    assert streamed == [one.logprob for one in answer.logprobs]


def test_format(client: ollama.Client) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form = schema | {"additionalProperties": False}
    options = GREEDY | {"num_predict": 60}
    for answer in (
        client.chat("smol", SKY, format=form, options=options).message.content,
        client.generate("smol", "An object:", format=form, raw=True, options=options).response,
    ):
        assert json.loads(answer or "").keys() == {"a"}


def test_tools(served: Serving, client: ollama.Client) -> None:
    """Of an answer that calls one, as the model's family writes it."""
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
    inner, runner = served.core.runner, use_script(served.core, lambda prompt: "I look.\n" + call)
    try:
        body: Any = {"model": "smol", "messages": SKY, "tools": [WEATHER]}
        whole = client.chat(**body).message
        parts = [part.message for part in client.chat(**body, stream=True)]
    finally:
        served.core.runner = inner
    assert runner is not inner
    calls = [one.function for one in whole.tool_calls or ()]
    assert [(one.name, one.arguments) for one in calls] == [("weather", {"city": "Paris"})]
    streamed = [one.function for part in parts for one in part.tool_calls or ()]
    assert streamed == calls
    assert "".join(part.content or "" for part in parts) == whole.content
    results = [*SKY, whole, {"role": "tool", "tool_name": "weather", "content": "sunny"}]
    assert client.chat("smol", results, tools=[WEATHER], options=GREEDY).done


def test_models(client: ollama.Client) -> None:
    (model,) = client.list().models
    assert model.model == "smol"
    assert model.details and model.details.family == "llama"
    shown = client.show("smol:latest")
    assert shown.capabilities == ["completion", "tools"]
    assert shown.modelinfo and shown.modelinfo["llama.context_length"] == 512
    assert "im_start" in (shown.template or "")
    (running_,) = client.ps().models
    assert (running_.name, running_.context_length) == ("smol", 512)


def test_loading(client: ollama.Client) -> None:
    assert client.generate("smol", "").done_reason == "load"
    assert client.chat("smol", [], keep_alive=0).done_reason == "unload"
    with pytest.raises(ollama.ResponseError):
        client.generate("other", "")


def test_async(served: Serving) -> None:
    async def ask() -> list[str]:
        client = ollama.AsyncClient(served.url)

        async def one() -> str:
            parts = await client.chat("smol:latest", SKY, options=GREEDY, stream=True)
            return "".join([part.message.content or "" async for part in parts])

        return await asyncio.gather(*(one() for _ in range(4)))

    assert len(set(asyncio.run(ask()))) == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"options": {"num_predict": 0}}, "options.num_predict"),
        ({"options": {"temperature": -1}}, "options.temperature must be"),
        ({"options": {"num_ctx": 4096}}, "this server's 512"),
        ({"options": {"num_ctx": 10}}, "maximum context length is 10"),
        ({"options": {"num_gpu": 1}}, "options.num_gpu"),
        ({"options": {"mirostat": 1}}, "options.mirostat"),
        ({"messages": [{"role": "user", "content": "x", "images": [b"eA=="]}]}, "images"),
        ({"think": True}, "chat template has no switch"),
        ({"top_logprobs": 2}, "top_logprobs"),
    ],
)
def test_bad_requests(client: ollama.Client, fields: dict[str, Any], words: str) -> None:
    for stream in (False, True):
        with pytest.raises(ollama.ResponseError) as info:
            body: Any = {"model": "smol", "messages": SKY} | fields
            list(client.chat(**body, stream=stream))
        assert info.value.status_code == 400
        assert words in info.value.error


def test_unknown_model(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError) as info:
        client.chat("other", SKY)
    assert info.value.status_code == 404
    assert "'other' does not exist" in info.value.error
    with pytest.raises(ollama.ResponseError) as info:
        client.show("other")
    assert info.value.status_code == 404


def test_keys(tiny_gguf: Path) -> None:
    limits = {"ann": TenantLimits()}
    tenants = Tenants(limits, ((bytes.fromhex(hash_key("sk-a")), "ann"),))
    config = EngineConfig(kv_memory=64 * 2**20, num_threads=2, tenants=limits)
    with serving(tiny_gguf, "tiny", config, tenants=tenants) as served:
        known = ollama.Client(served.url, headers={"Authorization": "Bearer sk-a"})
        assert known.chat("tiny", SKY, options={"num_predict": 1}).eval_count == 1
        for ask in (ollama.Client(served.url).list, lambda: served.post("/api/chat", {})):
            try:
                status = ask().status_code  # type: ignore[union-attr]
            except ollama.ResponseError as error:
                status = error.status_code
            assert status == 401


def test_embeddings(minilm: Path) -> None:
    engine = AsyncTextModel(TextModel.load(str(minilm), EngineConfig(num_threads=2)))
    with running(create_text_app(engine, "mini")) as (port, _):
        client = ollama.Client(f"http://127.0.0.1:{port}")
        texts = ["a cat", "a kitten", "bond prices"]
        found = client.embed("mini", texts)
        cat, kitten, bond = np.array(found.embeddings)
        assert cat @ kitten > 0.5 > cat @ bond
        assert found.prompt_eval_count and found.total_duration
        assert client.embed("mini", "a cat").embeddings[0] == list(found.embeddings[0])
        assert client.embeddings("mini", "a cat").embedding == list(found.embeddings[0])
        assert client.show("mini").capabilities == ["embedding"]
        with pytest.raises(ollama.ResponseError, match=r"options\.temperature"):
            client.embed("mini", texts, options={"temperature": 1})
        with pytest.raises(ollama.ResponseError, match="dimensions"):
            client.embed("mini", texts, dimensions=8)
