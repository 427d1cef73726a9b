"""Models on a Hugging Face hub: chosen files of one commit, resumed, verified.

Plain HTTP, as documented at https://huggingface.co/docs/hub/api: one listing, then one request a
file, pinned to the commit of the listing. A file grows in the work folder and is continued by the
next request, of this process or of a later one; then its size and hash are compared with the
listing's. HF_ENDPOINT names another hub; HF_TOKEN, or the file `hf auth login` writes, is sent
to the hub and to nobody else.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

from elinvar.base.errors import ModelError
from elinvar.weights.cache import CachedFile
from elinvar.weights.fetch import MODULE_FILE, Fetched, Progress, is_model_file, sha256

DEFAULT_ENDPOINT = "https://huggingface.co"
SILENCE_SECONDS = 15.0
"""A hub that says nothing for so long is taken as out of reach."""
RETRIES = 4
"""Times a download that broke off is continued without any progress in between."""
_CHUNK = 1 << 20
_NETWORK = (URLError, HTTPException, TimeoutError, ConnectionError)
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
class _Repository:
    path: str
    """ORG/NAME."""
    name: str
    """For messages: hf:ORG/NAME@REV."""


def endpoint() -> str:
    """The hub's address: $HF_ENDPOINT or the public one."""
    address = os.environ.get("HF_ENDPOINT", DEFAULT_ENDPOINT).rstrip("/")
    if not address.startswith(("http://", "https://")):
        raise ModelError(f"HF_ENDPOINT must begin with https://, and is {address!r}.")
    return address


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
    repo = _Repository(repository, f"hf:{repository}" + (f"@{revision}" if revision else ""))
    try:
        commit, listed = _list_files(repo, revision or "main")
        chosen = [listed[f] for f in _choose(repo.name, sorted(listed), file)]
        _download_all(repo, commit, chosen, work, progress)
    except _NETWORK as error:
        raise ModelError(_reason(repo, error)) from error
    for each in chosen:
        place = target / _place(each.name)
        place.parent.mkdir(exist_ok=True)
        _part(work, commit, each).replace(place)
    files = [CachedFile(_place(each.name), each.size, each.sha256) for each in chosen]
    return Fetched(commit, tuple(files))


@contextmanager
def _request(repo: _Repository, path: str, start: int = 0) -> Iterator[HTTPResponse]:
    """A GET from the hub, from byte `start` on. Raises ModelError for what the hub refuses."""
    # Bytes as they are stored: a compressed transfer could not be continued.
    request = Request(f"{endpoint()}{path}", headers={"Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    if token := _token():
        # Not sent on when the hub redirects to where it keeps the files.
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        response = urlopen(request, timeout=SILENCE_SECONDS)
    except HTTPError as error:
        raise ModelError(_refusal(repo, error)) from error
    with response:
        yield response


def _token() -> str | None:
    if token := os.environ.get("HF_TOKEN"):
        return token.strip()
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    path = Path(os.environ.get("HF_TOKEN_PATH", f"{home}/token")).expanduser()
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def _list_files(repo: _Repository, revision: str) -> tuple[str, dict[str, _Listed]]:
    """The commit behind `revision`, and its files by name."""
    path = f"/api/models/{repo.path}/revision/{quote(revision, safe='')}?blobs=true"
    with _request(repo, path) as response:
        raw = response.read()
    try:
        info = json.loads(raw)
        files = (_listed(entry) for entry in info["siblings"])
        return str(info["sha"]), {file.name: file for file in files}
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        ArithmeticError,
    ) as error:
        raise ModelError(
            f"{repo.name} cannot be pulled: {endpoint()} does not answer like a Hugging Face hub; "
            "check HF_ENDPOINT."
        ) from error


def _listed(entry: Any) -> _Listed:
    lfs, name = entry.get("lfs") or {}, str(entry["rfilename"])
    if "\0" in name or not name.isprintable():
        raise ValueError("no name for a file")
    return _Listed(name, int(entry["size"]), lfs.get("sha256"), entry["blobId"])


def _place(name: str) -> str:
    """Where a file of the repository lies in the cache: a GGUF file's folder is left out."""
    return name if MODULE_FILE.fullmatch(name) else Path(name).name


def _choose(name: str, listed: list[str], file: str | None) -> list[str]:
    """The files to download. A repository that has only GGUF files needs the user's choice."""
    if file is not None:
        if file not in listed:
            raise ModelError(f"{name} has no file {file!r}; it has {_some(listed)}.")
        if not file.endswith(".gguf"):
            raise ModelError(f"{file} of {name} is not a GGUF file; leave the file out: '{name}'.")
        return [file]
    ours = (f for f in listed if "/" not in f or MODULE_FILE.fullmatch(f))
    top = [f for f in ours if is_model_file(Path(f).name) and not f.endswith(".gguf")]
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
    repo: _Repository, commit: str, chosen: list[_Listed], work: Path, progress: Progress | None
) -> None:
    total, before = sum(file.size for file in chosen), 0
    for file in chosen:

        def report(done: int, before: int = before) -> None:
            if progress:
                progress(repo.name, before + done, total)

        _download(repo, commit, file, _part(work, commit, file), report)
        before += file.size


