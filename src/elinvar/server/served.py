"""One model that answers, and whom a request is for."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from elinvar.server.service import Service
from elinvar.server.tokens import TokenNames

if TYPE_CHECKING:
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
