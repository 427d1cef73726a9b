"""/v1/embeddings through the official client and /v1/rerank, over tiny random models."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import openai
import pytest

from elinvar import Embedder
from elinvar.base.errors import EngineError, InputError
from elinvar.base.limits import TenantLimits
from elinvar.engine.text_aio import AsyncTextModel
from elinvar.engine.text_model import Task, TextModel, is_text_model
from elinvar.run.texts import Text
from elinvar.server.app import create_text_app
from elinvar.server.logs import RequestLog
from elinvar.server.tenants import Tenants, hash_key
from processes import assert_fails, run
from serving import eventually, running

pytest.importorskip("torch")
pytest.importorskip("transformers")

from text_models import TEXTS, save_model, save_recipe

FINE = [text.encode("utf-8", "replace").decode() for text in TEXTS]


@pytest.fixture(scope="module")
def url(bert: Path) -> Iterator[str]:
    model = AsyncTextModel(TextModel.load(bert))
    with running(create_text_app(model, "tiny", matryoshka=True)) as (port, _):
        yield f"http://127.0.0.1:{port}"
    assert model.num_live == 0


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


def post(url: str, path: str, **body: Any) -> httpx.Response:
    return httpx.post(url + path, json={"model": "tiny"} | body, timeout=30)


def test_texts_and_token_ids(client: openai.OpenAI, bert: Path) -> None:
    expected = Embedder(bert).embed(FINE)
    for encoding in ("float", "base64"):
        answer = client.embeddings.create(model="tiny", input=FINE, encoding_format=encoding)  # type: ignore[call-overload]
        found = [one.embedding for one in answer.data]
        if encoding == "base64":
            import base64

            found = [np.frombuffer(base64.b64decode(raw), "<f4") for raw in found]
        assert np.array_equal(np.float32(found), expected)
        assert [one.index for one in answer.data] == list(range(len(FINE)))
    plain = client.embeddings.create(model="tiny", input=FINE[0], user="me")
    assert np.array_equal(np.float32(plain.data[0].embedding), expected[0])
    task = TextModel.load(bert).embedding(FINE)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == task.num_tokens
    assert answer.usage.model_extra == {"num_truncated": task.num_truncated}
    ids = [list(text.ids) for text in task.texts[:4]]
    answer = client.embeddings.create(model="tiny", input=ids)
    assert np.array_equal(np.float32([one.embedding for one in answer.data]), expected[:4])
    answer = client.embeddings.create(model="tiny", input=ids[3])
    assert np.array_equal(np.float32(answer.data[0].embedding), expected[3])


def test_dimensions_and_prompts(client: openai.OpenAI, bert: Path) -> None:
    answer = client.embeddings.create(
        model="tiny", input="x", dimensions=8, extra_body={"prompt_name": "query"}
    )
    expected = Embedder(bert).embed(["x"], dimensions=8, prompt_name="query")
    assert np.array_equal(np.float32(answer.data[0].embedding), expected[0])


def test_many_at_once(client: openai.OpenAI, bert: Path) -> None:
    """Requests share batches; every answer has the bits it has alone."""
    expected = Embedder(bert).embed(FINE)

    def ask(i: int) -> bool:
        some = [(i + k) % len(FINE) for k in range(i % 7 + 1)]
        answer = client.embeddings.create(model="tiny", input=[FINE[k] for k in some])
        found = np.float32([one.embedding for one in answer.data])
        return np.array_equal(found, expected[some])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(40)))


def test_the_log_tells_of_texts(bert: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="elinvar.server.logs")
    app = create_text_app(AsyncTextModel(TextModel.load(bert)), "tiny", tellers=(RequestLog(),))
    with running(app) as (port, _):
        usage = post(f"http://127.0.0.1:{port}", "/v1/embeddings", input=FINE[:3]).json()["usage"]
    (fields,) = (vars(r)["fields"] for r in caplog.records if "fields" in vars(r))
    assert (fields["model"], fields["route"]) == ("tiny", "embeddings")
    assert fields["prompt_tokens"] == usage["prompt_tokens"] and FINE[0] not in caplog.text


def test_models_and_health(client: openai.OpenAI, url: str) -> None:
    assert [model.id for model in client.models.list().data] == ["tiny"]
    assert client.models.retrieve("tiny").model_extra == {"max_context": 50}
    assert httpx.get(f"{url}/health").status_code == 200
    assert 'route="embeddings",status="200"' in httpx.get(f"{url}/metrics").text
    unknown = post(url, "/v1/chat/completions").json()["error"]
    assert unknown["code"] == "unknown_url"
    assert "this server has /v1/models, /v1/embeddings, /v1/rerank" in unknown["message"]


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("embeddings", {"input": []}, 400, "input must hold from 1 to 2048"),
        ("embeddings", {"input": ["x"] * 2049}, 400, "got 2049"),
        ("embeddings", {"input": ["x", 3]}, 400, "not both"),
        ("embeddings", {"input": 3}, 400, "input"),
        ("embeddings", {"input": [[10**6]]}, 400, "Token ids of text 0"),
        ("embeddings", {"input": "x", "dimensions": 49}, 400, "from 1 to 48"),
        ("embeddings", {"input": "x", "encoding_format": "hex"}, 400, "encoding_format"),
        ("embeddings", {"input": "x " * 99, "truncate": False}, 400, "Text 0 is longer"),
        ("embeddings", {"input": "x", "prompt_name": "y"}, 400, "no prompt 'y'"),
        ("embeddings", {"input": "x", "inputs": "y"}, 400, "Did you mean input?"),
        ("embeddings", {"input": "x", "model": "other"}, 404, "does not exist"),
        ("embeddings", {}, 400, "Missing required parameter: 'input'"),
        ("rerank", {"query": "q", "documents": []}, 400, "documents must hold"),
        ("rerank", {"query": "q", "documents": ["x"], "top_n": 0}, 400, "top_n"),
        ("rerank", {"documents": ["x"]}, 400, "'query'"),
        ("rerank", {"query": "q", "documents": ["x"], "rank_fields": ["a"]}, 400, "rank_fields"),
        ("score", {"text_1": "x", "text_2": []}, 400, "text_2 must hold"),
        ("score", {"text_1": ["x", "y"], "text_2": "z"}, 400, "as many as text_2"),
        ("score", {"text_1": "x"}, 400, "'text_2'"),
        ("score", {"text_1": "x", "text_2": 3}, 400, "text_2"),
    ],
)
def test_bad_requests(url: str, path: str, body: dict[str, Any], status: int, words: str) -> None:
    answer = post(url, f"/v1/{path}", **body)
    assert answer.status_code == status and words in answer.json()["error"]["message"]


def test_rerank(url: str, bert: Path, reranker: Path) -> None:
    documents = ["a metal", "a watch", "no answer"]

    def check(url: str, folder: Path) -> None:
        given: list[Any] = [documents[0], {"text": documents[1]}, documents[2]]
        answer = post(url, "/v1/rerank", query="what?", documents=given, top_n=2).json()
        expected = Embedder(folder).rank("what?", documents, top_n=2)
        assert [
            (r["index"], r["relevance_score"], r["document"]["text"]) for r in answer["results"]
        ] == [(r.index, r.score, documents[r.index]) for r in expected]
        assert answer["usage"]["total_tokens"] > 0
        whole = post(url, "/v1/rerank", query="what?", documents=documents, return_documents=False)
        assert all(set(r) == {"index", "relevance_score"} for r in whole.json()["results"])

    check(url, bert)
    with running(create_text_app(AsyncTextModel(TextModel.load(reranker)), "tiny")) as (port, _):
        other = f"http://127.0.0.1:{port}"
        check(other, reranker)
        refused = post(other, "/v1/embeddings", input="x")
        assert refused.status_code == 400 and "is a reranker" in refused.text
        shorter = post(other, "/v1/embeddings", input="x", dimensions=3)
        assert shorter.json()["error"]["code"] == "unsupported_parameter"


def test_versions_of_rerank(url: str) -> None:
    """The second of Cohere's leaves documents out; the others have them unless told."""
    answers = [
        post(url, path, query="what?", documents=["a", "b"]).json()
        for path in ("/v1/rerank", "/rerank", "/v2/rerank")
    ]
    results = [
        [(one["index"], one["relevance_score"]) for one in answer["results"]] for answer in answers
    ]
    assert results[0] == results[1] == results[2]
    assert ["document" in answer["results"][0] for answer in answers] == [True, True, False]


