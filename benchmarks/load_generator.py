"""What the load generator itself takes: `elinvar bench serve` against a server that answers at once.

    python benchmarks/load_generator.py [--requests 2000] [--tokens 32] [--concurrency 64]

The server is a stand-in in a process of its own, which sends events that were made before. Prints the CPU
time of the client per request and per token, from two runs of different answers' lengths; one over the
first is about how many requests a second one client can drive.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

EVENT = b'data: {"id":"c","object":"text_completion","choices":[{"index":0,"text":" x"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":%d,"completion_tokens":%d}}\n\n'
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            body = json.loads(await reader.readexactly(length))
            writer.write(HEAD)
            for _ in range(body["max_tokens"]):
                writer.write(b"%x\r\n%b\r\n" % (len(EVENT), EVENT))
                await asyncio.sleep(0)  # an event a packet, as from a server that computes
            last = USAGE % (len(body["prompt"]), body["max_tokens"]) + b"data: [DONE]\n\n"
            writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(last), last))
    except asyncio.IncompleteReadError:
        writer.close()


def _serve(tell: Connection) -> None:
    async def main() -> None:
        server = await asyncio.start_server(_answer, "127.0.0.1", 0, backlog=4096)
        tell.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


def _cpu_s(port: int, requests: int, tokens: int, concurrency: int) -> float:
    command = [str(Path(sys.executable).with_name("elinvar")), "bench", "serve", "m", "--json"]
    command += ["--url", f"http://127.0.0.1:{port}/v1", "-n", str(requests), "-c", str(concurrency)]
    command += ["--prompt-tokens", "64", "--output-tokens", str(tokens)]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert found["completed"] == requests, found
    return float(found["client_cpu_s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=64)
    given = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.Process(target=_serve, args=(theirs,), daemon=True)
    server.start()
    port, count = ours.recv(), given.requests
    short = _cpu_s(port, count, 1, given.concurrency)
    long = _cpu_s(port, count, 1 + given.tokens, given.concurrency)
    per_token = (long - short) / (count * given.tokens)
    found = {
        "cpu_ms_per_request": round(1e3 * short / count, 3),
        "cpu_us_per_token": round(1e6 * per_token, 1),
        "requests_per_s": round(count / short),
        "concurrency": given.concurrency,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
