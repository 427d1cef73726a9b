"""Elinvar: language models whose results do not depend on how the work was scheduled.

    from elinvar import LLM, SamplingParams
    print(LLM("smollm2-135m").generate("Once upon a time")[0].text)

Names are loaded when they are first used, so that `import elinvar` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elinvar.base.config import EngineConfig
    from elinvar.base.errors import ElinvarError, EngineError, InputError, ModelError
    from elinvar.base.handling import Handling
    from elinvar.base.sampling import SamplingParams
    from elinvar.engine.aio import AsyncEngine
    from elinvar.engine.chat import ChatOptions
    from elinvar.engine.core import Engine
    from elinvar.engine.embed import Embedder, Embedding, Ranked
    from elinvar.engine.llm import LLM
    from elinvar.engine.output import Completion, Delta

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncEngine",
    "ChatOptions",
    "Completion",
    "Delta",
    "ElinvarError",
    "Embedder",
    "Embedding",
    "Engine",
    "EngineConfig",
    "EngineError",
    "Handling",
    "InputError",
    "ModelError",
    "Ranked",
    "SamplingParams",
    "__version__",
]

_HOMES = {
    "LLM": "engine.llm",
    "AsyncEngine": "engine.aio",
    "ChatOptions": "engine.chat",
    "Completion": "engine.output",
    "Delta": "engine.output",
    "ElinvarError": "base.errors",
    "Embedder": "engine.embed",
    "Embedding": "engine.embed",
    "Engine": "engine.core",
    "EngineConfig": "base.config",
    "EngineError": "base.errors",
    "Handling": "base.handling",
    "InputError": "base.errors",
    "ModelError": "base.errors",
    "Ranked": "engine.embed",
    "SamplingParams": "base.sampling",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
