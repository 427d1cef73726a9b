"""What every worker shares: a worker is one peer, loaded once, that measures itself on request.

It runs under the peer's own interpreter, where Elinvar is not installed, so it imports nothing but
the peer and this file (standard library alone). `WORKER MODEL --threads N --text T` loads the model,
continues the text by one token and says so in one JSON line on stdout; then each JSON line on stdin is a job, answered
by one JSON line (done twice the first time it is asked for: the first is a warm-up):

    -> {"ready": {"version": "0.18.0", "settings": "...", "text": " Spain"}}
    <- {"job": "decode", "batch": 16, "prompt": 128, "tokens": 128}   (or "prefill", "tokens": 512)
    -> {"rate": 361.2, "rss": 1528000000}

End of input ends it. An error is {"error": "one sentence"} and ends it, too.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO

PR_SET_PDEATHSIG = 1
VOCABULARY = 30_000
"""Prompts stay below this id: every model measured here has more."""


class Peer(Protocol):
    """What a worker script defines: an engine with a model in it."""

    version: str
    settings: str

    def continue_text(self, text: str) -> str:
        """One token more, as text: what ends the start."""

    def steps(self, prompts: list[list[int]], tokens: int) -> Iterator[None]:
        """Greedy decoding of equally long prompts at once: yields when every row has its first
        token, then after each further step of all rows, `tokens` tokens a row in all."""


def serve(load: Callable[[Path, int], Peer]) -> None:
    """The whole life of a worker process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--text", required=True)
    args = parser.parse_args()
    # Stopped by a signal, it would never see that the runner is gone: it goes with it.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # Libraries print to stdout as they like: the protocol keeps the real one for itself.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        peer = load(args.model, args.threads)
        text = peer.continue_text(args.text)
        reply(replies, ready={"version": peer.version, "settings": peer.settings, "text": text})
        warm: set[str] = set()
        for line in sys.stdin:
            if line not in warm:  # new shapes may mean new graphs, buffers, pages
                measure(peer, json.loads(line))
                warm.add(line)
            reply(replies, rate=measure(peer, json.loads(line)), rss=peak_memory())
    except Exception as error:  # whatever a peer raises is told to the runner, in its words
        reply(replies, error=f"{type(error).__name__}: {str(error).strip()[-400:]}")
        sys.exit(1)
    # Some engines abort in their destructors at exit.
    os._exit(0)


def measure(peer: Peer, job: dict[str, Any]) -> float:
    """Tokens/s over all rows."""
    if job["job"] == "prefill":
        start = time.perf_counter()
        drain(peer.steps([prompt(0, job["tokens"])], 1))
        return job["tokens"] / (time.perf_counter() - start)
    rows = [prompt(row, job["prompt"]) for row in range(job["batch"])]
    steps = peer.steps(rows, job["tokens"] + 1)
    next(steps)  # the prompts and the first token of every row: not decode
    start = time.perf_counter()
    count = sum(1 for _ in steps)
    return count * job["batch"] / (time.perf_counter() - start)


def prompt(row: int, length: int) -> list[int]:
    """Token ids spread over the vocabulary, other ones for each row, as `elinvar bench` has them."""
    return [(7919 * (i + 131 * row) + 17) % VOCABULARY for i in range(length)]


def drain(steps: Iterator[None]) -> None:
    for _ in steps:
        pass


def peak_memory() -> int:
    """Bytes resident at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reply(stream: TextIO, **fields: Any) -> None:
    stream.write(json.dumps(fields) + "\n")
