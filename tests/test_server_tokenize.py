"""/tokenize, /detokenize and /version over a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elinvar import __version__
from serving import Serving, serving

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def tiny(tiny_gguf: Path) -> Iterator[Serving]:
    with serving(tiny_gguf, "tiny") as running:
        yield running


def tokens(tiny: Serving, **body: Any) -> Any:
    answer = tiny.post("/tokenize", body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_prompt_is_what_a_completion_counts(tiny: Serving) -> None:
    found = tokens(tiny, model="tiny", prompt="Hello there", return_token_strs=True)
    tokenizer = tiny.core.tokenizer
    assert found["tokens"] == tokenizer.encode("Hello there")
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == tiny.core.max_context
    assert "".join(found["token_strs"]).endswith("Hello there")
    bare = tokens(tiny, prompt="Hello there", add_special_tokens=False)
    assert bare["tokens"] == tokenizer.encode("Hello there", add_special=False)
    assert bare["token_strs"] is None
    body = {"model": "tiny", "prompt": "Hello there", "max_tokens": 1}
    usage = tiny.post("/v1/completions", body).json()["usage"]
    assert usage["prompt_tokens"] == found["count"]


def test_a_chat_is_what_a_chat_completion_counts(tiny: Serving) -> None:
    found = tokens(tiny, messages=HELLO)
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 1}
    usage = tiny.post("/v1/chat/completions", body).json()["usage"]
    assert usage["prompt_tokens"] == found["count"]
    bare = tokens(tiny, messages=HELLO, add_generation_prompt=False)
    assert bare["count"] < found["count"]
    going_on = [*HELLO, {"role": "assistant", "content": "Well"}]
    open_ = tokens(
        tiny, messages=going_on, continue_final_message=True, add_generation_prompt=False
    )
    text = tiny.post("/detokenize", {"tokens": open_["tokens"]}).json()["prompt"]
    assert text.endswith("<assistant>Well")


@settings(max_examples=25)
@given(st.text(max_size=30).filter(lambda text: "\x00" not in text))
def test_there_and_back(tiny: Serving, text: str) -> None:
    found = tokens(tiny, prompt=text, add_special_tokens=False)["tokens"]
    back = tiny.post("/detokenize", {"tokens": found}).json()["prompt"]
    assert back.strip() == text.strip()


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("tokenize", {}, "prompt"),
        ("tokenize", {"prompt": "x", "messages": HELLO}, "prompt"),
        ("tokenize", {"prompt": "x", "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ("tokenize", {"prompt": "x", "chat_template": "y"}, "chat_template"),
        ("tokenize", {"messages": HELLO, "add_special_tokens": True}, "add_special_tokens"),
        ("tokenize", {"messages": HELLO, "continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
        ("tokenize", {"messages": []}, "messages"),
        ("tokenize", {"prompt": 3}, "prompt"),
        ("detokenize", {"tokens": [10**9]}, "tokens[0]"),
        ("detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("detokenize", {"tokens": "x"}, "tokens"),
    ],
)  # fmt: skip
def test_refusals(tiny: Serving, path: str, body: dict[str, Any], param: str) -> None:
    answer = tiny.post(f"/{path}", body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
    assert tiny.post(f"/{path}", body | {"model": "other"}).status_code in (400, 404)


def test_version(tiny: Serving) -> None:
    assert httpx.get(f"{tiny.url}/version").json() == {"version": __version__}
