"""/v1/batches through the official client: lines run, complaints, ends of all kinds, full disks."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Batch

from elinvar.server import batches as batch_routes
from elinvar.server import state as state_module
from elinvar.server.batch_results import result_line
from elinvar.server.file_store import Content
from elinvar.server.inside import Inside
from elinvar.server.store import Store
from serving import Serving, eventually, serving

COMPLETIONS = "/v1/completions"
BODY: dict[str, Any] = {"model": "tiny", "prompt": "Hello", "max_tokens": 4, "ignore_eos": True}
LONG = BODY | {"max_tokens": 400}


@pytest.fixture(scope="module")
def tiny(tiny_gguf: Path) -> Iterator[Serving]:
    with serving(tiny_gguf, "tiny") as running:
        yield running
        assert eventually(running.idle)


@pytest.fixture(scope="module")
def client(tiny: Serving) -> openai.OpenAI:
    return tiny.client()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    made = state_module.StateOptions
    monkeypatch.setattr(
        "elinvar.server.app.StateOptions", lambda *given: made(*given, retry_s=0.02)
    )


def line(name: str, body: dict[str, Any], url: str = COMPLETIONS, **more: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": url, "body": body} | more


def upload(client: openai.OpenAI, lines: Sequence[dict[str, Any] | str]) -> str:
    texts = [one if isinstance(one, str) else json.dumps(one) for one in lines]
    return client.files.create(file="\n".join(texts).encode(), purpose="batch").id


def create(client: openai.OpenAI, lines: Sequence[Any], endpoint: Any = COMPLETIONS) -> Batch:
    return client.batches.create(
        input_file_id=upload(client, lines), endpoint=endpoint, completion_window="24h"
    )


def ended(client: openai.OpenAI, batch: Batch, seconds: float = 60) -> Batch:
    over = ("completed", "failed", "expired", "cancelled")
    assert eventually(lambda: client.batches.retrieve(batch.id).status in over, seconds)
    return client.batches.retrieve(batch.id)


def results(client: openai.OpenAI, name: str | None) -> list[dict[str, Any]]:
    if name is None:
        return []
    return [json.loads(one) for one in client.files.content(name).text.splitlines()]


def test_answers_are_those_of_the_endpoint(client: openai.OpenAI) -> None:
    seeds = range(30)
    lines = [line(f"id-{seed}", BODY | {"seed": seed}) for seed in seeds]
    lines.insert(3, line("bad", BODY | {"temperature": -1}))
    done = ended(client, create(client, lines))
    assert (done.status, done.model, done.endpoint) == ("completed", "tiny", COMPLETIONS)
    counts = done.request_counts
    assert counts is not None and (counts.total, counts.completed, counts.failed) == (31, 30, 1)
    found = results(client, done.output_file_id)
    assert [one["custom_id"] for one in found] == [f"id-{seed}" for seed in seeds]
    assert len({one["id"] for one in found}) == 30
    for seed, one in zip(seeds, found, strict=True):
        assert one["error"] is None and one["response"]["status_code"] == 200
        answer = client.completions.create(
            model="tiny", prompt="Hello", max_tokens=4, seed=seed, extra_body={"ignore_eos": True}
        )
        assert one["response"]["body"]["choices"][0]["text"] == answer.choices[0].text
    (bad,) = results(client, done.error_file_id)
    assert (bad["custom_id"], bad["response"]["status_code"]) == ("bad", 400)
    assert bad["response"]["body"]["error"]["param"] == "temperature"
    assert done.usage is not None and done.usage.output_tokens == 120
    written = client.files.retrieve(done.output_file_id or "")
    assert written.purpose == "batch_output" and written.filename == f"{done.id}_output.jsonl"


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}),
        ("/v1/responses", {"input": "x", "max_output_tokens": 3}),
    ],
)
def test_other_endpoints(client: openai.OpenAI, endpoint: str, body: dict[str, Any]) -> None:
    body |= {"model": "tiny", "ignore_eos": True}
    done = ended(client, create(client, [line("a", body, endpoint)], endpoint))
    (one,) = results(client, done.output_file_id)
    assert one["response"]["status_code"] == 200
    assert done.usage is not None and done.usage.output_tokens == 3
    if endpoint == "/v1/responses":
        stored = client.responses.retrieve(one["response"]["body"]["id"])
        assert stored.usage is not None and stored.usage.output_tokens == 3


def test_complaints_are_numbered(client: openai.OpenAI) -> None:
    lines = [
        line("a", BODY),
        "{",
        "",
        line("a", BODY),
        line("b", BODY, "/v1/chat/completions"),
        line("c", BODY, method="GET"),
        line("d", BODY | {"model": "none"}),
        line("e", BODY | {"stream": True}),
        {"custom_id": "f", "method": "POST", "url": COMPLETIONS},
        line("", BODY),
        line("g", BODY, colour="red"),
        "[]",
    ]
    done = ended(client, create(client, lines))
    assert done.status == "failed" and done.failed_at and done.errors is not None
    said = [(one.line, one.code, one.param) for one in done.errors.data or ()]
    assert said == [
        (2, "invalid_json", None),
        (4, "duplicate_custom_id", "custom_id"),
        (5, "invalid_url", "url"),
        (6, "invalid_method", "method"),
        (7, "model_not_found", "body.model"),
        (8, "invalid_value", "body.stream"),
        (9, "missing_required_parameter", "body"),
        (10, "invalid_custom_id", "custom_id"),
        (11, "unknown_parameter", "colour"),
        (12, "invalid_type", None),
    ]
    empty = ended(client, create(client, [""]))
    assert empty.errors is not None and (empty.errors.data or ())[0].code == "empty_file"


def test_creation_is_checked(client: openai.OpenAI, tiny: Serving) -> None:
    name = upload(client, [line("a", BODY)])
    good = {"input_file_id": name, "endpoint": COMPLETIONS, "completion_window": "24h"}
    for fields, param, status in (
        ({"input_file_id": "file-none"}, "input_file_id", 404),
        ({"endpoint": "/v1/embeddings"}, "endpoint", 400),
        ({"completion_window": "1h"}, "completion_window", 400),
        ({"metadata": {"k" * 65: "v"}}, "metadata", 400),
        ({"output_expires_after": {"anchor": "x", "seconds": 1}}, "output_expires_after.anchor", 400),
        ({"colour": "red"}, "colour", 400),
    ):  # fmt: skip
        answer = tiny.post("/v1/batches", good | fields)
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["param"] == param
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_none")


def test_cancelling(client: openai.OpenAI, tiny: Serving) -> None:
    short = [line(f"short-{i}", BODY) for i in range(3)]
    batch = create(client, [*short, *(line(f"long-{i}", LONG) for i in range(200))])
    assert eventually(lambda: _completed(client, batch) >= 3)
    with pytest.raises(openai.ConflictError, match="reads this file"):
        client.files.delete(batch.input_file_id)
    assert client.batches.cancel(batch.id).status == "cancelling"
    done = ended(client, batch)
    assert done.status == "cancelled" and done.cancelled_at and done.cancelling_at
    good, bad = results(client, done.output_file_id), results(client, done.error_file_id)
    assert len(good) >= 3 and len(good) + len(bad) == 203
    assert {one["error"]["code"] for one in bad} == {"batch_cancelled"}
    assert eventually(tiny.idle)
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)
    client.files.delete(batch.input_file_id)


def test_a_result_is_one_line_for_everybody() -> None:
    text = "a\x85b\u2028c\u2029d\x0b\x0c\x1c\n\re\u00e9"
    line = result_line(text, {"body": text}, None)
    assert len(line.decode().splitlines()) == 1
    assert json.loads(line)["custom_id"] == json.loads(line)["response"]["body"] == text


def test_lines_that_wait_hold_up_nobody(
    tiny: Serving, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as may run at once, of somebody who is at his limit."""
    post = Inside.post

    async def limited(self: Inside, path: str, body: bytes, *of: str) -> Any:
        if b"limited" in body:
            return 429, b"{}", {"Retry-After": "60"}
        return await post(self, path, body, *of)

    monkeypatch.setattr(Inside, "post", limited)
    count = tiny.core.config.max_rows + 1
    lines = [line(f"{i}", BODY | {"user": "limited"}) for i in range(count)]
    waiting = create(client, lines)
    assert eventually(lambda: client.batches.retrieve(waiting.id).status == "in_progress")
    assert ended(client, create(client, [line("a", BODY)])).status == "completed"
    client.batches.cancel(waiting.id)
    assert ended(client, waiting).status == "cancelled"