def test_scores(url: str, bert: Path, reranker: Path) -> None:
    texts = ["a metal", "a watch", "no answer"]

    def check(url: str, folder: Path) -> None:
        expected = {one.index: one.score for one in Embedder(folder).rank("what?", texts)}
        answer = post(url, "/v1/score", text_1="what?", text_2=texts).json()
        assert [one["index"] for one in answer["data"]] == [0, 1, 2]
        assert [one["score"] for one in answer["data"]] == [expected[i] for i in range(3)]
        assert answer["usage"]["prompt_tokens"] > 0 and answer["object"] == "list"
        pairs = post(url, "/score", text_1=["what?"] * 3, text_2=texts).json()
        assert pairs["data"] == answer["data"]
        alone = post(url, "/score", text_1="what?", text_2=texts[1]).json()
        assert [one["score"] for one in alone["data"]] == [expected[1]]

    check(url, bert)
    with running(create_text_app(AsyncTextModel(TextModel.load(reranker)), "tiny")) as (port, _):
        check(f"http://127.0.0.1:{port}", reranker)


def test_batches_of_embeddings(client: openai.OpenAI) -> None:
    lines = [
        {"custom_id": f"{i}", "method": "POST", "url": "/v1/embeddings", "body": {"model": "tiny", "input": text}}
        for i, text in enumerate(FINE[:5])
    ]  # fmt: skip
    source = client.files.create(file="\n".join(map(json.dumps, lines)).encode(), purpose="batch")
    batch = client.batches.create(
        input_file_id=source.id, endpoint="/v1/embeddings", completion_window="24h"
    )
    assert eventually(lambda: client.batches.retrieve(batch.id).status == "completed")
    done = client.batches.retrieve(batch.id)
    assert done.output_file_id is not None and done.usage is not None
    found = [json.loads(one) for one in client.files.content(done.output_file_id).iter_lines()]
    plain = client.embeddings.create(model="tiny", input=FINE[:5], encoding_format="float")
    for one, expected in zip(found, plain.data, strict=True):
        assert one["response"]["body"]["data"][0]["embedding"] == expected.embedding
    assert done.usage.input_tokens == plain.usage.prompt_tokens


