"""The server under load: what it takes itself, what it holds, what it forgets (docs/design/036).

    .venv/bin/python benchmarks/server_load.py [overhead held equal soak aborts]
    .venv/bin/python benchmarks/server_load.py soak --requests 20000 --json

Each part has a server of its own, a process whose event loop has a thread to itself. `overhead` is the
CPU time of that thread; nothing here is wall-clock time. Other work on the machine still makes it more
(caches), so it wants an idle one.

overhead   CPU time of the server alone, a request and a streamed token
held       1,000 streams that wait or go slowly, while others are answered
equal      200 streams at once answer as each of them alone, to the bit
soak       20,000 requests of all kinds: what is kept afterwards
aborts     clients that leave at random times: what is left of them
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKER = Path(__file__).parent / "workers" / "serve_watched.py"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Why is the sky blue?"}]
JSON = dict[str, Any]


@dataclass
class Server:
    port: int
    process: asyncio.subprocess.Process

    async def look(self) -> JSON:
        """See serve_watched.picture."""
        self.process.send_signal(signal.SIGUSR1)
        assert self.process.stdout is not None
        found: JSON = json.loads(await self.process.stdout.readline())
        return found

    async def idle(self) -> JSON:
        """The picture when nothing runs any more."""
        while (found := await self.look())["rows"] or found["kept"]["live"]:
            await asyncio.sleep(0.05)
        return found


@asynccontextmanager
async def server(model: str, *options: str) -> AsyncIterator[Server]:
    command = [sys.executable, str(WORKER), model, *options]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, limit=2**20)
    assert process.stdout is not None
    try:
        yield Server(json.loads(await process.stdout.readline())["port"], process)
    finally:
        process.terminate()
        await process.wait()


class Client:
    """One connection that is kept. Little more than sockets: it shares the machine with the server."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def __aenter__(self) -> Client:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    def send(self, path: str, body: JSON | None = None) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        head = (
            f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nhost: x\r\n"
            f"accept: */*\r\nuser-agent: bench\r\ncontent-type: application/json\r\n"
            f"content-length: {len(data)}\r\n\r\n"
        )
        self.writer.write(head.encode() + data)

    async def receive(self) -> bytes:
        """The body; a stream's is as it was cut into chunks."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        if not head.startswith(b"http/1.1 200"):
            raise RuntimeError(head.decode())
        at = head.find(b"content-length: ")
        if at >= 0:
            return await self.reader.readexactly(int(head[at + 16 :].split(b"\r\n", 1)[0]))
        parts = []
        while size := int(await self.reader.readline(), 16):
            parts.append((await self.reader.readexactly(size + 2))[:-2])
        await self.reader.readline()
        return b"".join(parts)

    async def ask(self, path: str, body: JSON | None = None) -> bytes:
        self.send(path, body)
        return await self.receive()


def body_of(path: str, tokens: int, stream: bool, seed: int = 0) -> JSON:
    """Distinct by `seed`."""
    asked = {"prompt": "The sky is"} if path == COMPLETIONS else {"messages": MESSAGES}
    fixed = {"model": "model", "max_tokens": tokens, "ignore_eos": True, "seed": seed}
    return fixed | asked | {"stream": stream}


async def load(port: int, clients: int, bodies: Sequence[tuple[str, JSON | None]]) -> list[bytes]:
    """All requests, by so many clients at once; their answers in order."""
    answers: list[bytes] = [b""] * len(bodies)
    left = iter(enumerate(bodies))

    async def work() -> None:
        async with Client(port) as client:
            for i, (path, body) in left:
                answers[i] = await client.ask(path, body)

    await asyncio.gather(*(work() for _ in range(clients)))
    return answers


# ---- what it takes ------------------------------------------------------------------------------


async def overhead(options: argparse.Namespace) -> JSON:
    """Microseconds of the event loop's thread, by endpoint, kind and number of clients. A request has
    one token; a token is what a request of more tokens takes beyond that, by the token."""
    found: JSON = {}
    many, few, long = 400, 32, 129
    async with server(options.model, "--step-s", "0.01") as one:
        await load(one.port, 8, [("/health", None)] * 100)

        async def each(clients: int, bodies: Sequence[tuple[str, JSON | None]]) -> float:
            before = await one.idle()
            await load(one.port, clients, bodies)
            return 1e6 * ((await one.idle())["loop_s"] - before["loop_s"]) / len(bodies)

        found["health"] = {"request_us": await each(8, [("/health", None)] * many)}
        for path in (CHAT, COMPLETIONS):
            for stream in (False, True):
                for clients in (1, 32):
                    short = await each(clients, [(path, body_of(path, 1, stream))] * many)
                    whole = await each(clients, [(path, body_of(path, long, stream))] * few)
                    kind = "streamed" if stream else "whole"
                    token = (whole - short) / (long - 1)
                    found[f"{path} {kind}, {clients} clients"] = {
                        "request_us": short,
                        "token_us": token,
                    }
    return found


# ---- what it holds, and what it forgets ----------------------------------------------------------


async def held(options: argparse.Namespace) -> JSON:
    """1,000 streams of which 8 at a time run and the others wait, all of them answered in the end;
    meanwhile 200 other requests are answered, of which none waits for them."""
    async with (
        server(options.model, "--rows", "8", "--step-s", "0.005") as one,
        AsyncExitStack() as open_,
    ):
        idle = await one.idle()
        streams = [await open_.enter_async_context(Client(one.port)) for _ in range(1000)]
        for i, client in enumerate(streams):
            client.send(COMPLETIONS, body_of(COMPLETIONS, 16, True, i))
        others = [("/health", None), ("/tokenize", {"model": "model", "prompt": "x"})]
        await load(one.port, 4, others * 100)
        while_held = await one.look()
        answers = await asyncio.gather(*(client.receive() for client in streams))
        whole = sum(answer.endswith(b"data: [DONE]\n\n") for answer in answers)
        return {
            "streams": whole,
            "still waiting when the others were answered": while_held["kept"]["live"],
            "bytes a stream": (while_held["rss"] - idle["rss"]) // 1000,
        }


async def equal(options: argparse.Namespace) -> JSON:
    """Of 200 streams at once, how many are what each of them is alone: texts, log-probs, seeds."""
    asked = {"temperature": 1.0, "logprobs": 3}
    bodies = [(COMPLETIONS, body_of(COMPLETIONS, 8 + i % 25, True, i) | asked) for i in range(200)]
    async with server(options.model) as one:
        together = await load(one.port, 200, bodies)
        alone = await load(one.port, 1, bodies)
    same = sum(told(a) == told(b) for a, b in zip(together, alone, strict=True))
    return {"streams": len(bodies), "equal": same}


def told(stream: bytes) -> JSON:
    """Of its one choice, all chunks together: they are cut as drafts happened to be accepted."""
    whole: JSON = {"text": "", "logprobs": {}, "finish_reason": None}
    events = [line[6:] for line in stream.split(b"\n") if line.startswith(b"data: {")]
    for choice in (one for event in events for one in json.loads(event)["choices"]):
        whole["text"] += choice["text"]
        whole["finish_reason"] = choice["finish_reason"] or whole["finish_reason"]
        for name, values in (choice.get("logprobs") or {}).items():
            whole["logprobs"].setdefault(name, []).extend(values)
    return whole


async def soak(options: argparse.Namespace) -> JSON:
    """What the server keeps, after a tenth of the requests, of which there must be 2,000 for all
    records to be full, and at the end."""
    messages = {"model": "model", "messages": MESSAGES, "max_tokens": 4}
    bodies: list[tuple[str, JSON | None]] = [
        *(
            (path, body_of(path, 4, stream))
            for path in (CHAT, COMPLETIONS)
            for stream in (False, True)
        ),
        ("/v1/messages", messages),
        ("/v1/messages", messages | {"stream": True}),
        ("/v1/responses", {"model": "model", "input": "x", "max_output_tokens": 4, "store": False}),
        ("/tokenize", {"model": "model", "prompt": "x"}),
    ]
    pictures: JSON = {}
    early = max(2000, options.requests // 10)
    async with server(options.model, "--no-prefix-cache", "--tracemalloc") as one:
        for name, count in ("early", early), ("late", options.requests - early):
            asked = [bodies[i % len(bodies)] for i in range(count)]
            await load(one.port, 16, asked)
            pictures[name] = await one.idle()
    early, late = pictures["early"], pictures["late"]
    kinds = {kind: late["kinds"][kind] - early["kinds"].get(kind, 0) for kind in late["kinds"]}
    return {
        "requests": options.requests,
        **{name: [early[name], late[name]] for name in ("rss", "traced", "objects", "fds", "kept")},
        "more": {kind: more for kind, more in kinds.items() if more > 50},
    }


async def aborts(options: argparse.Namespace) -> JSON:
    """1,000 clients, of which each leaves after so many bytes as it likes."""
    rng = random.Random(6)
    async with server(options.model, "--no-prefix-cache") as one:
        await load(one.port, 8, [(COMPLETIONS, body_of(COMPLETIONS, 4, True))] * 1000)
        before = await one.idle()

        async def leave(i: int) -> None:
            async with Client(one.port) as client:
                client.send(COMPLETIONS, body_of(COMPLETIONS, 40, True, i))
                left = rng.choice([0, 0, 200, 2_000, 8_000])
                while left > 0 and (got := await client.reader.read(left)):
                    left -= len(got)

        for first in range(0, 1000, 50):
            await asyncio.gather(*map(leave, range(first, first + 50)))
        after = await one.idle()
    names = "rows", "kv_usage", "tasks", "fds", "objects", "kept"
    return {name: [before[name], after[name]] for name in names}


PARTS: dict[str, Callable[[argparse.Namespace], Awaitable[JSON]]] = {
    "overhead": overhead,
    "held": held,
    "equal": equal,
    "soak": soak,
    "aborts": aborts,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=20_000, help="of the soak")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for part in options.parts or PARTS:
        found = asyncio.run(PARTS[part](options))
        if options.json:
            print(json.dumps({part: found}), flush=True)
        else:
            print(part)
            for name, value in found.items():
                print(f"  {name}: {value}", flush=True)


if __name__ == "__main__":
    main()
