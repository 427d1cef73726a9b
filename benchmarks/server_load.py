"""The server under load: what it takes itself, what it holds, what it forgets (docs/design/036).

    .venv/bin/python benchmarks/server_load.py [overhead held equal soak aborts slow]
    .venv/bin/python benchmarks/server_load.py soak --requests 20000 --json

Each part has a server of its own, a process whose event loop has a thread to itself. `overhead` is the
CPU time of that thread, so other work on the machine changes it little; nothing here is wall-clock time.

overhead   CPU time of the server alone, a request and a streamed token
held       1,000 streams that wait or go slowly, while others are answered
equal      200 streams at once answer as each of them alone, to the bit
soak       20,000 requests of all kinds: what is kept afterwards
aborts     clients that leave at random times: what is left of them
slow       clients that do not read their streams
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKER = Path(__file__).parent / "workers" / "serve_watched.py"
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


CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


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
    async with server(options.model) as one:
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


PARTS: dict[str, Callable[[argparse.Namespace], Awaitable[JSON]]] = {"overhead": overhead}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
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