class Slow:
    """A model of which every batch takes a while, and that knows what came together."""

    batch_blocks = 64

    def __init__(self) -> None:
        self.batches: list[int] = []

    def run(self, texts: Any) -> Any:
        import time

        time.sleep(0.02)
        self.batches.append(len(texts))
        if any(text.ids[0] == 13 for text in texts):
            raise ValueError("thirteen")
        return np.float32([[text.ids[0]] for text in texts])

    def task(self, *ids: int) -> Task:
        return Task([Text([i] * 40) for i in ids], self.run, lambda rows: rows[:, 0])


def test_tasks_take_turns_and_fail_alone() -> None:
    async def check() -> None:
        slow = Slow()
        engine = AsyncTextModel(cast("TextModel", slow))
        with pytest.raises(EngineError, match="not running"):
            await engine.run(slow.task(1))
        engine.start()
        long = asyncio.create_task(engine.run(slow.task(*range(100, 400))))
        await asyncio.sleep(0.01)
        short = [asyncio.create_task(engine.run(slow.task(i))) for i in range(5)]
        assert [float((await one)[0]) for one in short] == [0, 1, 2, 3, 4]
        assert not long.done() and max(slow.batches) <= 32
        assert (await long).tolist() == list(range(100, 400))
        with pytest.raises(EngineError, match="thirteen"):
            await engine.run(slow.task(1, 13))
        assert (await engine.run(slow.task(2))).tolist() == [2]
        gone = asyncio.create_task(engine.run(slow.task(*range(100, 400))))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert engine.num_live == 0 and not engine._jobs
        waiting = asyncio.create_task(engine.run(slow.task(*range(100, 1000))))
        await asyncio.sleep(0.01)
        await engine.shutdown(0.05)
        with pytest.raises(EngineError, match="ended this request"):
            await waiting
        with pytest.raises(EngineError, match="shutting down"):
            await engine.run(slow.task(1))

    asyncio.run(check())


def test_a_closed_loop_does_not_stop_the_others() -> None:
    slow = Slow()
    engine = AsyncTextModel(cast("TextModel", slow))
    engine.start()

    async def leave() -> None:
        waiting = asyncio.create_task(engine.run(slow.task(1)))
        await asyncio.sleep(0.01)  # until it is computed
        waiting.cancel()

    async def stay() -> Any:
        return await asyncio.wait_for(engine.run(slow.task(2)), 10)

    asyncio.run(leave())
    assert asyncio.run(stay()).tolist() == [2]
    asyncio.run(engine.shutdown())