def _completed(client: openai.OpenAI, batch: Batch) -> int:
    counts = client.batches.retrieve(batch.id).request_counts
    return 0 if counts is None else counts.completed


def test_a_batch_expires(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_routes, "WINDOW_S", 1)
    done = ended(client, create(client, [line(f"{i}", LONG) for i in range(500)]))
    assert done.status == "expired" and done.expired_at
    good, bad = results(client, done.output_file_id), results(client, done.error_file_id)
    assert bad and len(good) + len(bad) == 500
    assert {one["error"]["code"] for one in bad} == {"batch_expired"}


def test_lists_of_batches(client: openai.OpenAI) -> None:
    made = [create(client, [line("a", BODY)]).id for _ in range(3)]
    assert [one.id for one in client.batches.list(limit=2)][:3] == made[::-1]
    assert client.batches.list(limit=1, after=made[1]).data[0].id == made[0]


def test_others_go_first(tiny: Serving, client: openai.OpenAI) -> None:
    """Lines are of the service `batch`, and have a record under the batch's id."""
    batch = create(client, [line("a", BODY)])
    ended(client, batch)
    import httpx

    answer = httpx.get(f"{tiny.url}/v1/requests/{batch.id}-1/explain")
    (record,) = answer.json()["choices"]
    assert record["service"] == "batch"


