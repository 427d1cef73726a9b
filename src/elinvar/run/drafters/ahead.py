"""Ahead: a drafter that goes on without being asked, in another thread or process (run/drafters/aside.py).

Owns rows of its own, which follow what the engine tells. It takes its own drafts for known until they turn
out wrong, and reports each chain from the last token that it was told of.
"""

from __future__ import annotations

import pickle
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from elinvar.run.drafters.api import Ask, Drafter
from elinvar.run.rows import Rows, RowSampling

AHEAD = 24
"""Drafts of a row at most."""
BURST = 4
"""Drafts between two looks at what is new."""
TRIES = 64
"""Empty guesses of a row, while its prompt is read or for want of anything, until more of it is known."""

Make = Callable[[Rows], Drafter]
"""Over rows that it is given; what crosses to another process must be pickled."""


@dataclass(slots=True)
class News:
    """What the engine tells of a row."""

    number: int
    row: int
    turn: int
    """How many requests had the row before."""
    first: int = 0
    tokens: list[int] = field(default_factory=list)
    """Known ones, from the position `first` on; none: the request has ended."""
    sampling: RowSampling | None = None
    """Of a request that begins."""


@dataclass(slots=True)
class Chain:
    row: int
    turn: int
    first: int
    """Position of the first draft: everything before it was known then."""
    tokens: list[int]
    chances: list[float]


@dataclass(slots=True)
class Report:
    seen: int
    """Number of the last news."""
    chains: list[Chain] = field(default_factory=list)
    error: str = ""
    """Why this is the last one."""


@dataclass(slots=True)
class _Row:
    turn: int
    known: int = 0
    tokens: list[int] = field(default_factory=list)
    """Drafts behind them."""
    chances: list[float] = field(default_factory=list)
    tries: int = 0


class Ahead:
    def __init__(self, max_rows: int, max_context: int, make: Make) -> None:
        self._rows = Rows(max_rows, max_context, ())
        self._drafter = make(self._rows)
        self._own: dict[int, _Row] = {}

    def take(self, news: News) -> None:
        row = news.row
        if not news.tokens or news.sampling is not None:
            self._drafter.forget(row)
            self._own.pop(row, None)
        if news.sampling is not None:
            self._rows.sample_as(row, news.sampling)
            self._own[row] = _Row(news.turn)
        own = self._own.get(row)
        if own is None or not news.tokens:
            return
        count = news.first + len(news.tokens) - own.known
        right = own.tokens[:count] == news.tokens[len(news.tokens) - count :]
        self._rows.token_ids[row, news.first : news.first + len(news.tokens)] = news.tokens
        own.known += count
        own.tries = 0
        own.tokens = own.tokens[count:] if right else []
        own.chances = own.chances[count:] if right else []

    @property
    def _asks(self) -> list[Ask]:
        longest = self._rows.token_ids.shape[1]
        asks = []
        for row, own in self._own.items():
            known = own.known + len(own.tokens)
            most = min(BURST, AHEAD - len(own.tokens), longest - known)
            if most > 0 and own.tries < TRIES:
                asks.append(Ask(row, known, most))
        return asks

    @property
    def has_work(self) -> bool:
        return bool(self._asks)

    def go_on(self) -> list[Chain]:
        """Those that have become longer."""
        asks, chains = self._asks, []
        if not asks:
            return []
        for ask, guess in zip(asks, self._drafter.propose(asks), strict=True):
            own = self._own[ask.row]
            tokens = [int(token) for token in guess.tokens[: ask.most]]
            chances = [float(chance) for chance in guess.chances[: len(tokens)]]
            own.tries = 0 if chances else own.tries + 1
            if chances:
                end = ask.num_tokens + len(chances)
                self._rows.token_ids[ask.row, ask.num_tokens : end] = tokens[: len(chances)]
                own.tokens += tokens[: len(chances)]
                own.chances += chances
                lists = list(own.tokens), list(own.chances)
                chains.append(Chain(ask.row, own.turn, own.known, *lists))
        return chains


def work(connection: Connection, max_rows: int, max_context: int, make: Make) -> None:
    """Until the other end says None, or is gone."""
    seen = 0
    try:
        ahead = Ahead(max_rows, max_context, make)
        connection.send(Report(seen))
        while True:
            report = Report(seen)
            while connection.poll(0 if report.seen > seen or ahead.has_work else None):
                news: list[News] | None = connection.recv()
                if news is None:
                    return
                for one in news:
                    ahead.take(one)
                    report.seen = max(report.seen, one.number)
            report.chains = ahead.go_on()
            if report.chains or report.seen > seen:
                connection.send(report)
            seen = report.seen
    except (EOFError, OSError):
        pass  # the engine is gone
    except Exception as error:
        with suppress(OSError):
            connection.send(Report(seen, error=f"{type(error).__name__}: {error}"))
    finally:
        connection.close()


def work_in_process(descriptor: int) -> None:
    """The same where only a socket was inherited; what to do comes through it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the engine, which then ends this
    connection = Connection(descriptor)
    try:
        job = connection.recv_bytes()
    except (EOFError, OSError):
        return
    try:
        max_rows, max_context, make = pickle.loads(job)
    except Exception as error:
        connection.send(Report(0, error=f"{type(error).__name__}: {error}"))
        return
    work(connection, max_rows, max_context, make)
