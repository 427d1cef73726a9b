"""One model that answers, and whom a request is for."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from elinvar.engine.dialects.detect import dialect_for
from elinvar.engine.dialects.dialect import Dialect
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
    dialect: Dialect
    """How it writes thoughts and calls of tools."""
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(
        cls, name: str, engine: AsyncEngine, max_waiting: int, dialect: str | None = None
    ) -> Served:
        """max_waiting: answers that may wait beyond the rows that run. dialect: its name, where it is
        not to be told from the chat template. Raises InputError where there is none of it."""
        core = engine.engine
        service = Service(engine, core.config.max_rows + max_waiting)
        told = dialect_for(core.tokenizer, core.model_config.family, dialect)
        return cls(name, engine, service, TokenNames(core.tokenizer), told)

    @property
    def thinks(self) -> bool:
        """Whether its answers may begin with a thought: its vocabulary or its template knows how."""
        opening = self.dialect.opening
        template = self.core.tokenizer.chat_template
        if opening is None:
            return False
        return opening in self.dialect.tokens or (
            template is not None and opening in template.tool_source
        )

    @property
    def core(self) -> Engine:
        return self.engine.engine


@dataclass(frozen=True, slots=True)
class Target:
    """Whom a request is for."""

    served: Served
    adapter: str | None
    """Its LoRA adapter: they are models of their own names."""