def test_a_full_disk(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the database, then of the output files: what cannot be stored waits, and nothing is lost."""
    settle = Content._settle
    files_full = True

    def fail(self: Content) -> None:
        if files_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        settle(self)

    stores: list[Store] = []
    make = Store.__init__
    monkeypatch.setattr(
        Store, "__init__", lambda self, folder=None: (stores.append(self), make(self, folder))[0]
    )
    with serving(tiny_gguf, "tiny", state_dir=tmp_path) as running:
        client = running.client()
        batch = create(client, [line(f"{i}", BODY | {"n": 8}) for i in range(60)])
        monkeypatch.setattr(Content, "_settle", fail)
        _limit_pages(stores[0], 2)
        assert eventually(lambda: _refused(running))
        refused = running.post("/v1/responses", {"model": "tiny", "input": "x" * 500})
        assert refused.status_code == 507
        assert "disk is full" in refused.json()["error"]["message"]
        assert str(tmp_path) not in refused.text
        assert client.batches.retrieve(batch.id).status in ("validating", "in_progress")
        _limit_pages(stores[0], 2**30)
        assert eventually(lambda: client.batches.retrieve(batch.id).status == "finalizing", 60)
        assert eventually(lambda: not list((tmp_path / "files").glob("*.part")))
        files_full = False
        done = ended(client, batch)
        found = results(client, done.output_file_id)
        assert [one["custom_id"] for one in found] == [f"{i}" for i in range(60)]
        assert len(list((tmp_path / "files").iterdir())) == 2


def _limit_pages(store: Store, more: int) -> None:
    def task() -> None:
        db = store._db
        assert db is not None
        (pages,) = db.execute("PRAGMA page_count").fetchone()
        db.execute(f"PRAGMA max_page_count = {min(pages + more, 2**31)}")

    store._thread.submit(task).result()


def _refused(running: Serving) -> bool:
    body = {"model": "tiny", "input": "x" * 500, "max_output_tokens": 1}
    return running.post("/v1/responses", body).status_code == 507


def test_a_state_folder_comes_late(
    tiny_gguf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder that cannot be made is told when it is needed, to the client without its name."""
    (tmp_path / "file").write_text("")
    with serving(tiny_gguf, "tiny", state_dir=tmp_path / "file" / "state") as running:
        answer = running.post("/v1/responses", {"model": "tiny", "input": "x"})
        assert answer.status_code == 503 and str(tmp_path) not in answer.text
        assert "in its log" in answer.json()["error"]["message"] and "--state-dir" in caplog.text
