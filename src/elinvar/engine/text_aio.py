"""AsyncTextModel: the tasks of many consumers in one thread, mixed into batches.

Texts of all tasks take turns, so that a long task does not hold up a short one; what shares a batch does
not change a bit. Nothing here knows HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from contextlib import suppress
from typing import Any

import numpy as np

from elinvar.base.errors import EngineError, InputError
from elinvar.engine.text_model import Task, TextModel
from elinvar.ops.api import F32

log = logging.getLogger(__name__)


class _Job:
    """A task, who waits for it, and how far it is."""

    __slots__ = ("future", "loop", "rows", "taken", "task")

    def __init__(self, task: Task) -> None:
        self.task = task
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[F32] = self.loop.create_future()
        self.taken = 0
        self.rows: list[Any] = [None] * len(task.texts)

    def settle(self, answer: F32 | Exception) -> None:
        """The first answer stands."""

        def set_it() -> None:
            if self.future.done():
                return
            if isinstance(answer, Exception):
                self.future.set_exception(answer)
            else:
                self.future.set_result(answer)

        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(set_it)


class AsyncTextModel:
    """Serves many consumers at once. `start` before use; `shutdown` when done."""

    def __init__(self, model: TextModel) -> None:
        self.model = model
        self._thread: threading.Thread | None = None
        # Shared, under the lock of `_wake`.
        self._wake = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._stopping = False
        self.num_live = 0
        """Texts that wait or are computed."""

    def start(self) -> None:
        """Start the thread. It is a daemon and sleeps when there is nothing to do."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="elinvar-texts", daemon=True)
            self._thread.start()

    async def shutdown(self, timeout: float | None = None) -> None:
        """Refuse new tasks, finish those that wait, and stop the thread; after `timeout` seconds what
        still waits is given up."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is None:
            return
        await asyncio.to_thread(self._thread.join, timeout)
        with self._wake:
            waiting, self._jobs = list(self._jobs), deque()
        for job in waiting:
            job.settle(EngineError("The server ended this request before it was finished."))

    def check_alive(self) -> None:
        """Raises EngineError when it is shut down or never started."""
        if self._stopping:
            raise EngineError("The engine is shutting down; send the request to another one.")
        if self._thread is None:
            raise EngineError("The engine is not running; call start() first.")

    async def run(self, task: Task) -> F32:
        """The task's answer. Cancelling drops what is not computed yet. Raises InputError for a task
        without texts."""
        job = _Job(task)
        count = len(task.texts)
        if not count:
            raise InputError("input", "There must be at least one text.")
        with self._wake:
            self.check_alive()
            self._jobs.append(job)
            self.num_live += count
            self._wake.notify()
        try:
            return await job.future
        finally:
            with self._wake:
                self.num_live -= count
                if job in self._jobs:
                    self._jobs.remove(job)

    # What follows runs in the thread.

    def _work(self) -> None:
        while batch := self._take():
            texts = [job.task.texts[i] for job, i in batch]
            try:
                rows = batch[0][0].task.run(texts)
                for (job, i), row in zip(batch, rows, strict=True):
                    job.rows[i] = row
                for job in dict.fromkeys(job for job, _ in batch):
                    if job.taken == len(job.rows):  # those that were taken are computed
                        job.settle(job.task.finish(np.stack(job.rows)))
            except Exception as error:
                log.exception("A batch failed; its requests are given up.")
                self._fail({job for job, _ in batch}, error)

    def _take(self) -> list[tuple[_Job, int]]:
        """The texts of one batch, those whose turns they are; empty: stop."""
        with self._wake:
            while not self._jobs:
                if self._stopping:
                    return []
                self._wake.wait()
            run, blocks = self._jobs[0].task.run, 0
            turns = deque(job for job in self._jobs if job.task.run == run)
            batch: list[tuple[_Job, int]] = []
            while turns:
                job = turns.popleft()
                need = job.task.texts[job.taken].num_blocks
                if batch and blocks + need > self.model.batch_blocks:
                    break
                blocks += need
                batch.append((job, job.taken))
                job.taken += 1
                if job.taken < len(job.rows):
                    turns.append(job)
                else:
                    self._jobs.remove(job)
            self._jobs.rotate(-1)
            return batch

    def _fail(self, failed: set[_Job], error: Exception) -> None:
        with self._wake:
            self._jobs = deque(job for job in self._jobs if job not in failed)
        for job in failed:
            job.settle(EngineError(f"A step failed: {type(error).__name__}: {error}"))
