"""Models that sleep, over a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from elinvar.server.tenants import of_key
from serving import Serving, serving
from test_server_models import ask, shelf

BODY = {"model": "tiny", "prompt": "Once", "max_tokens": 4, "seed": 1}


@pytest.fixture(scope="module")
def tiny(tiny_gguf: Path) -> Iterator[Serving]:
    with serving(tiny_gguf, "tiny") as running:
        yield running


def sleeping(running: Serving) -> bool:
    answer = httpx.get(f"{running.url}/is_sleeping").json()
    assert answer["models"] == {"tiny": answer["is_sleeping"]}
    return bool(answer["is_sleeping"])


def test_asleep_and_awake(tiny: Serving) -> None:
    before = tiny.post("/v1/completions", BODY).json()["choices"]
    assert not sleeping(tiny)
    assert tiny.post("/sleep?level=2").json()["is_sleeping"]
    assert sleeping(tiny)
    refused = tiny.post("/v1/completions", BODY)
    assert refused.status_code == 503
    assert refused.json()["error"]["message"].startswith("The model is asleep: wake it up")
    ready = httpx.get(f"{tiny.url}/ready")
    assert (ready.status_code, httpx.get(f"{tiny.url}/health").status_code) == (503, 200)
    assert "POST /wake_up" in ready.json()["error"]["message"]
    assert tiny.post("/tokenize", {"model": "tiny", "prompt": "Once"}).json()["count"]
    assert 'elinvar_asleep{model_name="tiny"} 1.0' in tiny.get_metrics()
    assert not tiny.post("/wake_up").json()["is_sleeping"]
    assert httpx.get(f"{tiny.url}/ready").status_code == 200
    assert 'elinvar_asleep{model_name="tiny"} 0.0' in tiny.get_metrics()
    assert tiny.post("/v1/completions", BODY).json()["choices"] == before


@pytest.mark.parametrize(
    ("query", "status", "param"),
    [("level=3", 400, "level"), ("mode=keep", 400, "mode"), ("model=x", 404, "model")],
)
def test_what_is_refused(tiny: Serving, query: str, status: int, param: str) -> None:
    answer = tiny.post(f"/sleep?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert not sleeping(tiny)


def test_requests_that_run_are_waited_for_or_ended(tiny: Serving) -> None:
    long = BODY | {"max_tokens": 1500, "ignore_eos": True, "stream": True}
    for mode, whole in (("abort", False), ("wait", True)):
        most = long | ({"max_tokens": 60} if whole else {})
        with httpx.stream("POST", f"{tiny.url}/v1/completions", json=most, timeout=30) as stream:
            lines = stream.iter_lines()
            next(lines)
            assert tiny.post(f"/sleep?mode={mode}").json()["is_sleeping"]
            assert ("data: [DONE]" in list(lines)) == whole
        tiny.post("/wake_up")


def test_one_of_several_models_sleeps(tiny_gguf: Path) -> None:
    """It makes room for others, which make room when it wakes up."""
    with shelf(tiny_gguf, "ab", 100) as (made, url):
        root = url.removesuffix("/v1")
        before = ask(url, "a").choices
        assert httpx.post(f"{root}/sleep?model=a").json()["models"] == {"a": True}
        assert ask(url, "b").choices == before
        found = httpx.get(f"{root}/is_sleeping").json()
        assert found == {"is_sleeping": False, "models": {"a": True, "b": False}}
        assert httpx.get(f"{root}/ready").status_code == 200
        assert httpx.post(f"{root}/wake_up?model=a").json()["models"] == {"a": False}
        assert [one.name for one in made.models.loaded] == ["a"]
        assert ask(url, "a").choices == before


def test_administrators_alone(tiny_gguf: Path) -> None:
    with serving(tiny_gguf, "tiny", tenants=of_key("boss")) as running:
        assert running.post("/sleep").status_code == 401
        answer = running.post("/sleep", headers={"Authorization": "Bearer boss"})
        assert answer.json()["is_sleeping"]
