"""The process that serves an application: sockets, TLS, how it ends.

The first SIGTERM or SIGINT lets what runs finish: /ready turns to 503, after `drain_s` nobody new gets
in, and open answers have `grace_s` from then on. A second signal ends at once.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.config import LOGGING_CONFIG

from elinvar.base.errors import InputError
from elinvar.server.connection import Impatient

GRACE_S = 30
"""How long open answers may go on after SIGTERM or SIGINT."""
KEEP_ALIVE_S = 75
"""Longer than clients (httpx: 5 s) and proxies (nginx: 60 s) keep idle connections, so that it is
never the server that closes one just as it is used again."""


@dataclass(frozen=True, slots=True)
class TLS:
    """Files in PEM. Raises InputError naming the one that cannot be used."""

    cert: Path
    key: Path
    client_ca: Path | None = None
    """Clients must have a certificate of this authority."""

    def __post_init__(self) -> None:
        for name, path in (("tls-cert", self.cert), ("tls-key", self.key)):
            _check_readable(name, path)
        try:
            self._context().load_cert_chain(self.cert, self.key, password=_no_password)
        except (ssl.SSLError, ValueError, OSError) as error:
            raise InputError(
                "tls-key",
                f"{self.cert} and {self.key} are no certificate and its key in PEM: {_said(error)}.",
            ) from None
        if self.client_ca is not None:
            _check_readable("tls-client-ca", self.client_ca)
            try:
                self._context().load_verify_locations(self.client_ca)
            except ssl.SSLError as error:
                message = f"{self.client_ca} holds no certificates in PEM: {_said(error)}."
                raise InputError("tls-client-ca", message) from None

    @staticmethod
    def _context() -> ssl.SSLContext:
        return ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

    def settings(self) -> dict[str, Any]:
        """uvicorn's."""
        settings: dict[str, Any] = {"ssl_certfile": self.cert, "ssl_keyfile": self.key}
        if self.client_ca is not None:
            settings |= {"ssl_ca_certs": self.client_ca, "ssl_cert_reqs": ssl.CERT_REQUIRED}
        return settings


def _no_password() -> str:
    raise ValueError("the key is encrypted, which would ask for a password at each start")


def _said(error: Exception) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)


def _check_readable(name: str, path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise InputError(name, f"Cannot read {path} (--{name}): {error.strerror}.") from None


class Process(uvicorn.Server):
    """One application on some sockets, until a signal ends it."""

    def __init__(
        self,
        config: uvicorn.Config,
        leave: Callable[[], None],
        drain_s: float = 0.0,
        started: Callable[[], None] | None = None,
    ) -> None:
        """leave: called at the first signal. drain_s: seconds from then on in which new requests
        are still let in, for those that send them to learn of it. started: called when it listens."""
        super().__init__(config)
        self._leave, self._drain_s, self._tell = leave, drain_s, started
        self._asked: float | None = None
        self.signal: int | None = None
        """The one that ended it."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._asked is None:
            self._asked, self.signal = time.monotonic(), sig
            self._leave()
        else:
            self.should_exit = self.force_exit = True
            # It would report the lifespan that is cut off, which was asked for.
            logging.getLogger("uvicorn.error").disabled = True

    async def on_tick(self, counter: int) -> bool:
        if self._asked is not None and time.monotonic() - self._asked >= self._drain_s:
            self.should_exit = True
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self._tell is not None:
            self._tell()


def uvicorn_config(
    app: Starlette,
    *,
    log_level: str = "warning",
    grace_seconds: int = GRACE_S,
    tls: TLS | None = None,
    log_config: dict[str, Any] | None = LOGGING_CONFIG,
) -> uvicorn.Config:
    """How the application is served; `host`, `port` or sockets are the caller's. log_config: None
    where the process's log is as it shall be."""
    return uvicorn.Config(
        app,
        http=Impatient,
        log_level=log_level,
        log_config=log_config,
        lifespan="on",
        ws="none",
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=grace_seconds,
        backlog=4096,
        **({} if tls is None else tls.settings()),
    )


def listen(host: str, port: int) -> socket.socket:
    """A bound socket for uvicorn; port 0 takes a free one. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    family, kind, protocol, _, address = found[0]
    # The protocol must be said: asyncio switches Nagle's algorithm off only for sockets that
    # say they are TCP, and with it a stream stalls for 40 ms again and again.
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def serve(
    app: Starlette,
    sockets: Sequence[socket.socket],
    *,
    log_level: str = "warning",
    grace_seconds: int = GRACE_S,
    drain_s: float = 0.0,
    tls: TLS | None = None,
    started: Callable[[], None] | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT, see above. Returns the exit code: 0 after SIGTERM, 130 after
    SIGINT, and 128 + its number where a second signal cut open answers off."""
    _raise_file_limit()
    config = uvicorn_config(
        app, log_level=log_level, grace_seconds=grace_seconds, tls=tls, log_config=None
    )
    process = Process(config, app.state.leave, drain_s, started)
    process.run(sockets=list(sockets))
    if process.signal is None:
        return 0
    clean = process.signal == signal.SIGTERM and not process.force_exit
    return 0 if clean else 128 + process.signal


def _raise_file_limit() -> None:
    """A connection is a file, and the usual limit is 1,024."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
