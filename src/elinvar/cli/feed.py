"""The live pictures of a server, read over HTTP: one, or one after the other."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from elinvar.base.errors import ElinvarError

TIMEOUT_S = 10.0
"""A server that says nothing for so long is taken for gone: it sends a picture a second."""
LONGEST_WAIT_S = 8.0
"""Between two tries to reach it again."""


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
