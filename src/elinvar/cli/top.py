"""`elinvar top`: the live picture of a server, in a terminal.

Owns the keyboard; what is drawn is cli.picture's, and where it comes from cli.feed's.
"""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from elinvar.cli import options as opt
from elinvar.cli.command import command, option

if TYPE_CHECKING:
    from elinvar.cli.feed import Feed


@command
@option("--url", default="http://127.0.0.1:8000", metavar="URL", help="The server.")
@option("--api-key", metavar="KEY", help="Sent to it, where it asks for keys.")
@opt.as_json
def top(url: str, api_key: str | None, as_json: bool) -> None:
    """Show what a server does, as it does it: throughput, latency, memory, requests. q ends it.

    With --json: one picture, as the server's /live gives it."""
    from elinvar.cli.feed import Feed

    feed = Feed(_address(url), api_key)
    first = feed.once()
    if as_json:
        print(json.dumps(first))
        return
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise click.UsageError("top needs a terminal; --json prints one picture")
    _watch(feed, first)


def _address(url: str) -> str:
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise click.BadParameter(f"{url!r} is no http:// or https:// address", param_hint="--url")
    path = parts.path.rstrip("/").removesuffix("/v1")
    return f"{parts.scheme}://{parts.netloc}{path}"


def _watch(feed: Feed, first: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.live import Live

    from elinvar.cli.picture import Picture

    console, picture = Console(), Picture()
    picture.push(first)
    feed.start()
    with (
        _keys() as pressed,
        Live(picture, console=console, screen=True, auto_refresh=False, transient=True) as screen,
    ):
        while not (pressed() & {"q", "Q"}):
            if (now := feed.take(0.2)) is not None:
                picture.push(now)
            picture.problem = feed.problem
            screen.refresh()


@contextmanager
def _keys() -> Iterator[Any]:
    """Keys as they are pressed, without a line's end. Yields what asks for those since last time."""
    import termios
    import tty

    stdin = sys.stdin.fileno()
    before = termios.tcgetattr(stdin)
    tty.setcbreak(stdin)

    def pressed() -> set[str]:
        ready, _, _ = select.select([stdin], [], [], 0)
        return set(os.read(stdin, 64).decode(errors="replace")) if ready else set()

    try:
        yield pressed
    finally:
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)