def _download(
    repo: _Repository, commit: str, wanted: _Listed, part: Path, report: Callable[[int], None]
) -> None:
    """Makes `part` the whole, verified file. A connection that breaks off is taken up again."""
    part.touch()
    failures = 0
    while (before := part.stat().st_size) < wanted.size:
        error: Exception = ConnectionError("the connection broke off")
        try:
            _continue(repo, commit, wanted, part, report)
        except _NETWORK as caught:
            error = caught
        failures = 0 if part.stat().st_size > before else failures + 1
        if failures > RETRIES:
            raise error
        time.sleep(0.2 * 2**failures if failures else 0)
    if part.stat().st_size != wanted.size or not _hash_fits(part, wanted):
        part.unlink()
        raise ModelError(
            f"{wanted.name} of {repo.name} does not match the hub's size or hash; pull it again."
        )


def _continue(
    repo: _Repository, commit: str, wanted: _Listed, part: Path, report: Callable[[int], None]
) -> None:
    """One request for what is missing of `part`; it may end early."""
    have = part.stat().st_size
    path = f"/{repo.path}/resolve/{commit}/{quote(wanted.name)}"
    with _request(repo, path, start=have) as response:
        continued = response.status == 206
        done = have if continued else 0
        with part.open("ab" if continued else "wb") as out:
            # read1 gives what has arrived, so that all of it is kept when the connection breaks.
            while chunk := response.read1(_CHUNK):
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


def _refusal(repo: _Repository, error: HTTPError) -> str:
    """One sentence for what a hub refuses (its X-Error-Code says why)."""
    code = error.headers.get("X-Error-Code", "")
    if code == "GatedRepo":
        return f"{repo.name} is gated; accept its terms at {endpoint()} and set HF_TOKEN."
    if code == "RevisionNotFound":
        return f"{repo.name} does not exist: the repository has no such revision."
    if code == "RepoNotFound" or error.code in (401, 404):
        return f"{repo.name} does not exist at {endpoint()}, or it is private; then set HF_TOKEN."
    return (
        f"{repo.name} cannot be pulled: {endpoint()} answered {error.code} {error.reason}; "
        "try again later."
    )


def _reason(repo: _Repository, error: Exception) -> str:
    cause = error.reason if isinstance(error, URLError) else error
    detail = " ".join(str(cause).split())[:200].rstrip(".") or type(cause).__name__
    return (
        f"{repo.name} cannot be pulled: the hub at {endpoint()} cannot be reached ({detail}); "
        "check the network and HF_ENDPOINT, or use a local file or a model from the package index "
        "('elinvar models --available' lists some)."
    )
