"""`elinvar serve`: the HTTP server over one model."""

from __future__ import annotations

import socket
from typing import Annotated

import typer

from elinvar.base.errors import ElinvarError
from elinvar.cli import options as opt
from elinvar.cli.terminal import note

D = opt.DEFAULTS


def serve(
    model: opt.ModelArgument,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    served_model_name: Annotated[
        str | None,
        typer.Option(help="Name clients ask for (default: MODEL).", show_default=False),
    ] = None,
    max_rows: Annotated[int, typer.Option(min=1, help="Requests running at once.")] = 256,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Requests waiting before new ones get 429.")
    ] = 1024,
    threads: opt.Threads = None,
    kv_dtype: opt.KVDtypeOption = "f16",
    kv_memory: opt.KVMemory = None,
    max_context: opt.MaxContext = None,
    weight_format: opt.WeightFormat = "auto",
    chat_template: opt.ChatTemplateFile = None,
    verbose: opt.Verbose = False,
) -> None:
    """Serve a model over HTTP as OpenAI's API does."""
    config = opt.engine_config(
        threads=threads,
        kv_memory=kv_memory,
        kv_dtype=kv_dtype,
        max_context=max_context,
        weight_format=weight_format,
        max_rows=max_rows,
    )
    import uvicorn

    from elinvar.cli.load import load
    from elinvar.engine.aio import AsyncEngine
    from elinvar.server.app import create_app, listen, uvicorn_config

    # Before the model is loaded: a port that is taken is told at once.
    try:
        listener = listen(host, port)
    except OSError as error:
        raise ElinvarError(
            f"Cannot listen on {host}:{port}: {error.strerror}; choose another --host or --port."
        ) from None
    name = served_model_name or model
    engine = load(model, config, chat_template).engine
    app = create_app(AsyncEngine(engine), name, max_waiting=max_waiting)
    shown_host = f"[{host}]" if ":" in host else host
    address = f"http://{shown_host}:{listener.getsockname()[1]}/v1"

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                note(f"Elinvar serves {name} at {address} (Ctrl-C stops it).")

    Server(uvicorn_config(app)).run(sockets=[listener])
