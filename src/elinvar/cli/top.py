"""`elinvar top`: the live picture of a server, in a terminal.

Owns the keyboard and the connection; what is drawn is cli.picture's.
"""

from __future__ import annotations

import json
import os
import select
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import click

from elinvar.base.errors import ElinvarError
from elinvar.cli import options as opt
from elinvar.cli.command import command, option

TIMEOUT_S = 10.0
"""A server that says nothing for so long is taken for gone: it sends a picture a second."""
LONGEST_WAIT_S = 8.0
"""Between two tries to reach it again."""


@command
@option("--url", default="http://127.0.0.1:8000", metavar="URL", help="The server.")
@option("--api-key", metavar="KEY", help="Sent to it, where it asks for keys.")
@opt.as_json
def top(url: str, api_key: str | None, as_json: bool) -> None:
    """Show what a server does, as it does it: throughput, latency, memory, requests. q ends it.

    With --json: one picture, as the server's /live gives it."""
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
        raise click.BadParameter(
            f"{url!r} is no http:// or https:// address", param_hint="--url"
        ) from None
    path = parts.path.rstrip("/").removesuffix("/v1")
    return f"{parts.scheme}://{parts.netloc}{path}"


class Feed:
    """The pictures of a server, read by a thread of its own, which connects again and again."""

    def __init__(self, address: str, api_key: str | None) -> None:
        self.address = address
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self.problem = ""
        self._latest: dict[str, Any] | None = None
        self._changed = threading.Event()

    def once(self) -> dict[str, Any]:
        """One picture. Raises ElinvarError, a sentence, when there is none."""
        with _told(self.address), self._open("/live?history=1") as response:
            return _decoded(response.read())

    def start(self) -> None:
        threading.Thread(target=self._run, name="elinvar-top", daemon=True).start()

    def take(self, timeout_s: float) -> dict[str, Any] | None:
        """A picture that was not taken before, if one comes in time."""
        self._changed.wait(timeout_s)
        self._changed.clear()
        latest, self._latest = self._latest, None
        return latest

    def _run(self) -> None:
        wait = 1.0
        while True:
            try:
                with _told(self.address), self._open("/live?stream=1&history=1") as response:
                    for line in response:
                        if line.startswith(b"data: "):
                            self._latest, self.problem = _decoded(line[6:]), ""
                            self._changed.set()
                            wait = 1.0
                self.problem = f"{self.address} ended the connection; trying again."
            except ElinvarError as error:
                self.problem = f"{error} Trying again."
            self._changed.set()
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_S)

    def _open(self, path: str) -> Any:
        return urlopen(Request(self.address + path, headers=self._headers), timeout=TIMEOUT_S)


def _decoded(body: bytes) -> dict[str, Any]:
    found = json.loads(body)
    if not isinstance(found, dict) or not isinstance(found.get("models"), list):
        raise ValueError
    return found


@contextmanager
def _told(address: str) -> Iterator[None]:
    """What goes wrong with a server, as one sentence."""
    try:
        yield
    except HTTPError as error:
        match error.code:
            case 401:
                what = "asks for an API key that it knows; give it with --api-key."
            case 403:
                what = "shows this to administrators alone; give the key of one with --api-key."
            case 404:
                what = "has no live picture: it is no Elinvar server, or one of texts."
            case code:
                what = f"answered with status {code}."
        raise ElinvarError(f"{address} {what}") from None
    except (URLError, OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        why = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        raise ElinvarError(
            f"Cannot reach {address}: {why}; start a server, or name it with --url."
        ) from None
    except ValueError:
        raise ElinvarError(f"{address} answers, but not as an Elinvar server does.") from None


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
