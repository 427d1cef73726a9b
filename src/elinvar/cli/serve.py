"""`elinvar serve`: the HTTP server over one model or several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from elinvar.base.config import EngineConfig
from elinvar.cli import options as opt
from elinvar.cli import serving
from elinvar.cli.command import command, option
from elinvar.cli.warm import read_warm_prompts
from elinvar.cli.warm import warm as fill

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from elinvar.cli.prompts import Prompt
    from elinvar.engine.text_aio import AsyncTextModel

_CACHE = "Prefix cache"
_TRACES = "Traces"


@command
@click.argument(
    "models",
    nargs=-1,
    required=True,
    metavar="MODEL...",
    help="Catalogue names, hf:org/name@rev, pypi:name, .gguf files or folders.",
)
@option("--host", default="127.0.0.1", help="Address to listen on.")
@option(
    "--port",
    type=opt.Whole(0, 65535),
    metavar="N",
    default=8000,
    help="0 takes a free one.",
)
@option(
    "--served-model-name", help="Name clients ask for (default: MODEL; of several see --alias)."
)
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
@option("--no-console", is_flag=True, help="Leave out the pages for browsers at /.")
@opt.serving
@option(
    "--dialect",
    metavar="NAME",
    help="How the model writes thoughts and calls of tools (default: as its chat template tells; see "
    "'elinvar models show').",
)
@serving.several
@serving.door
@serving.end
@serving.told
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
    "--trace-requests",
    type=opt.FILE,
    metavar="FILE",
    help="Append a line of JSON for each request that ends: where its time went, no texts.",
    section=_TRACES,
)
@option(
    "--state-dir",
    type=opt.FILE,
    metavar="FOLDER",
    help="Where responses, files and batches of clients are kept (default: elinvar/PORT in the user's "
    "state folder); made when there is something to keep. 'none' keeps them no longer than the server.",
    section="State",
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
def serve(models: tuple[str, ...], **flags: Any) -> int:
    """Serve models over HTTP as OpenAI's API does.

    Of several the first one is loaded at the start, the others when they are asked for. One of them
    may be an embedding model or a reranker: it answers /v1/embeddings or /v1/rerank, the others chats
    and completions."""
    if flags["trace_events"] and flags["trace_requests"] is None:
        raise click.BadParameter("--trace-events needs --trace-requests FILE")
    names, aliases = _names(models, flags)
    serving.begin_log(flags)
    # Files that cannot be read or written are told at once, too.
    warm = [] if flags["warm"] is None else read_warm_prompts(flags["warm"])
    if flags["dialect"] is not None:
        serving.check_dialect(flags["dialect"])
    known = serving.read_door(flags["api_key"], flags["tenants"])
    tls = serving.read_tls(flags["tls_cert"], flags["tls_key"], flags["tls_client_ca"])
    of_engine = {**flags, "tenants": known.limits, "interactive": opt.interactive_target(flags)}
    config = opt.engine_config(of_engine)
    sockets = [serving.bind(flags["host"], flags["port"])]
    if flags["admin_port"] is not None:
        sockets.append(serving.bind(flags["host"], flags["admin_port"], "--admin-port"))
    settings = {
        "max_waiting": flags["max_waiting"],
        "max_body_bytes": opt.parse_size(flags["max_body"], "--max-body"),
        "grace_seconds": flags["grace"],
        "hung_s": flags["hung"],
        "tenants": known,
        "cors_origins": flags["cors_origins"],
        "console": not flags["no_console"],
        "admin_port": sockets[1].getsockname()[1] if sockets[1:] else None,
        "tellers": serving.tellers(flags),
        "state_dir": serving.state_dir(flags["state_dir"], sockets[0]),
    }
    for_texts = _of_texts(models, flags, config)
    if len(models) == 1 and for_texts:
        app = _texts_app(models[0], names[0], config, flags, settings)
    else:
        app = _models_app(models, names, aliases, config, flags, settings, warm, for_texts)
    return serving.run(app, sockets, ", ".join(names), flags, tls, flags["tenants"])


def _names(models: tuple[str, ...], flags: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """What clients call the models, and other names of theirs."""
    if len(set(models)) < len(models):
        raise click.BadParameter("a model is named twice", param_hint="MODEL...")
    if len(models) > 1:
        _refuse(flags, ("served_model_name",), "there are several models; use --alias NAME=MODEL")
        if (flags["default"] or models[0]) not in models:
            raise click.BadParameter(
                f"it must be one of {', '.join(models)}", param_hint="--default"
            )
    else:
        _refuse(flags, ("default", "model_memory"), "there is one model")
    names = [flags["served_model_name"] or models[0]] if len(models) == 1 else list(models)
    aliases = serving.parse_aliases(flags["aliases"], names)
    for name, _ in flags["adapters"]:
        if name in names or name in aliases:
            raise click.BadParameter(f"{name!r} is a model's own name.", param_hint="--adapter")
    return names, aliases


def _of_texts(models: tuple[str, ...], flags: dict[str, Any], config: EngineConfig) -> str | None:
    """The model that makes vectors or scores, if one does. Refuses options that mean nothing."""
    from elinvar.cli.load import pulled
    from elinvar.engine.text_model import is_text_model

    found = [name for name in models if flags["texts"] or is_text_model(pulled(name))]
    if len(found) > 1:
        message = f"{' and '.join(found)} make vectors or scores of texts; serve one of them"
        raise click.BadParameter(message, param_hint="MODEL...")
    if not found:
        _refuse(flags, ("matryoshka",), "the model generates text")
    elif len(models) == 1:
        why = "the model makes vectors or scores of texts"
        _refuse(flags, _GENERATING, why)
        if config.policy != EngineConfig().policy:
            raise click.BadParameter(f"{why}; leave --policy out", param_hint="--policy")
    elif found[0] == (flags["default"] or models[0]):
        message = f"{found[0]} generates no text; name one that does first, or as --default"
        raise click.BadParameter(message, param_hint="--default")
    return found[0] if found else None


_GENERATING = (
    *("adapters", "chat_template", "allow_adapter_loading", "warm", "trace_requests"),
    *("tenants", "aliases", "no_console"),
)
_FLAGS = {"adapters": "--adapter", "aliases": "--alias"}


def _refuse(flags: dict[str, Any], names: tuple[str, ...], why: str) -> None:
    for name in names:
        if flags[name]:
            flag = _FLAGS.get(name) or "--" + name.replace("_", "-")
            raise click.BadParameter(f"{why}; leave {flag} out", param_hint=flag)


def _texts_app(
    model: str, name: str, config: EngineConfig, flags: dict[str, Any], settings: dict[str, Any]
) -> Starlette:
    from elinvar.server.app import create_text_app

    engine = _load_texts(model, config)
    return create_text_app(engine, name, matryoshka=flags["matryoshka"], **settings)


def _load_texts(model: str, config: EngineConfig) -> AsyncTextModel:
    from elinvar.cli.load import load_embedder
    from elinvar.engine.text_aio import AsyncTextModel

    return AsyncTextModel(load_embedder(model, config).model)


def _models_app(
    models: tuple[str, ...],
    names: list[str],
    aliases: dict[str, str],
    config: EngineConfig,
    flags: dict[str, Any],
    settings: dict[str, Any],
    warm: list[Prompt],
    for_texts: str | None,
) -> Starlette:
    from elinvar.cli.load import load
    from elinvar.engine.aio import AsyncEngine
    from elinvar.server.app import Settings, create_models_app
    from elinvar.server.models import Entry, Models
    from elinvar.server.served import Served
    from elinvar.server.texts import TextRoutes
    from elinvar.server.trace import TraceFile

    path, default = flags["trace_requests"], flags["default"] or models[0]
    texts = None
    if for_texts is not None:
        engine = _load_texts(for_texts, config)
        shorten = flags["matryoshka"] or engine.model.recipe.matryoshka
        limits = settings["max_waiting"], settings["max_body_bytes"]
        own = [alias for alias, name in aliases.items() if name == for_texts]
        aliases = {alias: name for alias, name in aliases.items() if name != for_texts}
        texts = TextRoutes(engine, for_texts, shorten, *limits, own)
        models = tuple(name for name in models if name != for_texts)
        names = [name for name in names if name != for_texts]
    trace = None if path is None else TraceFile(path, flags["trace_events"])
    config = serving.with_kv_memory(config, models, flags["model_memory"])

    def served(model: str) -> Served:
        is_default = model == default
        template = flags["chat_template"] if is_default else None
        adapters = flags["adapters"] if is_default else ()
        engine = load(model, config, template, adapters=adapters).engine
        if is_default and warm:
            fill(engine, warm)
        if trace is not None:
            engine.watchers.append(trace)
        name = names[models.index(model)]
        dialect = flags["dialect"] if is_default else None
        return Served.of(name, AsyncEngine(engine), flags["max_waiting"], dialect)

    first, most = served(default), None
    beside = () if texts is None else (texts,)
    entries = [Entry.loaded(first)]
    if len(models) > 1:
        entries, most = serving.on_demand(models, first, config, flags["model_memory"], served)
    return create_models_app(
        Models(entries, default=first.name, aliases=aliases, max_bytes=most, beside=beside),
        Settings(**settings),
        allow_adapter_loading=flags["allow_adapter_loading"],
        trace=trace,
        texts=texts,
    )
