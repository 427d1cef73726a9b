"""Calls that schemathesis makes up from the OpenAPI document, against a real server: none may fail.

`make fuzz` runs 20,000 of them; test_server_openapi.py a few.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import content_type_conformance

from elinvar.engine.aio import AsyncEngine
from elinvar.engine.chat import ChatTemplate
from elinvar.engine.core import Engine
from elinvar.engine.tokenizer import Tokenizer
from elinvar.server.app import create_app
from engines import ByteTokenizer, tiny_engine
from serving import TEMPLATE, running

NAME = "tiny"
NEEDED = "model", "messages", "prompt", "input", "max_tokens"


class ChatTokenizer(ByteTokenizer):
    """What a server asks of one beside."""

    chat_template: Any = ChatTemplate(TEMPLATE, {})
    whole_tokens: Mapping[str, int] = {}

    def encode_chat(self, text: str) -> list[int]:
        return self.encode(text)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        return self.text_bytes(ids, None if skip_special else ()).decode("utf-8", "replace")

    def control_id(self, token: str) -> int | None:
        return None

    def token_bytes(self, token: int) -> bytes:
        return self.text_bytes([token])

    def token_text(self, token: int) -> str:
        return self.decode([token])


def chat_engine(max_context: int = 96) -> Engine:
    engine = tiny_engine(max_context=max_context, num_blocks=64)
    engine.tokenizer = cast(Tokenizer, ChatTokenizer())
    return engine


@contextmanager
def tiny_server(max_context: int = 96) -> Iterator[str]:
    """The URL of a server whose model has random weights and a short context."""
    app = create_app(AsyncEngine(chat_engine(max_context)), NAME, allow_adapter_loading=True)
    with running(app) as (port, _):
        yield f"http://127.0.0.1:{port}"


def fuzz(url: str, calls: int) -> Counter[int]:
    """How many answers there were of each status. Raises AssertionError with the request for a 5xx, and
    for an answer that is not of a media type that the document names."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    found = [result.ok() for result in schema.get_all_operations()]
    statuses: Counter[int] = Counter()
    session = requests.Session()
    each = -(-calls // sum(1 for operation in found if operation.body))
    for operation in found:
        modes = [GenerationMode.POSITIVE]
        if operation.body:  # otherwise nothing could be wrong
            modes.append(GenerationMode.NEGATIVE)
        for mode in modes:
            strategy = operation.as_strategy(generation_mode=mode)
            _ask(strategy, session, url, max(1, each // 2), statuses)
    return statuses


def _ask(
    strategy: st.SearchStrategy[Any],
    session: requests.Session,
    url: str,
    count: int,
    statuses: Counter[int],
) -> None:
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy, st.randoms(use_true_random=False))
    def ask(case: Any, rng: random.Random) -> None:
        _aim(case.body, rng)
        answer = case.call(session=session, timeout=60)
        if case.path == "/sleep":
            assert session.post(f"{url}/wake_up").ok
        statuses[answer.status_code] += 1
        assert answer.status_code < 500, (case.as_curl_command(), answer.text)
        case.validate_response(answer, checks=[content_type_conformance])
        assert answer.status_code == 200 or "error" in answer.json()

    ask()


def _aim(body: Any, rng: random.Random) -> None:
    """Most made-up bodies end at a name that no model has, a field that is not served, or a limit that
    none has room for: a part of them shall go further."""
    if not isinstance(body, dict):
        return
    if rng.random() < 0.7:
        for name in [one for one in body if one not in NEEDED and rng.random() < 0.8]:
            del body[name]
    if "model" in body and rng.random() < 0.9:
        body["model"] = NAME
    for name in ("max_tokens", "max_completion_tokens", "n"):
        if name in body and rng.random() < 0.8:
            body[name] = rng.randint(1, 4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=20_000)
    with tiny_server() as url:
        statuses = fuzz(url, parser.parse_args().calls)
    print(f"{statuses.total()} calls:", dict(sorted(statuses.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
