"""One model that answers, and the models of a server by name.

Owns which of them a request means. An endpoint takes one for as long as its request lives.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from elinvar.server.errors import unknown_model
from elinvar.server.service import Service
from elinvar.server.tokens import TokenNames

if TYPE_CHECKING:
    from starlette.types import Scope

    from elinvar.engine.aio import AsyncEngine
    from elinvar.engine.core import Engine


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """A model that runs, with what its endpoints share."""

    name: str
    engine: AsyncEngine
    service: Service
    names: TokenNames
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(cls, name: str, engine: AsyncEngine, max_waiting: int) -> Served:
        """max_waiting: answers that may wait beyond the rows that run."""
        core = engine.engine
        service = Service(engine, core.config.max_rows + max_waiting)
        return cls(name, engine, service, TokenNames(core.tokenizer))

    @property
    def core(self) -> Engine:
        return self.engine.engine


@dataclass(frozen=True, slots=True)
class Target:
    """Whom a request is for."""

    served: Served
    adapter: str | None
    """Its LoRA adapter: they are models of their own names."""


class Models:
    """The models that this server has."""

    def __init__(self, served: Sequence[Served]) -> None:
        self._served = {one.name: one for one in served}

    @property
    def names(self) -> list[str]:
        """Of all that may be asked for."""
        return [name for one in self._served.values() for name in _names(one)]

    async def use(self, scope: Scope, name: str) -> Target:
        """The model of this name, which stays until the request of `scope` has ended. Raises
        ApiError 404."""
        return self.find(name)

    def find(self, name: str) -> Target:
        for one in self._served.values():
            if name == one.name:
                return Target(one, None)
            if name in one.core.adapters.names:
                return Target(one, name)
        raise unknown_model(name, self.names)

    def describe(self, name: str) -> dict[str, Any]:
        """As /v1/models shows it."""
        target = self.find(name)
        served = target.served
        model: dict[str, Any] = {
            "id": name,
            "object": "model",
            "created": served.created,
            "owned_by": "elinvar",
            "max_context": served.core.max_context,
        }
        return model if target.adapter is None else model | {"parent": served.name}


def _names(served: Served) -> list[str]:
    return [served.name, *served.core.adapters.names]
