"""Several models in one server: loaded when asked for, dropped when memory is needed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from elinvar.base.config import EngineConfig
from elinvar.base.errors import ModelError
from elinvar.engine.aio import AsyncEngine
from elinvar.engine.core import Engine
from elinvar.server import models as models_module
from elinvar.server.app import Settings, create_models_app
from elinvar.server.errors import ApiError
from elinvar.server.models import Entry, Models
from elinvar.server.served import Served
from elinvar.server.tenants import Tenants
from serving import TEMPLATE, eventually, running

CONFIG = EngineConfig(kv_memory=16 * 2**20, num_threads=1)


class Shelf:
    """Models of one file under several names, each of which is said to take 100 bytes."""

    def __init__(self, path: Path, names: str, max_bytes: int | None = None) -> None:
        self.loads: list[str] = []
        self.broken: set[str] = set()
        entries = [Entry(name, self._loader(path, name), 100) for name in names]
        aliases = {"other-name": names[-1]}
        self.models = Models(entries, aliases=aliases, max_bytes=max_bytes)

    def _loader(self, path: Path, name: str) -> Any:
        def load() -> Served:
            if name in self.broken:
                raise ModelError("The file is gone.")
            self.loads.append(name)
            core = Engine.load(str(path), CONFIG)
            core.tokenizer.use_chat_template(TEMPLATE)
            return Served.of(name, AsyncEngine(core), 100)

        async def loader() -> Served:
            return await asyncio.to_thread(load)

        return loader


@contextmanager
def shelf(path: Path, names: str, max_bytes: int | None = None, **settings: Any) -> Iterator[Any]:
    made = Shelf(path, names, max_bytes)
    with running(create_models_app(made.models, Settings(**settings))) as (port, _):
        yield made, f"http://127.0.0.1:{port}/v1"


def ask(url: str, model: str, key: str = "x", **fields: Any) -> Any:
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
    body: dict[str, Any] = {"prompt": "Once", "max_tokens": 4, "seed": 1} | fields
    return client.completions.create(model=model, **body)


def status(url: str) -> dict[str, str]:
    data = httpx.get(f"{url}/models").json()["data"]
    return {one["id"]: one["status"] for one in data}


def test_loaded_when_asked_for(tiny_gguf: Path) -> None:
    with shelf(tiny_gguf, "ab") as (made, url):
        assert status(url) == {"a": "loaded", "b": "unloaded", "other-name": "unloaded"}
        texts = {ask(url, name).choices[0].text for name in ("b", "a", "default", "other-name")}
        assert len(texts) == 1
        assert made.loads == ["a", "b"]
        assert status(url) == {"a": "loaded", "b": "loaded", "other-name": "loaded"}
        with pytest.raises(openai.NotFoundError, match="'a', 'b', 'other-name'"):
            ask(url, "c")


def test_the_one_used_longest_ago_makes_room(tiny_gguf: Path) -> None:
    with shelf(tiny_gguf, "abc", 200) as (made, url):
        for name in "abacab":
            ask(url, name)
        assert made.loads == ["a", "b", "c", "b"]
        assert sorted(one.name for one in made.models.loaded) == ["a", "b"]


def test_who_is_used_stays(tiny_gguf: Path) -> None:
    """The request for another model waits until the first one's answer has ended."""
    with shelf(tiny_gguf, "ab", 100) as (made, url):
        stream = ask(url, "a", stream=True, max_tokens=1500, extra_body={"ignore_eos": True})
        count = sum(1 for _ in zip(stream, range(5), strict=False))
        assert count == 5
        answers: list[Any] = []

        async def both() -> None:
            asked = asyncio.to_thread(ask, url, "b")
            task = asyncio.create_task(asked)
            while not made.models._entries["b"].users:
                await asyncio.sleep(0.01)
            assert made.loads == ["a"]
            await asyncio.to_thread(stream.close)
            answers.append(await task)

        asyncio.run(both())
        assert answers and made.loads == ["a", "b"]


def test_a_model_that_cannot_be_loaded(tiny_gguf: Path) -> None:
    """Says so, and the others go on; when it can be, it is."""
    with shelf(tiny_gguf, "ab") as (made, url):
        made.broken.add("b")
        with pytest.raises(
            openai.InternalServerError, match="'b' cannot be loaded: The file is gone"
        ):
            ask(url, "b")
        assert ask(url, "a").choices
        made.broken.clear()
        assert ask(url, "b").choices
        assert all(not entry.users for entry in made.models._entries.values())


