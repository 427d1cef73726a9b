"""Clients on top of others, against a real server over a real model: the command `llm`, Pydantic AI."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, ToolOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

from elinvar.base.config import EngineConfig
from serving import Serving, serving

SKY = "Why is the sky blue? Answer in one sentence."
BRIEF = ModelSettings(max_tokens=16, temperature=0.0)


@pytest.fixture(scope="module")
def served(smollm2_gguf: Path) -> Iterator[Serving]:
    config = EngineConfig(kv_memory=64 * 2**20, num_threads=2, max_context=512)
    with serving(smollm2_gguf, "smol", config) as found:
        yield found


def test_llm(served: Serving, tmp_path: Path) -> None:
    """The command, which streams, and what it says where the server refuses."""
    models = f"- model_id: smol\n  model_name: smol\n  api_base: {served.url}/v1\n"
    (tmp_path / "extra-openai-models.yaml").write_text(models)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "llm", "-m", "smol", "--key", "x", *arguments],
            env=os.environ | {"LLM_USER_PATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
        )

    options = "-o", "temperature", "0", "-o", "max_tokens", "16"
    streamed = run(SKY, *options)
    assert "sky" in streamed.stdout, streamed.stderr
    refused = run(SKY, "-o", "top_p", "0")
    assert refused.returncode == 1
    assert "top_p must be above 0" in refused.stderr


@pytest.fixture(params=["openai", "anthropic"])
def model(request: pytest.FixtureRequest, served: Serving) -> OpenAIChatModel | AnthropicModel:
    if request.param == "openai":
        openai = OpenAIProvider(base_url=f"{served.url}/v1", api_key="x")
        return OpenAIChatModel("smol", provider=openai)
    return AnthropicModel("smol", provider=AnthropicProvider(base_url=served.url, api_key="x"))


def test_agent(model: OpenAIChatModel | AnthropicModel, served: Serving) -> None:
    agent = Agent(model, instructions="Answer briefly.", model_settings=BRIEF)
    first = agent.run_sync("My name is Ada. Say hello to me.")
    assert first.output
    assert first.usage.output_tokens > 0
    second = agent.run_sync("What is my name?", message_history=first.all_messages())
    said = ["Answer briefly.", "My name is Ada. Say hello to me.", first.output, "What is my name?"]
    roles = ["system", "user", "assistant", "user"]
    turns = [{"role": r, "content": c} for r, c in zip(roles, said, strict=True)]
    assert second.usage.input_tokens == len(served.core.encode_chat(turns))


class Weather(BaseModel):
    city: str
    days: int


def test_agent_with_a_form(model: OpenAIChatModel | AnthropicModel) -> None:
    """The answer is a call of a tool that is made up for it."""
    settings = BRIEF | {"max_tokens": 80}
    agent = Agent(model, output_type=ToolOutput(Weather), model_settings=settings)
    assert type(agent.run_sync("The weather in Paris for two days").output.days) is int


def test_agent_is_refused(model: OpenAIChatModel | AnthropicModel) -> None:
    with pytest.raises(ModelHTTPError) as info:
        Agent(model, model_settings=ModelSettings(max_tokens=-1)).run_sync(SKY)
    assert info.value.status_code == 400
