"""Adapters as models of the server, through the official client and the endpoints that load them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from adapters import save_adapter
from serving import Serving, eventually, serving

PROMPT = "def fibonacci(n):"


def adapter(folder: Path, core: Any, seed: int) -> Path:
    """Of q, v and down in all layers of the engine's model."""
    c, layers = core.model_config, range(core.model_config.num_layers)
    heads = {"q": c.num_heads * c.head_dim, "v": c.num_kv_heads * c.head_dim}
    modules = {
        f"model.layers.{i}.self_attn.{name}_proj": (c.dim, n)
        for i in layers
        for name, n in heads.items()
    }
    modules |= {f"model.layers.{i}.mlp.down_proj": (c.ff_dim, c.dim) for i in layers}
    return save_adapter(folder / f"adapter{seed}", modules, seed=seed, lora_alpha=400)


@pytest.fixture(scope="module")
def tiny(tiny_gguf: Path) -> Iterator[Serving]:
    with serving(tiny_gguf, "tiny", allow_adapter_loading=True) as running:
        yield running


@pytest.fixture
def folders(tiny: Serving, tmp_path: Path) -> Iterator[list[Path]]:
    """Two adapters, not loaded; whatever the test loads is unloaded again."""
    yield [adapter(tmp_path, tiny.core, seed) for seed in (1, 2)]
    for name in tiny.core.adapters.names:
        assert unload(tiny, name).status_code == 200
    assert eventually(lambda: tiny.core.adapters.num_held == 0)


def load(running: Serving, name: str, path: Path) -> Any:
    return running.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})


def unload(running: Serving, name: str) -> Any:
    return running.post("/v1/unload_lora_adapter", {"lora_name": name})


async def _texts(url: str, models: list[str]) -> list[str]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:

        async def one(model: str) -> str:
            stream = await client.completions.create(
                model=model, prompt=PROMPT, max_tokens=24, temperature=0, stream=True
            )
            text = ""
            async for chunk in stream:
                assert chunk.model == model
                text += chunk.choices[0].text
            return text

        return await asyncio.gather(*(one(model) for model in models))


def test_two_adapters_and_the_model_at_once(tiny: Serving, folders: list[Path]) -> None:
    client = tiny.client()
    common: Any = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    before = client.completions.create(model="tiny", **common)
    for name, folder in zip(("one", "two"), folders, strict=True):
        response = load(tiny, name, folder)
        assert (response.status_code, name in response.text) == (200, True)
    models = ["tiny", "one", "two"]
    alone = [client.completions.create(model=name, **common) for name in models]
    texts = [answer.choices[0].text for answer in alone]
    assert len(set(texts)) == 3
    assert texts[0] == before.choices[0].text
    assert [answer.model for answer in alone] == models
    fingerprints = [answer.system_fingerprint for answer in alone]
    assert fingerprints[0] == before.system_fingerprint and len(set(fingerprints)) == 3
    assert asyncio.run(_texts(tiny.url, models * 5)) == texts * 5
    chat = client.chat.completions.create(
        model="two", messages=[{"role": "user", "content": "Hi"}], max_tokens=4
    )
    assert chat.model == "two"


def test_they_are_listed_with_their_parent(tiny: Serving, folders: list[Path]) -> None:
    client = tiny.client()
    assert load(tiny, "org/one", folders[0]).status_code == 200
    base, one = client.models.list().data
    assert (base.id, one.id, one.model_extra) == (
        "tiny",
        "org/one",
        {"max_context": tiny.core.max_context, "parent": "tiny", "status": "loaded"},
    )
    assert client.models.retrieve("org/one").id == "org/one"
    assert 'elinvar_adapters{model_name="tiny"} 1.0' in tiny.get_metrics()
    assert unload(tiny, "org/one").status_code == 200
    with pytest.raises(openai.NotFoundError) as info:
        client.completions.create(model="org/one", prompt="x")
    assert (info.value.code, info.value.param) == ("model_not_found", "model")
    assert 'elinvar_adapters{model_name="tiny"} 0.0' in tiny.get_metrics()


def test_unloaded_in_mid_stream(tiny: Serving, folders: list[Path]) -> None:
    """The answer that runs ends as it would have; nobody gets the adapter any more."""
    client = tiny.client()
    load(tiny, "one", folders[0])
    body: Any = {"model": "one", "prompt": PROMPT, "seed": 3, "max_tokens": 300}
    body["extra_body"] = {"ignore_eos": True}
    whole = client.completions.create(**body).choices[0].text
    with client.completions.create(**body, stream=True) as stream:
        text = next(iter(stream)).choices[0].text
        assert unload(tiny, "one").status_code == 200
        text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == whole
    assert load(tiny, "one", folders[1]).status_code == 200
    assert client.completions.create(**body).choices[0].text != whole


def test_errors(tiny: Serving, folders: list[Path]) -> None:
    def error(response: Any) -> tuple[int, str, str]:
        told = response.json()["error"]
        assert told["type"] == "invalid_request_error"
        return response.status_code, told["param"], told["code"]

    assert error(load(tiny, "tiny", folders[0])) == (400, "lora_name", "invalid_value")
    assert error(load(tiny, "", folders[0])) == (400, "lora_name", "invalid_value")
    assert error(load(tiny, "x", folders[0] / "no")) == (400, "lora_path", "invalid_value")
    assert error(load(tiny, "x", Path("a\0b"))) == (400, "lora_path", "invalid_value")
    assert load(tiny, "x", folders[0]).status_code == 200
    assert error(load(tiny, "x", folders[1])) == (400, "lora_name", "invalid_value")
    assert error(unload(tiny, "y")) == (404, "lora_name", "model_not_found")
    for body, param, code in (
        ({"lora_name": "x"}, "lora_path", "missing_required_parameter"),
        ({"lora_name": 1, "lora_path": "x"}, "lora_name", "invalid_type"),
        ({"lora_name": "x", "lora_path": "y", "a": 1}, "a", "unknown_parameter"),
    ):
        assert error(tiny.post("/v1/load_lora_adapter", body)) == (400, param, code)


def test_loading_must_be_allowed(tiny_gguf: Path, tmp_path: Path) -> None:
    with serving(tiny_gguf, "tiny") as running:
        folder = adapter(tmp_path, running.core, 1)
        assert load(running, "one", folder).json()["error"]["code"] == "unknown_url"
