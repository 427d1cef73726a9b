"""open_checkpoint: one view of a model's files, whatever their format.

Owns the choice of format and the fingerprint. Never unpickles anything.
"""

from __future__ import annotations

import contextlib
import glob
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from elinvar.base.digest import blake2b
from elinvar.base.errors import ModelError
from elinvar.weights.atomic import atomic_file
from elinvar.weights.gguf import MAGIC, read_gguf
from elinvar.weights.nested import text_part
from elinvar.weights.safetensors import SINGLE, read_json, read_safetensors
from elinvar.weights.schemes import assemble
from elinvar.weights.tensor import HostTensor, MappedFile

Format = Literal["gguf", "safetensors"]

_PART = 16 << 20
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


@dataclass(slots=True, eq=False)
class Checkpoint:
    """A model's description and its tensors as stored, mapped from disk."""

    path: Path
    """The GGUF file, or the Hugging Face folder."""
    format: Format
    architecture: str
    """GGUF general.architecture ("llama") or config.json architectures[0]
    ("LlamaForCausalLM")."""
    metadata: dict[str, Any]
    """GGUF key-values (see gguf.GGUFFile for their types), or config.json (of a model that also sees
    or hears what it says of the text: weights.nested)."""
    tensors: dict[str, HostTensor]
    fingerprint: str
    """64 hex digits; changes when the model changes. Cheap: sizes, times and headers."""
    _files: Sequence[MappedFile] = field(default=(), repr=False)

    def content_digest(self, cache: Path, progress: Callable[[int, int], None]) -> str:
        """64 hex digits of all that the files hold, whatever their names and times: the same for
        everybody who has a copy. Read once, then remembered in `cache` for this fingerprint.
        progress: told the bytes done and in all."""
        known = cache / "digests" / self.fingerprint
        with contextlib.suppress(OSError):
            if len(told := known.read_text("ascii")) == 64:
                return told
        digest = blake2b(digest_size=32)
        if self.format == "safetensors":
            digest.update(json.dumps(self.metadata, sort_keys=True, default=repr).encode())
        done, total = 0, sum(file.size for file in self._files)
        for file in self._files:
            digest.update(file.size.to_bytes(8, "little"))
            for start in range(0, file.size, _PART):
                part = file.view[start : start + _PART]
                digest.update(part)
                done += len(part)
                file.release()
                progress(done, total)
        with contextlib.suppress(OSError, ModelError):
            known.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(known, 64) as file_:
                file_.write(digest.hexdigest().encode())
        return digest.hexdigest()

    def release(self) -> None:
        """Gives the memory of the tensors read so far back to the system."""
        for file in self._files:
            file.release()

    def close(self) -> None:
        """Unmaps the files. Tensors that are still held elsewhere keep theirs mapped."""
        self.tensors.clear()
        for file in self._files:
            file.close()


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a *.gguf file, a Hugging Face folder, or a folder that holds a single GGUF file.

    Raises ModelError, with the remedy, for anything else and for damaged files.
    """
    try:
        return _open(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error


def _open(path: Path) -> Checkpoint:
    if path.is_dir():
        if (path / "config.json").exists() and any(path.glob("*.safetensors*")):
            return _open_folder(path)
        return _open_gguf(_only_gguf(path))
    if not path.exists():
        raise ModelError(f"{path} does not exist; give a *.gguf file or a Hugging Face folder.")
    if path.suffix in _PICKLES:
        raise ModelError(_pickle_message(path))
    if path.suffix == ".safetensors":
        raise ModelError(f"{path} is one file of a model; give the folder that holds config.json.")
    if path.suffix != ".gguf":
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise ModelError(
                    f"{path} is not a model file; give a *.gguf file or a Hugging Face folder."
                )
    return _open_gguf(path)


def _open_gguf(path: Path) -> Checkpoint:
    gguf = read_gguf(path)
    architecture = gguf.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        gguf.file.close()
        raise ModelError(f"{path} has no general.architecture; convert the model again.")
    fingerprint = _hash(["gguf", gguf.file.size, gguf.file.mtime_ns, gguf.header_hash])
    return Checkpoint(
        path, "gguf", architecture, gguf.metadata, gguf.tensors, fingerprint, (gguf.file,)
    )


def _open_folder(folder: Path) -> Checkpoint:
    config_path = folder / "config.json"
    config = read_json(config_path)
    architectures = config.get("architectures")
    named = isinstance(architectures, list) and architectures and architectures[0]
    if architectures is None and "medusa_num_heads" in config:  # published without
        named = "MedusaModel"
    if not isinstance(named, str):
        raise ModelError(f"{config_path} names no architecture under 'architectures'.")
    files, tensors = read_safetensors(folder)
    settings, told = _quantization(folder, config)
    try:
        if settings is not None:
            tensors = assemble(folder, settings, tensors)
        config, tensors = text_part(folder, config, tensors)
    except ModelError:
        tensors.clear()
        for file in files:
            file.close()
        raise
    parts = [part for file in files for part in (file.path.name, file.size, file.mtime_ns)]
    fingerprint = _hash(["safetensors", config_path.read_bytes(), *told, *parts])
    return Checkpoint(folder, "safetensors", named, config, tensors, fingerprint, files)


def _quantization(folder: Path, config: Mapping[str, Any]) -> tuple[object, list[bytes]]:
    """What the folder says of its quantisation, None for nothing, and what else to hash for it:
    ModelOpt once wrote a file of its own."""
    settings, path = config.get("quantization_config"), folder / "hf_quant_config.json"
    if settings is not None or not path.exists():
        return settings, []
    own = read_json(path).get("quantization")
    settings = {"quant_method": "modelopt"} | (own if isinstance(own, dict) else {})
    return settings, [path.read_bytes()]


def _only_gguf(folder: Path) -> Path:
    found = sorted(folder.glob("*.gguf"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(path.name for path in found[:5])
        raise ModelError(f"{folder} holds {len(found)} GGUF files ({names}); name one of them.")
    pickles = sorted(path for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        weights = (path for path in pickles if path.match("pytorch_model*"))
        raise ModelError(_pickle_message(next(weights, pickles[0])))
    missing = "*.safetensors" if (folder / "config.json").exists() else "config.json"
    raise ModelError(
        f"{folder} is not a model: it holds no {missing} and no *.gguf; give a *.gguf file or a "
        "Hugging Face folder."
    )


def _pickle_message(path: Path) -> str:
    """With a command that opens tensors and nothing else (weights_only)."""
    parts = "pytorch_model*.bin"
    one_of_many = path.match(parts)
    files = glob.escape(str(path.parent if one_of_many else path))
    files += f"/{parts}" if one_of_many else ""
    code = (
        "import glob, torch, safetensors.torch as s; s.save_file({k: v.contiguous().clone() for f in "
        f"glob.glob({json.dumps(files)}) for k, v in torch.load(f, weights_only=True).items()}}, "
        f"{json.dumps(str(path.parent / SINGLE))})"
    )
    return (
        f"{path} is a pickle, which can run code when opened; python3 -c {shlex.quote(code)} makes "
        f"{SINGLE} of it where torch and safetensors are installed."
    )


def _hash(parts: Sequence[object]) -> str:
    digest = blake2b(digest_size=32)
    for part in parts:
        raw = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()
