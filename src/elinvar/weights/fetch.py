"""What the fetchers of every source share: which files a model is made of, hashing, progress."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from elinvar.weights.cache import CachedFile, folder_bytes

Progress = Callable[[str, int, int | None], None]
"""Called as progress(what, bytes so far, bytes in all or None where unknown)."""

GGUF_PART = re.compile(r"(?P<name>.+\.gguf)\.part-?(?P<index>\d+)")
"""A GGUF file cut in pieces, for indexes that limit a file's size."""

MODULE_FILE = re.compile(r"\d+_\w+/[\w.-]+|additional_chat_templates/[\w-]+\.jinja")
"""In the folder of a part of an embedding model, as sentence-transformers numbers them, or a chat
template with a name."""

_NAMES = {
    *("config.json", "generation_config.json", "special_tokens_map.json"),
    *("hf_quant_config.json", "vocab.txt", "modules.json"),
    *("config_sentence_transformers.json", "sentence_bert_config.json"),
    *("tekken.json", "tiktoken.model", "spiece.model", "vocab.json", "merges.txt"),
}
_ENDINGS = (".gguf", ".safetensors", ".safetensors.index.json", ".tiktoken", ".jinja")
POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a fetcher left in the folder it was given."""

    revision: str
    files: tuple[CachedFile, ...]


def is_model_file(name: str) -> bool:
    """Whether a file of this name (without its folder) belongs to a model."""
    return (
        name in _NAMES
        or name.endswith(_ENDINGS)
        or name.startswith(("tokenizer", "chat_template"))
        or GGUF_PART.fullmatch(name) is not None
    )


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    import hashlib  # loads OpenSSL, which only downloads need

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def watching(
    folder: Path, what: str, total: Callable[[], int | None], progress: Progress | None
) -> Iterator[None]:
    """Reports how many bytes lie under `folder` while somebody else downloads into it.

    Watching the folder works with every version of pip; what it prints does not stay the same."""
    if progress is None:
        yield
        return
    done = threading.Event()

    def report() -> None:
        while not done.wait(POLL_SECONDS):
            size, most = folder_bytes(folder), total()
            # pip holds a file twice for a moment, when it moves it from one place to another.
            progress(what, size if most is None else min(size, most), most)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
