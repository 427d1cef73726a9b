"""Whom an online benchmark asks: an engine in this process, or a server that speaks OpenAI's API."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Protocol

from elinvar.base.errors import ElinvarError, EngineError
from elinvar.base.sampling import SamplingParams

if TYPE_CHECKING:
    from elinvar.cli.bench.latency import Record
    from elinvar.engine.core import Engine


class Client(Protocol):
    vocab_size: int

    async def start(self) -> None: ...

    async def ask(self, ids: list[int], output_tokens: int, record: Record) -> None:
        """Sends a request and notes in `record` when tokens came. Raises ElinvarError where it was
        refused or broke off."""
        ...

    async def stop(self) -> None: ...


class EngineClient:
    def __init__(self, engine: Engine) -> None:
        from elinvar.engine.aio import AsyncEngine

        self.vocab_size = engine.tokenizer.vocab_size
        self._engine = AsyncEngine(engine)

    async def start(self) -> None:
        self._engine.start()

    async def ask(self, ids: list[int], output_tokens: int, record: Record) -> None:
        params = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True)
        async for delta in self._engine.generate(ids, params):
            if delta.finish_reason == "error":
                raise EngineError(f"A step of the engine failed: {delta.error}")
            if delta.token_ids:
                record.came(len(delta.token_ids))

    async def stop(self) -> None:
        await self._engine.shutdown(timeout=0)


class HttpClient:
    """Streams /completions: prompts are token ids, so that their lengths are what was asked for."""

    vocab_size = 1 << 31

    def __init__(
        self, url: str, model: str, api_key: str | None, priority: int | None = None
    ) -> None:
        try:
            import httpx
        except ModuleNotFoundError:
            raise ElinvarError(
                "--url needs the package httpx; install it with 'pip install httpx'."
            ) from None
        self._errors = httpx.HTTPError
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            self._http = httpx.AsyncClient(
                base_url=url.rstrip("/") + "/",
                headers=headers,
                timeout=httpx.Timeout(None, connect=10),
                limits=httpx.Limits(max_connections=None),
            )
        except httpx.InvalidURL as error:
            raise ElinvarError(f"{url} is not an address: {error}.") from None
        self._url, self._model = url, model
        self._more = {} if priority is None else {"priority": priority}

    async def start(self) -> None:
        pass

    async def ask(self, ids: list[int], output_tokens: int, record: Record) -> None:
        body = {
            "model": self._model,
            "prompt": ids,
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._more,
        }
        try:
            async with self._http.stream("POST", "completions", json=body) as response:
                if response.status_code != 200:
                    raise ElinvarError(_refusal(response.status_code, await response.aread()))
                async for line in response.aiter_lines():
                    if line.startswith("data:") and line != "data: [DONE]":
                        self._take(json.loads(line[5:]), record)
        except (self._errors, ValueError) as error:
            why = str(error) or type(error).__name__
            raise ElinvarError(f"{self._url} does not answer: {why}.") from error

    def _take(self, event: dict[str, Any], record: Record) -> None:
        if "error" in event:
            raise ElinvarError(f"The server gave up: {event['error']}")
        if any(choice.get("text") for choice in event.get("choices", ())):
            record.came(1)
        if event.get("usage"):  # what one event held may have been several tokens, or half of one
            record.tokens = event["usage"]["completion_tokens"]

    async def stop(self) -> None:
        await self._http.aclose()


def _refusal(status: int, body: bytes) -> str:
    try:
        error = json.loads(body)["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        text = body[:200].decode(errors="replace").strip()
    return f"The server answers {status}: {text}"