def test_nothing_is_loaded(tiny_gguf: Path) -> None:
    """The only one made room, and the other cannot be loaded."""
    with shelf(tiny_gguf, "ab", 100) as (made, url):
        made.broken.add("b")
        with pytest.raises(openai.InternalServerError):
            ask(url, "b")
        assert not made.models.loaded
        for method in ("GET", "DELETE"):
            answer = httpx.request(method, f"{url}/sessions/x")
            assert answer.status_code == 404
            assert answer.json()["error"]["code"] == "session_not_found"
        assert httpx.get(f"{url}/sessions").json()["data"] == []


async def _never() -> Any:
    raise AssertionError


def test_who_gives_up_does_not_hand_on_the_memory() -> None:
    """A load that nobody waits for any more goes on in its thread: others load after it."""

    async def check() -> None:
        began, go_on = asyncio.Event(), asyncio.Event()
        ended: list[str] = []

        async def slow() -> Any:
            began.set()
            await go_on.wait()
            ended.append("a")
            raise ModelError("It does not matter.")

        async def fast() -> Any:
            ended.append("b")
            raise ModelError("It does not matter.")

        models = Models([Entry("a", slow, 100), Entry("b", fast, 100)], max_bytes=100)
        first = asyncio.create_task(models.use({}, "a"))
        await began.wait()
        second = asyncio.create_task(models.use({}, "b"))
        first.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert ended == []
        go_on.set()
        found = await asyncio.gather(first, second, return_exceptions=True)
        assert isinstance(found[0], asyncio.CancelledError) and isinstance(found[1], ApiError)
        assert ended == ["a", "b"]
        assert not any(entry.users for entry in models._entries.values())

    asyncio.run(check())


def test_patience_is_one_for_all_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not begin anew for each of those in a row."""
    monkeypatch.setattr(models_module, "_PATIENCE_S", 0.2)

    async def check() -> None:
        busy: Any = Entry("a", _never, 100)
        busy.served = SimpleNamespace(core=SimpleNamespace(is_asleep=False))
        busy.users = 1
        models = Models([busy, Entry("b", _never, 100)], max_bytes=100)
        asked = [models.use({}, "b") for _ in range(200)]
        async with asyncio.timeout(20):
            found = await asyncio.gather(*asked, return_exceptions=True)
        assert {one.status for one in found if isinstance(one, ApiError)} == {429}
        assert len(found) == 200

    asyncio.run(check())


def test_sessions_are_their_models(tiny_gguf: Path) -> None:
    with shelf(tiny_gguf, "ab") as (_, url):
        for name in "ab":
            ask(url, name, extra_body={"session_id": f"of-{name}"})
        httpx.post(f"{url}/sessions", json={"id": "made", "model": "b"}).raise_for_status()
        listed = [one["id"] for one in httpx.get(f"{url}/sessions").json()["data"]]
        assert sorted(listed) == ["made", "of-a", "of-b"]
        assert httpx.get(f"{url}/sessions/of-b").json()["turns"] == 1
        assert httpx.delete(f"{url}/sessions/of-b").status_code == 200
        assert httpx.get(f"{url}/sessions/of-b").status_code == 404


def test_models_that_a_tenant_may_ask_for(tiny_gguf: Path) -> None:
    from elinvar.base.limits import TenantLimits
    from elinvar.server.tenants import hash_key

    def key(name: str) -> bytes:
        return bytes.fromhex(hash_key(name))

    limits = {"ann": TenantLimits(), "bob": TenantLimits()}
    keys = ((key("sk-ann"), "ann"), (key("sk-bob"), "bob"))
    tenants = Tenants(limits, keys, {"bob": frozenset({"b"})})
    with shelf(tiny_gguf, "ab", tenants=tenants) as (made, url):
        bob = openai.OpenAI(base_url=url, api_key="sk-bob", max_retries=0)
        assert [one.id for one in bob.models.list()] == ["b"]
        with pytest.raises(openai.NotFoundError, match="this server has 'b'"):
            ask(url, "a", "sk-bob")
        seen = [
            [one["name"] for one in httpx.get(live, headers=headers).json()["models"]]
            for live in [url.replace("/v1", "/live?history=1")]
            for headers in ({"Authorization": f"Bearer sk-{who}"} for who in ("ann", "bob"))
        ]
        assert seen == [["a"], []]
        assert ask(url, "b", "sk-bob").choices and ask(url, "a", "sk-ann").choices
        assert eventually(lambda: all(not one.users for one in made.models._entries.values()))
