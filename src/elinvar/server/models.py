"""The models of a server by name: loaded when they are asked for, dropped when memory is needed.

Owns which of them run. Whoever uses a model keeps it: one is dropped only while nobody does, the one
that was used longest ago first.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from elinvar.base.errors import ElinvarError
from elinvar.server.errors import ApiError, invalid_value, too_many, unavailable, unknown_model
from elinvar.server.served import Served, Target
from elinvar.server.tenants import allowed_models

if TYPE_CHECKING:
    from starlette.types import Scope

    from elinvar.engine.aio import AsyncEngine
    from elinvar.engine.text_aio import AsyncTextModel

log = logging.getLogger(__name__)

DEFAULT = "default"
"""The name under which the default model answers, too, where no other has it."""
_PATIENCE_S = 60.0
"""How long a request waits for another model to be done with before this one can be loaded."""

Loader = Callable[[], Awaitable[Served]]


@dataclass(slots=True, eq=False)
class Entry:
    """A model that is or can be loaded."""

    name: str
    load: Loader
    num_bytes: int
    """What it is thought to take: its weights and its KV cache."""
    served: Served | None = None
    users: int = 0
    last_used: float = 0.0

    @property
    def sleeps(self) -> bool:
        """It is loaded, and takes no memory."""
        return self.served is not None and self.served.core.is_asleep

    @classmethod
    def loaded(cls, served: Served) -> Entry:
        """One that is there from the start, and stays."""
        return cls(served.name, _never, 0, served)


class Beside(Protocol):
    """A model that generates no text, but vectors or scores of texts."""

    name: str
    engine: AsyncTextModel

    @property
    def described(self) -> dict[str, Any]:
        """As /v1/models shows it."""
        ...


class Models:
    """Names are those of models, of their aliases and of the LoRA adapters of those that are loaded."""

    def __init__(
        self,
        entries: Sequence[Entry],
        *,
        default: str | None = None,
        aliases: Mapping[str, str] | None = None,
        max_bytes: int | None = None,
        beside: Sequence[Beside] = (),
    ) -> None:
        """default: the first one, where it is not said. max_bytes: of all that are loaded at once;
        None: all of them may be. beside: what else this server has, and is always loaded."""
        self._beside = {one.name: one for one in beside}
        self._entries = {entry.name: entry for entry in entries}
        self.default = default or entries[0].name
        self._aliases = {DEFAULT: self.default} if DEFAULT not in self._entries else {}
        self._aliases |= aliases or {}
        self._max_bytes = max_bytes
        # One loads or drops at a time: two at once would take memory that only one was given.
        self._changing = asyncio.Lock()
        self._freed = asyncio.Event()

    @classmethod
    def of(cls, served: Served) -> Models:
        return cls([Entry.loaded(served)])

    # ---- names ------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Of all that may be asked for, but for `default`."""
        names = []
        for entry in self._entries.values():
            names.append(entry.name)
            names += [alias for alias, name in self._aliases.items() if name == entry.name]
            if entry.served is not None:
                names += entry.served.core.adapters.names
        names = [name for name in names if name != DEFAULT or name in self._entries]
        return [*names, *self._beside]

    @property
    def own_names(self) -> set[str]:
        """Names that no adapter may take."""
        return {*self._entries, *self._aliases, *self._beside}

    @property
    def loaded(self) -> list[Served]:
        return [entry.served for entry in self._entries.values() if entry.served is not None]

    def names_for(self, scope: Scope) -> list[str]:
        """Those that whoever sent the request of `scope` may ask for."""
        allowed = allowed_models(scope)
        return [name for name in self.names if allowed is None or name in allowed]

    def describe(self, scope: Scope, name: str) -> dict[str, Any]:
        """As /v1/models shows it. Raises ApiError 404."""
        if name in self._beside and self._may_ask(scope, name):
            return self._beside[name].described
        entry, _ = self._find(scope, name)
        model: dict[str, Any] = {"id": name, "object": "model", "owned_by": "elinvar"}
        served = entry.served
        model["created"] = int(time.time()) if served is None else served.created
        model["status"] = "unloaded" if served is None else "loaded"
        if served is not None:
            model["max_context"] = served.core.max_context
        return model if entry.name == name else model | {"parent": entry.name}

    def look(self, scope: Scope, name: str) -> tuple[Served | None, str | None]:
        """The model of this name, where it is loaded, and its adapter. Raises ApiError 404."""
        if name in self._beside and self._may_ask(scope, name):
            return None, None
        entry, adapter = self._find(scope, name)
        return entry.served, adapter

    def has(self, scope: Scope, name: str) -> bool:
        """Whether whoever sent the request of `scope` may ask for it."""
        if name in self._beside:
            return self._may_ask(scope, name)
        try:
            self._find(scope, name)
        except ApiError:
            return False
        return True

    @staticmethod
    def _may_ask(scope: Scope, name: str) -> bool:
        allowed = allowed_models(scope)
        return allowed is None or name in allowed

    def _find(self, scope: Scope, name: str) -> tuple[Entry, str | None]:
        """The entry, and the adapter that the name is of."""
        if self._may_ask(scope, name):
            if name in self._beside:
                raise invalid_value("model", f"'{name}' generates no text, but vectors or scores.")
            found = self._entries.get(self._aliases.get(name, name))
            if found is not None:
                return found, None
            for entry in self._entries.values():
                if entry.served is not None and name in entry.served.core.adapters.names:
                    return entry, name
        raise unknown_model(name, self.names_for(scope))

    # ---- use --------------------------------------------------------------------------------

    async def use(self, scope: Scope, name: str) -> Target:
        """The model of this name, which stays until the request of `scope` has ended. Raises
        ApiError: 404 for a name that is unknown, 503 where it cannot be loaded now."""
        entry, adapter = self._find(scope, name)
        served = await self._take(entry)
        scope.setdefault("elinvar.releases", []).append(lambda: self._release(entry))
        return Target(served, adapter)

    @asynccontextmanager
    async def using(self, scope: Scope, name: str) -> AsyncIterator[Target]:
        """The same for what outlives its HTTP request."""
        entry, adapter = self._find(scope, name)
        served = await self._take(entry)
        try:
            yield Target(served, adapter)
        finally:
            self._release(entry)

    async def _take(self, entry: Entry) -> Served:
        entry.users += 1
        entry.last_used = time.monotonic()
        end = entry.last_used + _PATIENCE_S
        try:
            while entry.served is None:
                await self._load(entry, end)
            return entry.served
        except BaseException:
            self._release(entry)
            raise

    def _release(self, entry: Entry) -> None:
        entry.users -= 1
        entry.last_used = time.monotonic()
        if not entry.users:
            self._freed.set()

    async def _load(self, entry: Entry, end: float = math.inf) -> None:
        """end: until when others are waited for."""
        async with self._changing:
            if entry.served is not None:
                return
            await self._make_room(entry, end)
            log.info("Loading %s.", entry.name)
            try:
                served = await _whole(entry.load())
            except ElinvarError as error:
                log.error("Cannot load %s: %s", entry.name, error)
                raise unavailable(f"The model '{entry.name}' cannot be loaded: {error}") from None
            served.engine.start()
            entry.served = served

    async def _make_room(self, entry: Entry, end: float) -> None:
        """Drop others until this one fits; wait where all of them are in use."""
        if self._max_bytes is None:
            return
        while others := [one for one in self._there if not one.sleeps]:  # alone it may take any
            if sum(one.num_bytes for one in others) + entry.num_bytes <= self._max_bytes:
                return
            idle = [one for one in others if not one.users]
            if idle:
                await self._drop(min(idle, key=lambda one: one.last_used))
                continue
            self._freed.clear()
            try:
                async with asyncio.timeout(max(0.0, end - time.monotonic())):
                    await self._freed.wait()
            except TimeoutError:
                message = f"The models that are loaded are in use, and '{entry.name}' does not fit "
                raise too_many(message + "beside them; try again later.", 10.0) from None

    @property
    def _there(self) -> list[Entry]:
        return [one for one in self._entries.values() if one.served is not None]

    async def _drop(self, entry: Entry) -> None:
        served, entry.served = entry.served, None
        assert served is not None
        log.info("Dropping %s, which was used longest ago.", entry.name)
        await served.engine.shutdown(0.0)

    # ---- sleep ------------------------------------------------------------------------------

    def asleep(self, scope: Scope, name: str | None) -> dict[str, bool]:
        """Of each loaded model whether it sleeps, or of this one. Raises ApiError 404."""
        return {one.name: one.sleeps for one in self._named(scope, name)}

    async def sleep(self, scope: Scope, name: str | None, abort: bool) -> None:
        """See AsyncEngine.sleep; of all that are loaded, or of this one. Raises ApiError 404."""
        engines = [one.served.engine for one in self._named(scope, name) if one.served is not None]
        await asyncio.gather(*(engine.sleep(abort) for engine in engines))

    async def wake(self, scope: Scope, name: str | None) -> None:
        """The same the other way; others are dropped where there is no room. Raises ApiError: 404, 429
        where they are in use, EngineError where there is no memory."""
        for entry in self._named(scope, name):
            async with self._changing:
                if entry.served is not None and entry.sleeps:
                    await self._make_room(entry, time.monotonic() + _PATIENCE_S)
                    await entry.served.engine.wake()

    def _named(self, scope: Scope, name: str | None) -> list[Entry]:
        """Those that are loaded, of this name where it is given."""
        if name is None:
            return self._there
        entry, _ = self._find(scope, name)
        return [entry] if entry.served is not None else []

    # ---- the life of all --------------------------------------------------------------------

    async def start(self) -> None:
        """Starts those that are loaded; loads the default one where none is."""
        for one in self._beside.values():
            one.engine.start()
        for served in self.loaded:
            served.engine.start()
        if not self.loaded:
            await self._load(self._entries[self.default])

    async def shutdown(self, timeout_s: float) -> None:
        await asyncio.gather(*(engine.shutdown(timeout_s) for engine in self._engines))

    def check_alive(self) -> None:
        """Raises EngineError where one of them stopped."""
        for engine in self._engines:
            engine.check_alive()

    def check_awake(self) -> None:
        """Raises ApiError 503 where every model that is loaded sleeps."""
        if self._there and all(one.sleeps for one in self._there):
            raise unavailable("The model is asleep: POST /wake_up wakes it up.")

    @property
    def _engines(self) -> list[AsyncEngine | AsyncTextModel]:
        beside = [one.engine for one in self._beside.values()]
        return [*(served.engine for served in self.loaded), *beside]


async def _whole(loading: Awaitable[Served]) -> Served:
    """Whoever is cancelled meanwhile waits, too: a thread cannot be stopped, and what it loads must
    not take memory that another model is given."""
    task = asyncio.ensure_future(loading)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


async def _never() -> Served:
    raise AssertionError("it is loaded from the start")
