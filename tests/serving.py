"""A real server for tests: uvicorn on a loopback socket, in a thread of this process."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn
from starlette.applications import Starlette

from elinvar.base.config import EngineConfig
from elinvar.engine.aio import AsyncEngine
from elinvar.engine.core import Engine
from elinvar.server.app import create_app
from elinvar.server.process import Process, listen, uvicorn_config

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""For models without a chat template."""


@dataclass(frozen=True)
class Serving:
    port: int
    core: Engine
    server: uvicorn.Server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        if body is not None:
            options["json"] = body
        return httpx.post(self.url + path, timeout=30, **options)

    def get_metrics(self) -> str:
        return httpx.get(self.url + "/metrics", timeout=30).text

    def idle(self) -> bool:
        """Whether the engine holds no request and no block."""
        scheduler = self.core.scheduler
        return scheduler.num_running + scheduler.num_waiting == 0 and scheduler.kv_usage == 0


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


@contextmanager
def serving(
    path: Path, name: str, config: EngineConfig | None = None, grace: int = 5, **options: Any
) -> Iterator[Serving]:
    """Serve the model at `path` as `name`; `options` go to create_app."""
    core = Engine.load(str(path), config or EngineConfig(kv_memory=64 * 2**20, num_threads=2))
    if core.tokenizer.chat_template is None:
        core.tokenizer.use_chat_template(TEMPLATE)
    with running(create_app(AsyncEngine(core), name, **options), grace) as (port, server):
        yield Serving(port, core, server)


@contextmanager
def running(app: Starlette, grace: int = 5) -> Iterator[tuple[int, uvicorn.Server]]:
    """The port, and the server."""
    listener = listen("127.0.0.1", 0)
    server = Process(uvicorn_config(app, grace_seconds=grace), app.state.leave)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert eventually(lambda: server.started or not thread.is_alive())
        yield listener.getsockname()[1], server
    finally:
        server.handle_exit(signal.SIGTERM, None)
        thread.join(60)
        listener.close()
