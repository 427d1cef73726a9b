"""`elinvar kv-server`: keeps KV blocks for engines on other machines."""

from __future__ import annotations

import json
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import click

from elinvar.base.errors import ElinvarError, InputError
from elinvar.cli import options as opt
from elinvar.cli.command import command, option
from elinvar.cli.terminal import note


@command
@option("--host", default="127.0.0.1", help="Address to listen on.")
@option("--port", type=opt.Whole(0, 65535), metavar="N", default=8100, help="0 takes a free one.")
@option("--memory", metavar="SIZE", default="1G", help="Memory for blocks, as 800M or 2G.")
@option("--max-value", metavar="SIZE", default="64M", help="Largest block it takes.")
@option(
    "--max-connections",
    type=opt.AT_LEAST_1,
    metavar="N",
    default=256,
    help="Connections at once; an engine opens up to 4.",
)
@option(
    "--secret-file",
    type=opt.FILE_THAT_IS_THERE,
    metavar="FILE",
    help="What clients must know, 16 bytes or more (default: ELINVAR_KV_SECRET, if it is set).",
)
@option(
    "--no-secret",
    is_flag=True,
    help="Serve whoever reaches a --host beyond this machine, without a secret.",
)
@option("--status", metavar="ADDRESS", help="Ask the server at tcp://host:port how it is.")
@opt.as_json
@opt.verbose
def kv_server(
    host: str,
    port: int,
    memory: str,
    max_value: str,
    max_connections: int,
    secret_file: Path | None,
    no_secret: bool,
    status: str | None,
    as_json: bool,
) -> None:
    """Keep KV blocks in memory for engines, here or on other machines.

    Nothing is encrypted: between machines use a network that only they are on. With --json it says
    one JSON object when it listens, and one when it has ended."""
    from elinvar.kv.tiers.cache_server import CacheServer, Limits
    from elinvar.kv.tiers.wire import read_secret

    try:
        secret = read_secret(secret_file)
        if status is not None:
            _say(_status(status, secret), as_json)
            return
        limits = Limits(_size(memory, "--memory"), _size(max_value, "--max-value"), max_connections)
    except InputError as error:
        flag = {"secret": "--secret-file", "tier": "--status"}.get(error.field)
        hint = flag or "--" + error.field.replace("_", "-")
        raise click.BadParameter(str(error), param_hint=hint) from None
    if secret is None and not no_secret and not _is_this_machine(host):
        raise click.BadParameter(
            f"{host} is reached from other machines; add --secret-file FILE, or --no-secret where "
            "everybody may read and write",
            param_hint="--host",
        )
    try:
        server = CacheServer(host, port, limits, secret)
    except OSError as error:
        raise ElinvarError(
            f"Cannot listen on {host}:{port}: {error.strerror}; choose another --host or --port."
        ) from None
    if as_json:
        print(json.dumps({"address": server.address, "max_bytes": limits.max_bytes}), flush=True)
    else:
        note(f"Elinvar keeps KV blocks at {server.address} (Ctrl-C stops it).")
    try:
        server.run()
    except (KeyboardInterrupt, SystemExit):  # as SIGTERM is raised
        server.stop()
    if as_json:
        _say(server.stats(), as_json)


def _size(text: str, flag: str) -> int:
    return opt.parse_size(text, flag) or 0


def _is_this_machine(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _status(address: str, secret: bytes | None) -> dict[str, Any]:
    from elinvar.kv.tiers.remote import RemoteTier

    tier = RemoteTier(address, secret=secret)
    try:
        return tier.stats()
    finally:
        tier.close()


def _say(stats: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(stats), flush=True)
        return
    for name, value in stats.items():
        shown = opt.format_size(value) if "bytes" in name else f"{value}"
        print(f"  {name.replace('_', ' '):<14}{shown}")
