"""Whom `bench serve` asks: an engine in this process, or a server that speaks OpenAI's API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from elinvar.base.errors import ElinvarError, InputError
from elinvar.base.sampling import SamplingParams
from elinvar.cli.bench.latency import Record, RequestError
from elinvar.cli.bench.talk import is_messages
from elinvar.cli.bench.workload import Content

if TYPE_CHECKING:
    from elinvar.engine.core import Engine


class Client(Protocol):
    vocab_size: int

    async def start(self) -> None: ...

    async def ask(self, content: Content, output_tokens: int, record: Record) -> str:
        """Sends a request, notes in `record` when tokens came, and returns their text. Raises
        RequestError where it was refused or broke off."""
        ...

    async def stop(self) -> None: ...


class EngineClient:
    def __init__(self, engine: Engine) -> None:
        from elinvar.engine.aio import AsyncEngine

        self.vocab_size = engine.tokenizer.vocab_size
        self._core, self._engine = engine, AsyncEngine(engine)

    async def start(self) -> None:
        self._engine.start()

    async def ask(self, content: Content, output_tokens: int, record: Record) -> str:
        ids = self._ids(content)
        record.prompt_tokens = len(ids)
        params = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True)
        parts = []
        try:
            async for delta in self._engine.generate(ids, params):
                if delta.finish_reason == "error":
                    raise RequestError("engine", f"A step of the engine failed: {delta.error}")
                if delta.token_ids:
                    record.came(len(delta.token_ids))
                    parts.append(delta.text)
        except InputError as error:
            raise RequestError("refused", str(error)) from error
        return "".join(parts)

    def _ids(self, content: Content) -> list[int]:
        if isinstance(content, str):
            return self._core.tokenizer.encode(content)
        given: list[Any] = content
        return self._core.encode_chat(given) if is_messages(content) else given

    async def stop(self) -> None:
        await self._engine.shutdown(timeout=0)


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    """What is read of an event; the rest is skipped unread."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class HttpClient:
    """Streams /chat/completions for messages, else /completions: there prompts may be token ids, so
    that their lengths are what was asked for."""

    vocab_size = 1 << 31

    def __init__(
        self, url: str, model: str, api_key: str | None, more: dict[str, Any] | None = None
    ) -> None:
        """more: fields that all requests have besides."""
        try:
            import httpx
        except ModuleNotFoundError:
            raise ElinvarError(
                "--url needs the package httpx; install it with 'pip install elinvar[bench]'."
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
        self._url, self._model, self._more = url, model, more or {}
        self._decode = msgspec.json.Decoder(_Event).decode

    async def start(self) -> None:
        pass

    async def ask(self, content: Content, output_tokens: int, record: Record) -> str:
        chat = is_messages(content)
        body = {
            "model": self._model,
            "messages" if chat else "prompt": content,
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._more,
        }
        path, parts, rest = "chat/completions" if chat else "completions", list[str](), b""
        try:
            async with self._http.stream("POST", path, json=body) as response:
                if response.status_code != 200:
                    raise _refusal(response.status_code, await response.aread())
                async for data in response.aiter_bytes():
                    *lines, rest = (rest + data).split(b"\n")
                    for event in _events(lines):
                        parts.append(self._take(event, record))
        except self._errors as error:
            why = str(error) or type(error).__name__
            kind = "broke off" if record.times else "no connection"
            raise RequestError(kind, f"{self._url} does not answer: {why}.") from error
        except msgspec.MsgspecError as error:
            raise RequestError(
                "no stream", f"{self._url} sends what is no event: {error}."
            ) from None
        return "".join(parts)

    def _take(self, data: bytes, record: Record) -> str:
        event = self._decode(data)
        if event.error is not None:
            raise RequestError("gave up", f"The server gave up: {event.error}")
        text = "".join(_text(choice) for choice in event.choices)
        if text:
            record.came(1)
        if event.usage:  # what one event held may have been several tokens, or half of one
            record.tokens = event.usage.completion_tokens
            record.prompt_tokens = event.usage.prompt_tokens
        return text

    async def stop(self) -> None:
        await self._http.aclose()


def _text(choice: _Choice) -> str:
    if choice.delta is None:
        return choice.text or ""
    return (choice.delta.reasoning_content or "") + (choice.delta.content or "")


def _events(lines: list[bytes]) -> Iterator[bytes]:
    for line in lines:
        data = line.removeprefix(b"data:").strip()
        if line.startswith(b"data:") and data != b"[DONE]":
            yield data


def _refusal(status: int, body: bytes) -> RequestError:
    try:
        error = json.loads(body)["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        text = body[:200].decode(errors="replace").strip()
    return RequestError(f"HTTP {status}", f"The server answers {status}: {text}")
