"""What is stored of responses: conversations, bounds, and folders that cannot be used."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from elinvar.base.errors import ElinvarError
from elinvar.server.errors import ApiError
from elinvar.server.responses_state import Kept, Responses
from elinvar.server.store import Store, state_root


def response(name: str, previous: str | None = None, text: str = "x", **more: Any) -> Kept:
    call = {"type": "message", "role": "assistant", "status": "completed"}
    output = [{"id": f"out_{name}", **call, "content": [{"type": "output_text", "text": text}]}]
    result = {"id": name, "status": "completed", "previous_response_id": previous}
    result |= {"created_at": 0, "output": output} | more
    given = {"id": f"in_{name}", "type": "message", "role": "user", "content": []}
    return Kept("me", result, [given])


def with_responses(check: Callable[[Responses, Store], Awaitable[None]], **bounds: Any) -> None:
    async def run() -> None:
        store = Store()
        try:
            await check(Responses(store, **bounds), store)
        finally:
            await store.close()

    asyncio.run(run())


def ids(items: list[dict[str, Any]]) -> list[str]:
    return [item["id"] for item in items]


async def gone(attempt: Awaitable[Any]) -> ApiError:
    with pytest.raises(ApiError) as info:
        await attempt
    return info.value


def test_conversations_branch() -> None:
    async def check(responses: Responses, store: Store) -> None:
        for name, previous in (("a", None), ("b", "a"), ("c", "b"), ("d", "a")):
            await responses.save(response(name, previous))
        said, _ = await responses.before("me", "c", ())
        assert ids(said) == ["in_a", "out_a", "in_b", "out_b", "in_c", "out_c"]
        said, _ = await responses.before("me", "d", ())
        assert ids(said) == ["in_a", "out_a", "in_d", "out_d"]
        assert ids(await responses.inputs("me", "d")) == ["in_a", "out_a", "in_d"]
        assert (await gone(responses.before("you", "c", ()))).param == "previous_response_id"
        await responses.delete("me", "a")
        error = await gone(responses.before("me", "c", ()))
        assert error.status == 400 and "'a'" in error.message
        reference = [{"type": "item_reference", "id": "out_b"}]
        assert ids((await responses.before("me", None, reference))[1]) == ["out_b"]

    with_responses(check)


def test_what_has_not_ended_or_was_cut() -> None:
    async def check(responses: Responses, store: Store) -> None:
        await responses.save(response("a", status="in_progress"))
        assert (await gone(responses.before("me", "a", ()))).code == "response_not_ended"
        await responses.save(response("a"))
        cut = response("b", "a")
        half = {"type": "function_call", "status": "incomplete", "arguments": '{"a":'}
        cut.result["output"] = [{"id": "half", **half}]
        await responses.save(cut)
        said, _ = await responses.before("me", "b", ())
        assert ids(said) == ["in_a", "out_a", "in_b"]

    with_responses(check)


def test_a_tenant_has_so_much() -> None:
    """The conversation that was used longest ago goes, and as a whole."""

    async def check(responses: Responses, store: Store) -> None:
        text = "x" * 1000
        for name in ("old", "new"):
            await responses.save(response(f"{name}_0", None, text))
            for i in range(4):
                await responses.save(response(f"{name}_{i + 1}", f"{name}_{i}", text))
        await responses.before("me", "old_4", ())
        for i in range(8):
            await responses.save(response(f"more_{i}", None, text))
        said, _ = await responses.before("me", "old_4", ())
        assert len(said) == 10
        await gone(responses.before("me", "new_4", ()))
        other = response("other", None, text)
        other.tenant = "you"
        await responses.save(other)
        for i in range(40):
            await responses.save(response(f"still_{i}", None, text))
        assert await responses.get("you", "other")
        size = await store.run(_size)
        assert size["me"] <= 40_000

    with_responses(check, max_tenant_bytes=40_000)


def _size(db: sqlite3.Connection) -> dict[str, int]:
    return dict(db.execute("SELECT tenant, SUM(bytes) FROM responses GROUP BY tenant").fetchall())


def test_what_is_held_is_known() -> None:
    """Whatever is saved, saved again and deleted."""

    async def check(responses: Responses, store: Store) -> None:
        dice = random.Random(3)
        for _ in range(200):
            name = f"r{dice.randrange(8)}"
            if dice.random() < 0.3:
                try:
                    await responses.delete("me", name)
                except ApiError as error:
                    assert error.status == 404
            else:
                await responses.save(response(name, None, "x" * dice.randrange(5000)))
            held = responses._held.get("me")
            assert held is None or held == (await store.run(_size)).get("me", 0)

    with_responses(check, max_tenant_bytes=20_000)


def test_old_ones_go(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(responses: Responses, store: Store) -> None:
        await responses.save(response("a"))
        await responses.save(response("runs", status="queued"))
        now = time.time()
        monkeypatch.setattr("elinvar.server.responses_state.time.time", lambda: now + 90_000)
        await responses.save(response("b"))
        await gone(responses.get("me", "a"))
        assert await responses.get("me", "runs") and await responses.get("me", "b")

    with_responses(check, max_age_s=86_400)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    first = Store(tmp_path)
    asyncio.run(first.run(lambda db: None))
    with pytest.raises(ElinvarError, match="in use by another server"):
        Store(tmp_path)
    asyncio.run(first.close())
    asyncio.run(Store(tmp_path).close())
    (tmp_path / "state.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(ElinvarError, match="cannot be used"):
        Store(tmp_path)
    (tmp_path / "state.db").unlink()
    with sqlite3.connect(tmp_path / "state.db") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(ElinvarError, match="newer Elinvar"):
        Store(tmp_path)


def test_where_state_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_root() == tmp_path / "elinvar"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert state_root() == Path("/home/somebody/.local/state/elinvar")
