"""What `elinvar serve` puts together: who may ask, the models and their memory, and the process."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elinvar.base.config import EngineConfig
from elinvar.base.errors import ElinvarError, InputError
from elinvar.cli import options as opt
from elinvar.cli.command import option, options
from elinvar.cli.terminal import note

if TYPE_CHECKING:
    import socket

    from starlette.applications import Starlette

    from elinvar.server.models import Entry
    from elinvar.server.process import TLS
    from elinvar.server.seen import Teller
    from elinvar.server.served import Served
    from elinvar.server.tenants import Tenants

_DOOR = "Who may ask"
_END = "How it ends"
_SEVERAL = "Several models"
_TOLD = "What is told"

several = options(
    option(
        "--default",
        metavar="MODEL",
        help="The model that answers as 'default' and is loaded at the start (default: the first).",
        section=_SEVERAL,
    ),
    option(
        "--alias",
        "aliases",
        multiple=True,
        metavar="NAME=MODEL",
        help="Another name for a model; may be given several times.",
        section=_SEVERAL,
    ),
    option(
        "--model-memory",
        metavar="SIZE",
        help="Memory of all loaded models with their KV caches; others are dropped for one that is "
        "asked for (default: 80 % of what is free).",
        section=_SEVERAL,
    ),
)
door = options(
    option(
        "--api-key",
        envvar="ELINVAR_API_KEY",
        show_envvar=True,
        metavar="KEY",
        help="Clients must send this key.",
        section=_DOOR,
    ),
    option(
        "--tenants",
        type=opt.FILE_THAT_IS_THERE,
        metavar="FILE",
        help="TOML or JSON: API keys, and what each tenant may ask for and take ('elinvar keys' makes "
        "and revokes keys). SIGHUP reads it again.",
        section=_DOOR,
    ),
    option(
        "--admin-port",
        type=opt.Whole(0, 65535),
        metavar="N",
        help="Serve /metrics, /live and what changes the server at this port, and nowhere else.",
        section=_DOOR,
    ),
    option(
        "--cors-origin",
        "cors_origins",
        multiple=True,
        metavar="ORIGIN",
        help="Let pages of this origin ask from browsers; '*' lets all (default: none).",
        section=_DOOR,
    ),
    option("--tls-cert", type=opt.FILE, metavar="FILE", help="Serve HTTPS.", section=_DOOR),
    option("--tls-key", type=opt.FILE, metavar="FILE", help="The key of it.", section=_DOOR),
    option(
        "--tls-client-ca",
        type=opt.FILE,
        metavar="FILE",
        help="Clients must have a certificate of this authority.",
        section=_DOOR,
    ),
    option(
        "--max-body",
        metavar="SIZE",
        default="16M",
        help="Largest body of a request.",
        section=_DOOR,
    ),
)
end = options(
    option(
        "--grace",
        type=opt.Whole(0),
        metavar="S",
        default=30,
        help="Seconds that open answers get to finish after SIGTERM or Ctrl-C; a second one stops.",
        section=_END,
    ),
    option(
        "--drain",
        type=opt.Whole(0),
        metavar="S",
        default=0,
        help="Seconds before that, in which /ready is 503 already and requests are still served.",
        section=_END,
    ),
    option(
        "--hung",
        type=opt.AT_LEAST_1,
        metavar="S",
        default=300,
        help="A step that takes longer hangs: the log says where, /health turns to 503.",
        section=_END,
    ),
)

told = options(
    option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        default="text",
        help="Lines of the log, on stderr.",
        section=_TOLD,
    ),
    option(
        "--log-level",
        type=click.Choice(["debug", "info", "warning", "error"]),
        help="With info there is a line for each request (default: warning; with -v info).",
        section=_TOLD,
    ),
    option(
        "--log-prompts",
        is_flag=True,
        help="Lines of requests hold what was asked, as text.",
        section=_TOLD,
    ),
    option(
        "--otlp-endpoint",
        metavar="URL",
        help="Send a trace of each request to this OpenTelemetry collector (http://localhost:4318; "
        "default: as OTEL_EXPORTER_OTLP_ENDPOINT says).",
        section=_TOLD,
    ),
)


def begin_log(flags: dict[str, Any]) -> None:
    """Raises click.BadParameter where lines of requests are asked for and not written."""
    from elinvar.server.logs import configure

    level = flags["log_level"]
    if level is None:
        verbose = logging.getLogger("elinvar").level == logging.INFO
        level = "info" if verbose else "warning"
    if flags["log_prompts"] and level not in ("debug", "info"):
        raise click.BadParameter(
            "lines of requests need --log-level info", param_hint="--log-prompts"
        )
    configure(flags["log_format"], level)


def tellers(flags: dict[str, Any]) -> tuple[Teller, ...]:
    """Who is told of requests that ended."""
    from elinvar.server.logs import RequestLog

    return RequestLog(flags["log_prompts"]), *_spans(flags["otlp_endpoint"])


def _spans(endpoint: str | None) -> tuple[Teller, ...]:
    from elinvar.server.spans import Spans, otlp, wanted

    return (Spans(otlp(endpoint)),) if wanted(endpoint) else ()


def check_dialect(name: str) -> None:
    from elinvar.engine.dialects.families import FAMILIES

    if name not in FAMILIES:
        message = f"{name!r} is none of {', '.join(FAMILIES)}"
        raise click.BadParameter(message, param_hint="--dialect")


def read_door(api_key: str | None, tenants: Path | None) -> Tenants:
    """Whose keys are known. Raises click.BadParameter, or InputError naming file and tenant."""
    from elinvar.server.tenants import NOBODY, of_key, read_tenants

    if api_key is not None and tenants is not None:
        raise click.BadParameter(
            "--tenants knows keys already; put this one there", param_hint="--api-key"
        )
    if api_key is not None:
        if not api_key.strip():
            raise click.BadParameter("the key is empty", param_hint="--api-key")
        return of_key(api_key.strip())
    return NOBODY if tenants is None else read_tenants(tenants)


def state_dir(given: Path | None, listener: socket.socket) -> Path | None:
    """One a port: two servers cannot use the same. None: what is kept ends with the server."""
    from elinvar.server.store import state_root

    if given == Path("none"):
        return None
    return given or state_root() / str(listener.getsockname()[1])


def read_tls(cert: Path | None, key: Path | None, client_ca: Path | None) -> TLS | None:
    from elinvar.server.process import TLS

    if cert is None and key is None and client_ca is None:
        return None
    if cert is None or key is None:
        raise click.BadParameter(
            "--tls-cert and --tls-key need each other", param_hint="--tls-cert"
        )
    try:
        return TLS(cert, key, client_ca)
    except InputError as error:
        raise ElinvarError(str(error)) from None


def bind(host: str, port: int, flag: str = "--port") -> socket.socket:
    """Before a model is loaded: a port that is taken is told at once."""
    from elinvar.server.process import listen

    try:
        return listen(host, port)
    except OSError as error:
        raise ElinvarError(
            f"Cannot listen on {host}:{port}: {error.strerror}; choose another --host or {flag}."
        ) from None


def run(
    app: Starlette,
    sockets: Sequence[socket.socket],
    name: str,
    flags: dict[str, Any],
    tls: TLS | None,
    tenants: Path | None,
) -> int:
    """Serve until a signal; returns the exit code."""
    import asyncio

    from elinvar.server.logs import say
    from elinvar.server.process import serve

    tell = note if flags["log_format"] == "text" else say

    def started() -> None:
        scheme = "http" if tls is None else "https"
        address, *admin = (f"{scheme}://{_shown(one)}" for one in sockets)
        also = f"; what is for administrators is at {admin[0]}" if admin else "."
        tell(f"Elinvar serves {name} at {address}/v1 (Ctrl-C stops it){also}")
        if tenants is not None:
            asyncio.get_running_loop().add_signal_handler(
                signal.SIGHUP, lambda: _read_again(app, tenants, tell)
            )

    return serve(
        app,
        sockets,
        grace_seconds=flags["grace"],
        drain_s=flags["drain"],
        tls=tls,
        started=started,
    )


def _read_again(app: Starlette, path: Path, tell: Callable[[str], None]) -> None:
    """A file with a mistake changes nothing."""
    from elinvar.server.tenants import read_tenants

    try:
        app.state.tenants = read_tenants(path)
    except (InputError, OSError) as error:
        tell(f"{path} was not read again: {error}")
    else:
        tell(f"Read {path} again: keys, models and administrators; limits are those of the start.")


def _shown(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# ---- several models -----------------------------------------------------------------------------


def parse_aliases(given: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    aliases: dict[str, str] = {}
    for text in given:
        alias, sign, name = text.partition("=")
        if not (alias and sign and name in names):
            there = ", ".join(names)
            message = f"{text!r} is not NAME=MODEL with a MODEL of {there}"
            raise click.BadParameter(message, param_hint="--alias")
        if alias in names or alias in aliases:
            raise click.BadParameter(f"{alias!r} is a name already", param_hint="--alias")
        aliases[alias] = name
    return aliases


def on_demand(
    names: Sequence[str],
    first: Served,
    config: EngineConfig,
    model_memory: str | None,
    serve_model: Callable[[str], Served],
) -> tuple[list[Entry], int]:
    """Entries of all models, of which one is loaded, and the bytes that they may take at once."""
    from elinvar.server.models import Entry

    budget = _memory_budget(model_memory)
    entries = []
    for name in names:
        entry = Entry(name, _loader(name, serve_model), model_bytes(name, config))
        if name == first.name:
            entry.served = first
        elif entry.num_bytes > budget:
            raise click.BadParameter(
                f"{name} alone takes {opt.format_size(entry.num_bytes)}; give more, or a smaller "
                "--kv-memory",
                param_hint="--model-memory",
            )
        entries.append(entry)
    return entries, budget


def _memory_budget(model_memory: str | None) -> int:
    """Bytes that all loaded models may take at once."""
    from elinvar.engine.memory import available_memory

    asked = opt.parse_size(model_memory, "--model-memory")
    return int(0.8 * available_memory()) if asked is None else asked


def _loader(name: str, serve_model: Callable[[str], Served]) -> Callable[[], Any]:
    import asyncio

    async def load() -> Served:
        return await asyncio.to_thread(serve_model, name)

    return load


def model_bytes(name: str, config: EngineConfig) -> int:
    """Its files, which are about what its weights take, and its KV cache."""
    from elinvar.cli.load import pulled

    path = pulled(name)
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    weights = sum(one.stat().st_size for one in files if one.suffix in (".gguf", ".safetensors"))
    return weights + (config.kv_memory or 0)


def with_kv_memory(
    config: EngineConfig, names: Sequence[str], model_memory: str | None
) -> EngineConfig:
    """A KV cache that leaves room for others, where its size was not said."""
    if config.kv_memory is not None or len(names) == 1:
        return config
    budget = _memory_budget(model_memory)
    weights = [model_bytes(name, config) for name in names]
    room = (budget - sum(weights)) // len(names)
    if room < _LEAST_KV:  # not all at once, then
        room = (budget - max(weights)) // 2
    return replace(config, kv_memory=max(_LEAST_KV, min(room, _MOST_KV)))


_LEAST_KV, _MOST_KV = 256 * 2**20, 8 * 2**30
