"""Loading a model at the terminal, with a bar for what takes long."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from elinvar.base.config import EngineConfig
from elinvar.cli.options import format_size
from elinvar.cli.terminal import bar
from elinvar.engine.llm import LLM

if TYPE_CHECKING:
    from collections.abc import Callable


def load(model: str, config: EngineConfig) -> LLM:
    """The model, ready to answer. Downloading and packing show a bar on a terminal."""
    with ExitStack() as stack:
        current = ""
        update: Callable[[float, str], None]

        def progress(stage: str, done: int, total: int) -> None:
            nonlocal current, update
            if stage != current:
                stack.close()
                current, update = stage, stack.enter_context(bar(stage, total or None))
            update(done, f"{100 * done // total} %" if total else format_size(done))

        options = {name: getattr(config, name) for name in config.__slots__}
        return LLM(model, progress=progress, **options)
