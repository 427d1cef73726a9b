"""`elinvar serve`: the HTTP server over one model."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import click

from elinvar.base.config import EngineConfig
from elinvar.base.errors import ElinvarError
from elinvar.cli import options as opt
from elinvar.cli.command import command, option
from elinvar.cli.terminal import note
from elinvar.cli.warm import read_warm_prompts
from elinvar.cli.warm import warm as fill

_CACHE = "Prefix cache"
_TRACES = "Traces"


@command
@opt.model
@option("--host", default="127.0.0.1", help="Address to listen on.")
@option(
    "--port",
    type=opt.Whole(0, 65535),
    metavar="N",
    default=8000,
    help="0 takes a free one.",
)
@option("--served-model-name", help="Name clients ask for (default: MODEL).")
@opt.max_rows
@option(
    "--max-waiting",
    type=opt.Whole(min=0),
    metavar="N",
    default=1024,
    help="Requests waiting before new ones get 429.",
)
@option(
    "--texts",
    is_flag=True,
    help="Serve vectors and scores of texts, though the model's files do not say that it makes them.",
)
@option(
    "--matryoshka",
    is_flag=True,
    help="Let clients shorten vectors, though config.json does not say that the model can.",
)
@opt.serving
@option(
    "--warm",
    type=opt.FILE_THAT_IS_THERE,
    metavar="FILE",
    help='JSONL of "prompt", "messages" or "prompt_ids", computed into the prefix cache before the '
    "server listens.",
    section=_CACHE,
)
@opt.scheduling
@option(
    "--tenants",
    type=opt.FILE_THAT_IS_THERE,
    metavar="FILE",
    help="TOML or JSON: API keys, and what each tenant may take ('elinvar key' makes keys).",
    section=opt.SHARING,
)
@option(
    "--trace-requests",
    type=opt.FILE,
    metavar="FILE",
    help="Append a line of JSON for each request that ends: where its time went, no texts.",
    section=_TRACES,
)
@option("--trace-events", is_flag=True, help="Lines list each change of state.", section=_TRACES)
@opt.adapters
@option(
    "--allow-adapter-loading",
    is_flag=True,
    help="Clients may load adapters from this machine's folders, and unload them.",
    section="LoRA adapters",
)
@opt.verbose
def serve(
    model: str,
    host: str,
    port: int,
    served_model_name: str | None,
    max_waiting: int,
    chat_template: Path | None,
    texts: bool,
    matryoshka: bool,
    adapters: list[tuple[str, str]],
    allow_adapter_loading: bool,
    warm: Path | None,
    tenants: Path | None,
    trace_requests: Path | None,
    trace_events: bool,
    **flags: Any,
) -> None:
    """Serve a model over HTTP as OpenAI's API does.

    Embedding models and rerankers answer /v1/embeddings or /v1/rerank, others chats and completions."""
    if trace_events and trace_requests is None:
        raise click.BadParameter("--trace-events needs --trace-requests FILE")
    from elinvar.server.tenants import NOBODY, read_tenants

    known = NOBODY if tenants is None else read_tenants(tenants)
    config = opt.engine_config(
        flags, tenants=known.limits, interactive=opt.interactive_target(flags)
    )
    warm_prompts = [] if warm is None else read_warm_prompts(warm)
    name = served_model_name or model
    if name in dict(adapters):
        raise click.BadParameter(f"{name!r} is the model's own name.", param_hint="--adapter")
    import uvicorn

    from elinvar.cli.load import load, load_embedder, pulled
    from elinvar.engine.aio import AsyncEngine
    from elinvar.engine.text_aio import AsyncTextModel
    from elinvar.engine.text_model import is_text_model
    from elinvar.server.app import create_app, create_text_app, listen, uvicorn_config
    from elinvar.server.trace import TraceFile

    # Before the model is loaded: a port that is taken is told at once.
    try:
        listener = listen(host, port)
    except OSError as error:
        raise ElinvarError(
            f"Cannot listen on {host}:{port}: {error.strerror}; choose another --host or --port."
        ) from None
    of_texts = texts or is_text_model(pulled(model))
    generating: dict[str, Any] = {"--adapter": adapters, "--chat-template": chat_template}
    generating |= {"--allow-adapter-loading": allow_adapter_loading, "--warm": warm}
    generating |= {"--tenants": tenants, "--trace-requests": trace_requests}
    generating |= {"--policy": config.policy != EngineConfig().policy}
    _refuse_idle(of_texts, generating if of_texts else {"--matryoshka": matryoshka})
    if of_texts:
        text_model = load_embedder(model, config).model
        app = create_text_app(
            AsyncTextModel(text_model), name, max_waiting=max_waiting, matryoshka=matryoshka
        )
    else:
        # Before the model is loaded: a file that cannot be written is told at once, too.
        trace = None if trace_requests is None else TraceFile(trace_requests, trace_events)
        engine = load(model, config, chat_template, adapters=adapters).engine
        if warm_prompts:
            fill(engine, warm_prompts)
        app = create_app(
            AsyncEngine(engine),
            name,
            max_waiting=max_waiting,
            allow_adapter_loading=allow_adapter_loading,
            tenants=known,
            trace=trace,
        )
    shown_host = f"[{host}]" if ":" in host else host
    address = f"http://{shown_host}:{listener.getsockname()[1]}/v1"

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                note(f"Elinvar serves {name} at {address} (Ctrl-C stops it).")

    Server(uvicorn_config(app)).run(sockets=[listener])


def _refuse_idle(of_texts: bool, flags: dict[str, Any]) -> None:
    """flags: those that mean nothing for a model of this kind."""
    for flag, value in flags.items():
        if value:
            served = "makes vectors or scores of texts" if of_texts else "generates text"
            raise click.BadParameter(f"the model {served}; leave {flag} out", param_hint=flag)
