"""Loading a model at the terminal, with a bar for what takes long."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from elinvar.base.config import EngineConfig
from elinvar.base.errors import InputError
from elinvar.cli.options import format_size, named_flag
from elinvar.cli.terminal import bar, note
from elinvar.engine.core import Engine, LoadProgress
from elinvar.engine.llm import LLM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from elinvar.engine.embed import Embedder
    from elinvar.ops import Ops


def load(
    model: str,
    config: EngineConfig,
    chat_template: Path | None = None,
    wrap_ops: Callable[[Ops], Ops] | None = None,
    adapters: Sequence[tuple[str, str]] = (),
) -> LLM:
    """The model, ready to answer. Downloading and packing show a bar on a terminal.

    chat_template: a Jinja file that replaces the model's own template. wrap_ops: see Engine.load.
    adapters: names and folders of LoRA adapters.
    """
    source = None if chat_template is None else _read_template(chat_template)
    try:
        with _stages() as progress:
            llm = LLM(Engine.load(model, config, progress, wrap_ops))
    except InputError as error:
        raise named_flag(error) from None
    if source is not None:
        llm.engine.tokenizer.use_chat_template(source)
    for name, path in adapters:
        llm.load_adapter(name, path)
    return llm


def pulled(model: str) -> Path:
    """Where the model's files are."""
    from elinvar.weights.sources import resolve

    with _stages() as progress:
        return resolve(model, lambda what, done, total: progress(what, done, total or 0))


def load_embedder(model: str, config: EngineConfig, ranking: bool = False) -> Embedder:
    """The same for an embedding model or a reranker; what was assumed of it is noted."""
    from elinvar.engine.embed import Embedder
    from elinvar.engine.text_model import TextModel

    with _stages() as progress:
        embedder = Embedder(TextModel.load(model, config, progress))
    if assumed := embedder.model.notes(ranking):
        note(assumed)
    return embedder


@contextmanager
def _stages() -> Iterator[LoadProgress]:
    """A bar for each stage of loading."""
    with ExitStack() as stack:
        current = ""
        update: Callable[[float, str], None]

        def progress(stage: str, done: int, total: int) -> None:
            nonlocal current, update
            if stage != current:
                stack.close()
                current, update = stage, stack.enter_context(bar(stage, total or None))
            of = f" of {format_size(total)}" if total else ""
            update(done, format_size(done) + of)

        yield progress


def _read_template(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise InputError("chat_template", f"{path} is not a UTF-8 text file.") from None
