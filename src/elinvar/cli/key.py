"""`elinvar key`: API keys for a file of tenants."""

from __future__ import annotations

import sys

import click

from elinvar.base.errors import InputError
from elinvar.cli.command import command, option
from elinvar.cli.terminal import note, read_text


@command
@option("--hash", "of_stdin", is_flag=True, help="Read a key from stdin instead of making one.")
def key(of_stdin: bool) -> None:
    """Make an API key, and the line of a tenants file that knows it.

    The file has the key's SHA-256 only: who reads it cannot use the key."""
    import secrets

    from elinvar.server.tenants import hash_key

    if not of_stdin:
        made = f"elv-{secrets.token_urlsafe(32)}"
        note("The key, which is shown only now:")
        print(made, flush=True)
        note("Its line in the file of tenants:")
        print(f'key_sha256 = "{hash_key(made)}"')
        return
    given = click.prompt("Key", hide_input=True, err=True) if sys.stdin.isatty() else read_text()
    text = given.strip()
    if not text:
        raise InputError("key", "stdin holds no key; pipe one in.")
    print(f'key_sha256 = "{hash_key(text)}"')