def test_a_task_without_texts_is_refused() -> None:
    async def check() -> None:
        slow = Slow()
        engine = AsyncTextModel(cast("TextModel", slow))
        engine.start()
        with pytest.raises(InputError, match="at least one text"):
            await engine.run(slow.task())
        assert (await asyncio.wait_for(engine.run(slow.task(2)), 10)).tolist() == [2]
        await engine.shutdown()

    asyncio.run(check())


def test_a_client_that_leaves_ends_its_work(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text_model, computed = TextModel.load(bert), list[int]()
    begun, left = threading.Event(), threading.Event()
    vectors = text_model.vectors

    def once_it_left(texts: Any) -> Any:
        begun.set()
        left.wait(20)
        computed.append(len(texts))
        return vectors(texts)

    monkeypatch.setattr(text_model, "vectors", once_it_left)
    model = AsyncTextModel(text_model)
    body = json.dumps({"model": "tiny", "input": ["long " * 60] * 500}).encode()
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with running(create_text_app(model, "tiny")) as (port, _):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(head.encode() + body)
            assert eventually(lambda: model.num_live == 500)
            # Not before a part of it is being computed: else nothing of it ever is.
            assert begun.wait(20)
        assert eventually(lambda: model.num_live == 0)
        left.set()
        assert post(f"http://127.0.0.1:{port}", "/v1/embeddings", input="x").status_code == 200
    assert len(computed) == 2 and computed[0] < 500


def test_too_many_texts_wait(bert: Path) -> None:
    model = AsyncTextModel(TextModel.load(bert))
    with running(create_text_app(model, "tiny", max_waiting=4)) as (port, _):
        model.num_live = 3
        answer = post(f"http://127.0.0.1:{port}", "/v1/embeddings", input=["x", "y"])
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        model.num_live = 0
        assert (
            post(f"http://127.0.0.1:{port}", "/v1/embeddings", input=["x"] * 9).status_code == 200
        )


def test_which_models_serve_texts(bert: Path, reranker: Path, tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3", "Qwen3Model")
    assert is_text_model(bert) and is_text_model(reranker) and not is_text_model(tmp_path)
    save_recipe(tmp_path, {"pooling_mode": "lasttoken"})
    assert is_text_model(tmp_path)
    assert_fails(run("serve", bert, "--host", "300.0.0.1"), 1, "Cannot listen")
    lines, keys = tmp_path / "warm.jsonl", tmp_path / "tenants.toml"
    lines.write_text('{"prompt": "x"}\n')
    keys.write_text("[tenants.default]\n")
    for flags in (
        ["--adapter", "x=y"],
        ["--allow-adapter-loading"],
        ["--warm", lines],
        ["--tenants", keys],
        ["--trace-requests", tmp_path / "trace.jsonl"],
        ["--policy", "fair"],
    ):
        done = run("serve", bert, "--port", "0", *flags)
        assert_fails(done, 2, "makes vectors", f"leave {flags[0]} out")


def test_whose_model_it_is_not(bert: Path) -> None:
    """Who may not ask for the model does not see it, and batches of theirs say so at once."""
    keys = tuple((bytes.fromhex(hash_key(name)), name) for name in ("ann", "eve"))
    limits = {"ann": TenantLimits(), "eve": TenantLimits()}
    tenants = Tenants(limits, keys, {"eve": frozenset({"other"})})
    model = AsyncTextModel(TextModel.load(bert))
    line: dict[str, Any] = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings"}
    line |= {"body": {"model": "tiny", "input": "x"}}
    with running(create_text_app(model, "tiny", tenants=tenants)) as (port, _):
        url = f"http://127.0.0.1:{port}"
        for name, seen in {"ann": ["tiny"], "eve": []}.items():
            client = openai.OpenAI(base_url=f"{url}/v1", api_key=name, max_retries=0)
            assert [one.id for one in client.models.list()] == seen
            headers = {"Authorization": f"Bearer {name}"}
            tags = httpx.get(f"{url}/api/tags", headers=headers).json()["models"]
            assert [one["name"] for one in tags] == seen
            source = client.files.create(file=json.dumps(line).encode(), purpose="batch")
            batch = client.batches.create(
                input_file_id=source.id, endpoint="/v1/embeddings", completion_window="24h"
            ).id
            over = "completed" if seen else "failed"
            assert eventually(lambda: client.batches.retrieve(batch).status == over)  # noqa: B023
