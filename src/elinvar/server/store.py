"""What the server keeps for its clients: one SQLite database and the files beside it, in a folder that
is made when there is something to keep.

    lock       held by the server that uses the folder
    state.db   responses, files and batches
    files/     contents of uploaded files and of batches' output

All of SQLite runs in one thread of its own: neither steps nor streams wait for a disk.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

from elinvar.base.errors import ElinvarError
from elinvar.server.errors import ApiError, no_room, unavailable

log = logging.getLogger(__name__)

Got = TypeVar("Got")
Connection = sqlite3.Connection

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SCHEMA = """
CREATE TABLE responses (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, status TEXT NOT NULL, previous TEXT,
    created REAL NOT NULL, used REAL NOT NULL, bytes INTEGER NOT NULL, inputs INTEGER NOT NULL,
    body BLOB NOT NULL, request BLOB, events BLOB
);
CREATE INDEX responses_used ON responses (tenant, used);
CREATE TABLE items (
    response TEXT NOT NULL REFERENCES responses (id) ON DELETE CASCADE,
    position INTEGER NOT NULL, id TEXT NOT NULL, item BLOB NOT NULL,
    PRIMARY KEY (response, position)
) WITHOUT ROWID;
CREATE INDEX items_id ON items (id);
CREATE TABLE files (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, purpose TEXT NOT NULL, name TEXT NOT NULL,
    bytes INTEGER NOT NULL, created REAL NOT NULL, expires REAL NOT NULL
);
CREATE INDEX files_tenant ON files (tenant, created);
CREATE TABLE batches (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, status TEXT NOT NULL, created REAL NOT NULL,
    input TEXT NOT NULL, body BLOB NOT NULL
);
CREATE INDEX batches_tenant ON batches (tenant, created);
CREATE TABLE results (
    batch TEXT NOT NULL REFERENCES batches (id) ON DELETE CASCADE,
    line INTEGER NOT NULL, good INTEGER NOT NULL, result BLOB NOT NULL,
    PRIMARY KEY (batch, line)
) WITHOUT ROWID;
"""
_VERSION = 1


def state_root() -> Path:
    """$XDG_STATE_HOME/elinvar, else ~/.local/state/elinvar. It may not exist yet."""
    if xdg := os.environ.get("XDG_STATE_HOME"):
        return Path(xdg).expanduser() / "elinvar"
    return Path.home() / ".local" / "state" / "elinvar"


class Store:
    def __init__(self, folder: Path | None = None) -> None:
        """folder None: one that ends with the server. Raises ElinvarError for a folder that is
        there and cannot be used."""
        self._given = folder
        self._folder: Path | None = None
        self._db: Connection | None = None
        self._lock: BinaryIO | None = None
        self._fails = False
        """It did of late, and the log says so."""
        self._thread = ThreadPoolExecutor(1, "elinvar-state")
        if self.has_something:
            self._thread.submit(self._check).result()

    @property
    def has_something(self) -> bool:
        """Whether anything was kept before."""
        return self._given is not None and (self._given / "state.db").exists()

    @property
    def files(self) -> Path:
        """The folder of contents; there once `run` has run."""
        assert self._folder is not None
        return self._folder / "files"

    async def run(self, task: Callable[[Connection], Got]) -> Got:
        """What `task` returns, in a transaction of its own: all of it happens, or nothing. Raises
        ApiError 507 where the disk is full, 503 where the folder cannot be used."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, task)

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown()

    def _run(self, task: Callable[[Connection], Got]) -> Got:
        try:
            db = self._opened()
            with db:
                db.execute("BEGIN IMMEDIATE")
                done = task(db)
        except (sqlite3.OperationalError, OSError, ElinvarError) as error:
            raise self.as_told(error) from error
        self._fails = False
        return done

    def as_told(self, error: Exception) -> ApiError:
        """What the client is told of a disk that does not do what it should. Where that is, the log
        tells, once until something is stored again."""
        if not self._fails:
            log.error("%s", self._trouble(error))
        self._fails = True
        if is_full(error):
            return no_room("The server's disk is full; try again when whoever runs it made room.")
        return unavailable(
            "The server can store nothing now; whoever runs it finds why in its log."
        )

    def _trouble(self, error: Exception) -> str:
        folder = self._folder or self._given
        if is_full(error):
            return f"The disk of the state folder {folder} is full; make room."
        if isinstance(error, ElinvarError):
            return str(error)
        return f"The state folder {folder} cannot be used: {error}."

    def _check(self) -> None:
        try:
            self._opened()
        except (sqlite3.Error, OSError) as error:
            raise ElinvarError(self._trouble(error)) from error

    def _opened(self) -> Connection:
        if self._db is None:
            try:
                self._db = self._open()
            except (sqlite3.DatabaseError, OSError) as error:
                if is_full(error):
                    raise
                raise ElinvarError(
                    f"The state folder {self._given} cannot be used: {error}; give another one "
                    "with --state-dir."
                ) from error
        return self._db

    def _open(self) -> Connection:
        folder = self._given or Path(tempfile.mkdtemp(prefix="elinvar-state-"))
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / "files").mkdir(exist_ok=True)
        if self._lock is None:
            self._lock = _locked(folder)
        self._folder = folder
        # Transactions are begun by hand: this module's sees the schema change in one, too.
        db = sqlite3.connect(folder / "state.db", isolation_level=None)
        try:
            for setting in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
                db.execute(f"PRAGMA {setting}")
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version > _VERSION:
                raise ElinvarError(
                    f"The state folder {folder} was written by a newer Elinvar; give another one "
                    "with --state-dir."
                )
            if version < 1:
                db.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version={_VERSION};COMMIT;")
        except BaseException:
            db.close()
            raise
        return db

    def _close(self) -> None:
        if self._db is not None:
            self._db.close()
        if self._lock is not None:
            self._lock.close()
        if self._given is None and self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._db = self._lock = self._folder = None


def _locked(folder: Path) -> BinaryIO:
    file = (folder / "lock").open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ElinvarError(
            f"The state folder {folder} is in use by another server; give this one another with "
            "--state-dir."
        ) from None
    except OSError:
        pass  # a file system without locks
    return file


def is_full(error: Exception) -> bool:
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    return isinstance(error, OSError) and error.errno in FULL
