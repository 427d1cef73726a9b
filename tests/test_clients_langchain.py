"""LangChain's client of OpenAI's API against a real server over real models."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel

from elinvar.base.config import EngineConfig
from elinvar.engine.text_aio import AsyncTextModel
from elinvar.engine.text_model import TextModel
from elinvar.server.app import create_text_app
from serving import Serving, running, serving

SKY = "Why is the sky blue? Answer in one sentence."


@pytest.fixture(scope="module")
def served(smollm2_gguf: Path) -> Iterator[Serving]:
    config = EngineConfig(kv_memory=64 * 2**20, num_threads=2, max_context=512)
    with serving(smollm2_gguf, "smol", config) as found:
        yield found


@pytest.fixture(scope="module")
def chat(served: Serving) -> ChatOpenAI:
    settings: Any = {"base_url": f"{served.url}/v1", "api_key": "x", "max_retries": 0}
    return ChatOpenAI(model="smol", temperature=0, max_tokens=16, **settings)


def test_invoke_and_stream(chat: ChatOpenAI) -> None:
    whole = chat.invoke(SKY)
    assert "sky" in str(whole.content)
    assert whole.usage_metadata and whole.usage_metadata["output_tokens"] == 16
    assert whole.response_metadata["finish_reason"] == "length"
    assert "".join(str(part.content) for part in chat.stream(SKY)) == whole.content


def test_chain_batch_and_async(chat: ChatOpenAI) -> None:
    prompt = ChatPromptTemplate.from_messages(
        [("system", "Answer briefly."), ("user", "What is {thing}?")]
    )
    chain = prompt | chat
    things = [{"thing": "rain"}, {"thing": "snow"}]
    together = [one.content for one in chain.batch(things)]
    assert together == [chain.invoke(one).content for one in things]
    assert asyncio.run(chain.ainvoke(things[0])).content == together[0]


def test_conversation(chat: ChatOpenAI, served: Serving) -> None:
    turns = [
        SystemMessage("You are helpful."),
        HumanMessage("My name is Ada."),
        AIMessage("Hello Ada!"),
        HumanMessage("What is my name?"),
    ]
    roles = {"system": "system", "human": "user", "ai": "assistant"}
    plain = [{"role": roles[turn.type], "content": turn.content} for turn in turns]
    usage = chat.invoke(turns).usage_metadata
    assert usage and usage["input_tokens"] == len(served.core.encode_chat(plain))


class Weather(BaseModel):
    """The weather of a city."""

    city: str
    days: int


def test_tools_and_structured_output(chat: ChatOpenAI) -> None:
    longer = chat.model_copy(update={"max_tokens": 80})
    asked = longer.bind_tools([Weather], tool_choice="any").invoke("The weather in Paris?")
    assert isinstance(asked, AIMessage)
    (call,) = asked.tool_calls
    assert call["name"] == "Weather" and type(call["args"]["days"]) is int
    for method in ("json_schema", "function_calling"):
        found = longer.with_structured_output(Weather, method=method).invoke("Paris, two days")
        assert isinstance(found, Weather)


def test_completions(served: Serving) -> None:
    settings: Any = {"base_url": f"{served.url}/v1", "api_key": "x", "max_retries": 0}
    model = OpenAI(model="smol", temperature=0, max_tokens=8, **settings)
    assert "Paris" in model.invoke("The capital of France is")


def test_errors(chat: ChatOpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        chat.model_copy(update={"model_name": "other"}).invoke(SKY)
    with pytest.raises(openai.BadRequestError, match="top_p"):
        chat.bind(top_p=2).invoke(SKY)


def test_embeddings(minilm: Path) -> None:
    engine = AsyncTextModel(TextModel.load(str(minilm), EngineConfig(num_threads=2)))
    with running(create_text_app(engine, "mini")) as (port, _):
        settings: Any = {"base_url": f"http://127.0.0.1:{port}/v1", "api_key": "x"}
        # Its own cut of long texts would ask for OpenAI's tokens.
        model = OpenAIEmbeddings(model="mini", check_embedding_ctx_length=False, **settings)
        one, two = model.embed_documents(["a cat", "bond prices"])
        assert len(one) == len(two) == 384
        assert model.embed_query("a cat") == pytest.approx(one)
