"""`elinvar keys`: API keys of a file of tenants."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from elinvar.base.errors import InputError
from elinvar.cli import options as opt
from elinvar.cli.command import Command, Group, option
from elinvar.cli.terminal import note, read_text

_FILE = option(
    "--tenants", "path", type=opt.FILE, metavar="FILE", help="The file of tenants, TOML or JSON."
)


@click.group(cls=Group, no_args_is_help=True)
def keys() -> None:
    """Make, list and revoke API keys.

    A file of tenants has the SHA-256 of each key only: who reads it cannot use them. A server that
    runs reads it again at SIGHUP."""


@keys.command(cls=Command)
@_FILE
@option("--tenant", metavar="NAME", help="Whose key it is; a new one is added to the file.")
@option("--admin", is_flag=True, help="The tenant may use what is about the server.")
@opt.as_json
def make(path: Path | None, tenant: str | None, admin: bool, as_json: bool) -> None:
    """Make a key, and write its line into a file, or show it."""
    import secrets

    from elinvar.server.tenants import hash_key

    if (path is None) != (tenant is None):
        raise click.BadParameter("--tenants and --tenant need each other", param_hint="--tenants")
    made = f"elv-{secrets.token_urlsafe(32)}"
    digest = hash_key(made)
    if path is not None and tenant is not None:
        from elinvar.cli.key_file import add_key

        add_key(path, tenant, digest, admin)
    if as_json:
        print(json.dumps({"key": made, "key_sha256": digest, "tenant": tenant}))
        return
    note("The key, which is shown only now:")
    print(made, flush=True)
    if path is None:
        note("Its line in the file of tenants:")
        print(f'key_sha256 = "{digest}"')
    else:
        note(f"It is {tenant}'s in {path}; a server that runs knows it after SIGHUP.")


@keys.command("hash", cls=Command)
def hash_() -> None:
    """Read a key from stdin and show the line of a file that knows it."""
    from elinvar.server.tenants import hash_key

    given = click.prompt("Key", hide_input=True, err=True) if sys.stdin.isatty() else read_text()
    text = given.strip()
    if not text:
        raise InputError("key", "stdin holds no key; pipe one in.")
    print(f'key_sha256 = "{hash_key(text)}"')


@keys.command("list", cls=Command)
@_FILE
@opt.as_json
def list_(path: Path | None, as_json: bool) -> None:
    """Show the tenants of a file and the beginnings of their keys' SHA-256."""
    from elinvar.server.tenants import read_tenants

    known = read_tenants(_required(path))
    rows: list[dict[str, Any]] = [
        {
            "tenant": name,
            "keys": [digest.hex()[:12] for digest, of in known.keys if of == name],
            "models": sorted(known.models[name]) if name in known.models else None,
            "admin": name in known.admins,
        }
        for name in known.limits
    ]
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        models = "all models" if row["models"] is None else ", ".join(row["models"])
        admin = ", admin" if row["admin"] else ""
        print(f"{row['tenant']}: {' '.join(row['keys']) or 'no key'} ({models}{admin})")


@keys.command(cls=Command)
@click.argument("key", metavar="KEY")
@_FILE
def revoke(key: str, path: Path | None) -> None:
    """Take a key out of a file: the key itself, or the beginning of its SHA-256 as `list` shows it."""
    from elinvar.cli.key_file import remove_key

    tenant = remove_key(_required(path), key)
    note(f"The key was {tenant}'s; a server that runs refuses it after SIGHUP.")


def _required(path: Path | None) -> Path:
    if path is None:
        raise click.BadParameter("name the file of tenants", param_hint="--tenants")
    return path
