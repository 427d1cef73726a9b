"""Aside: a drafter in another thread or process, which runs ahead while the target computes.

Nobody waits for it. A proposal is what has come so far of a chain whose first drafts the row's tokens have
turned out to be; otherwise there is none. What is told to the other side waits in one place a row, however
long it does not listen. If it fails, ends or hangs, that is said once in the log and nothing is drafted any
more.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

from elinvar.run.drafters.ahead import Chain, Make, News, Report, work, work_in_process
from elinvar.run.drafters.api import Ask, Guess, Seen
from elinvar.run.rows import Rows

log = logging.getLogger(__name__)

PATIENCE_S = 20.0
"""One that has not looked at what is new for so long hangs."""
LAST_S = 1.0
"""That one gets to end by itself."""


class Aside:
    """make: as of Ahead, in a process of its own; its drafter must not need `observe`. patience_s: not
    while it loads."""

    is_instant = True
    reads_hidden = False

    def __init__(
        self,
        rows: Rows,
        make: Make,
        name: str = "aside",
        in_process: bool = True,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.name = name
        self._rows, self._patience_s = rows, patience_s
        self._changed = threading.Condition()
        """Guards all that follows."""
        self._told: dict[int, int] = {}
        """Tokens of each row that are in news."""
        self._turns = [0] * rows.token_ids.shape[0]
        self._news: dict[int, News] = {}
        """Not sent yet, of each row."""
        self._chains: dict[int, Chain] = {}
        self._number = 0
        self._waiting_since: float | None = None
        """There are news that it has not seen."""
        self._is_ready = self._is_over = False
        self._process: subprocess.Popen[bytes] | None = None
        self._connection = self._start(make, in_process)
        targets = self._send, self._receive
        self._threads = [threading.Thread(target=t, name=f"elinvar-{name}") for t in targets]
        for thread in self._threads:
            thread.daemon = True
            thread.start()

    def _start(self, make: Make, in_process: bool) -> Connection:
        """Not multiprocessing's: that would run the user's script a second time."""
        ours, theirs = socket.socketpair()
        connection = Connection(ours.detach())
        max_rows, max_context = self._rows.token_ids.shape
        if not in_process:
            arguments = Connection(theirs.detach()), max_rows, max_context, make
            worker = threading.Thread(target=work, args=arguments, name=f"elinvar-{self.name}-work")
            worker.daemon = True
            worker.start()
            return connection
        self._job = pickle.dumps((max_rows, max_context, make))
        name = work_in_process.__name__
        code = f"from {work_in_process.__module__} import {name}; {name}({theirs.fileno()})"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        return connection

    @property
    def is_alive(self) -> bool:
        return not self._is_over

    # ---- in the engine's thread -------------------------------------------------------------

    def propose(self, asks: Sequence[Ask]) -> list[Guess]:
        if self._is_over:
            return [Guess() for _ in asks]
        now = time.monotonic()
        with self._changed:
            for ask in asks:
                self._tell(ask, now)
            guesses = [self._ready(ask) for ask in asks]
            since = self._waiting_since
        if self._is_ready and since is not None and now - since > self._patience_s:
            self._give_up(f"it has not answered for {self._patience_s:g} s")
        return guesses

    def _tell(self, ask: Ask, now: float) -> None:
        row, told = ask.row, self._told.get(ask.row)
        if told == ask.num_tokens:
            return
        self._told[row] = ask.num_tokens
        self._number += 1
        sampling = None if told is not None else self._rows.sampling_of(row)
        waiting = self._news.get(row)
        if waiting is not None and waiting.tokens and told is not None:
            told, sampling = waiting.first, waiting.sampling
        tokens = self._rows.token_ids[row, told or 0 : ask.num_tokens].tolist()
        self._post(News(self._number, row, self._turns[row], told or 0, tokens, sampling), now)

    def _post(self, news: News, now: float) -> None:
        self._news[news.row] = news
        if self._waiting_since is None:
            self._waiting_since = now
        self._changed.notify()

    def _ready(self, ask: Ask) -> Guess:
        chain = self._chains.get(ask.row)
        if chain is None or chain.turn != self._turns[ask.row]:
            return Guess()
        since = self._rows.token_ids[ask.row, chain.first : ask.num_tokens].tolist()
        count = len(since)
        if chain.tokens[:count] != since:
            return Guess()
        end = count + ask.most
        return Guess(chain.tokens[count:end], chain.chances[count:end])

    def observe(self, seen: Seen) -> None:
        pass

    def forget(self, row: int) -> None:
        with self._changed:
            self._chains.pop(row, None)
            if self._told.pop(row, None) is not None and not self._is_over:
                self._turns[row] += 1
                self._number += 1
                self._post(News(self._number, row, self._turns[row]), time.monotonic())

    def close(self) -> None:
        """May be called again."""
        with self._changed:
            self._is_over = True
            self._changed.notify()
        if self._process is not None:
            try:
                self._process.wait(LAST_S if self._is_ready else 0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            for thread in self._threads:
                thread.join()
            self._connection.close()

    def _give_up(self, why: str) -> None:
        with self._changed:
            if self._is_over:
                return
            self._is_over = True
            self._news.clear()
            self._chains.clear()
            self._changed.notify()
        log.warning("The drafter %s is not asked any more: %s.", self.name, why)
        if self._process is not None:
            self._process.kill()

    # ---- in threads of their own ------------------------------------------------------------

    def _send(self) -> None:
        try:
            if self._process is not None:
                self._connection.send_bytes(self._job)
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._news or self._is_over)
                    news, self._news = list(self._news.values()), {}
                    is_over = self._is_over
                self._connection.send(None if is_over else news)
                if is_over:
                    return
        except OSError:
            pass  # which the other thread reports

    def _receive(self) -> None:
        why = "its process has ended" if self._process is not None else "its thread has ended"
        try:
            while True:
                report: Report = self._connection.recv()
                if report.error:
                    why = report.error
                    break
                with self._changed:
                    self._is_ready = True
                    all_seen = report.seen >= self._number
                    self._waiting_since = None if all_seen else time.monotonic()
                    for chain in report.chains:
                        if chain.turn == self._turns[chain.row]:
                            self._chains[chain.row] = chain
        except EOFError:
            pass
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        self._give_up(why)
