"""/v1/files through the official client, and forms cut anywhere."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elinvar.server import file_store as files
from elinvar.server.errors import ApiError
from elinvar.server.multipart import Begin, Multipart
from serving import Serving, serving


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files") / "state"


@pytest.fixture(scope="module")
def tiny(tiny_gguf: Path, state: Path) -> Iterator[Serving]:
    with serving(tiny_gguf, "tiny", state_dir=state) as running:
        assert not state.exists()  # nothing is made before there is something to keep
        yield running


@pytest.fixture(scope="module")
def client(tiny: Serving) -> openai.OpenAI:
    return tiny.client()


def test_a_file_comes_and_goes(client: openai.OpenAI, state: Path) -> None:
    content = os.urandom(3_000_000)
    made = client.files.create(file=("näme.jsonl", content), purpose="batch")
    assert (made.bytes, made.filename, made.purpose) == (len(content), "näme.jsonl", "batch")
    assert made.expires_at is not None and made.status == "processed"
    assert client.files.content(made.id).content == content
    assert client.files.retrieve(made.id) == made
    assert client.files.delete(made.id).deleted
    for call in (client.files.retrieve, client.files.delete, client.files.content):
        with pytest.raises(openai.NotFoundError):
            call(made.id)
    assert list((state / "files").iterdir()) == []
    assert (state.stat().st_mode & 0o777) == 0o700


def test_lists(client: openai.OpenAI) -> None:
    made = [client.files.create(file=(f"{i}", b"x"), purpose="batch") for i in range(5)]
    ids = [one.id for one in made]
    assert [one.id for one in client.files.list(order="asc", limit=2)] == ids
    assert [one.id for one in client.files.list(after=ids[3])] == ids[2::-1]
    assert list(client.files.list(purpose="batch_output")) == []
    for name in ids:
        client.files.delete(name)


def test_expiry(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    wish: Any = {"anchor": "created_at", "seconds": 3600}
    made = client.files.create(file=b"x", purpose="batch", expires_after=wish)
    assert made.expires_at == made.created_at + 3600
    now = files.time.time()
    monkeypatch.setattr(files.time, "time", lambda: now + 3700)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)
    assert list(client.files.list()) == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"purpose": "vision"}, "purpose"),
        ({}, "purpose"),
        ({"purpose": "batch", "colour": "red"}, "colour"),
        ({"purpose": "batch", "expires_after[anchor]": "now"}, "expires_after.anchor"),
        ({"purpose": "batch", "expires_after[anchor]": "created_at"}, "expires_after.seconds"),
        ({"purpose": "x" * 5000}, "purpose"),
    ],
)
def test_refusals(tiny: Serving, state: Path, fields: dict[str, str], param: str) -> None:
    url = f"{tiny.url}/v1/files"
    answer = httpx.post(url, data=fields, files={"file": ("f", b"x")})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param
    assert httpx.post(url, data={"purpose": "batch"}, files={"other": b"x"}).status_code == 400
    assert httpx.post(url, json={"purpose": "batch"}).status_code == 400
    head = {"content-type": "multipart/form-data; boundary=x"}
    assert httpx.post(url, content=b"--x\r\nbroken", headers=head).status_code == 400
    assert not [path for path in (state / "files").iterdir() if path.suffix == ".part"]


@pytest.mark.parametrize("name", ["unicode_escape''%5Cud800", "utf-7''+2AA-", "idna''%ff", "\0''x"])
def test_names_in_any_charset(tiny: Serving, name: str) -> None:
    head = {"content-type": "multipart/form-data; boundary=b"}
    parts = 'purpose"\r\n\r\nbatch', f'file"; filename*={name}\r\n\r\nx'
    form = "".join(f'--b\r\nContent-Disposition: form-data; name="{one}\r\n' for one in parts)
    answer = httpx.post(f"{tiny.url}/v1/files", content=f"{form}--b--\r\n", headers=head)
    if answer.status_code == 200:
        assert answer.json()["filename"] == "?"
        httpx.delete(f"{tiny.url}/v1/files/{answer.json()['id']}")
    else:
        assert answer.json()["error"]["code"] == "invalid_form"


def test_what_is_too_large(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.Files.__init__, "__defaults__", (100_000, 150_000))
    with serving(tiny_gguf, "tiny") as running:
        client = running.client()
        for size in (100_001, 1_000_000):
            for file in (b"x" * size, io.BytesIO(b"x" * size)):
                with pytest.raises(openai.APIStatusError, match="limit of 100000 bytes"):
                    client.files.create(file=file, purpose="batch")
        client.files.create(file=b"x" * 100_000, purpose="batch")
        with pytest.raises(openai.APIStatusError, match="delete some"):
            client.files.create(file=b"x" * 60_000, purpose="batch")


# ---- forms --------------------------------------------------------------------------------------

BOUNDARY = b"XyX"
contents = st.binary(max_size=30) | st.lists(
    st.sampled_from([b"\r\n", b"--", b"XyX", b"\r\n--XyX"[:6], b"\r", b"a"]), max_size=8
).map(b"".join)
forms = st.lists(st.tuples(st.sampled_from(["a", "file"]), st.booleans(), contents), max_size=4)


def written(parts: list[tuple[str, bool, bytes]]) -> bytes:
    body = b""
    for name, is_file, content in parts:
        filename = b'; filename="f"' if is_file else b""
        head = b'Content-Disposition: form-data; name="%b"%b' % (name.encode(), filename)
        body += b"--%b\r\n%b\r\n\r\n%b\r\n" % (BOUNDARY, head, content)
    return body + b"--%b--\r\n" % BOUNDARY


def read(body: bytes, cuts: list[int]) -> list[tuple[str, bool, bytes]]:
    form = Multipart(f"multipart/form-data; boundary={BOUNDARY.decode()}")
    ends = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
    found: list[tuple[str, bool, bytes]] = []
    for first, last in pairwise(ends):
        for event in form.feed(body[first:last]):
            if isinstance(event, Begin):
                found.append((event.name, event.filename is not None, b""))
            else:
                found[-1] = (*found[-1][:2], found[-1][2] + event)
    assert form.ended
    return found


@given(forms, st.lists(st.integers(0, 10_000), max_size=12))
def test_forms_cut_anywhere(parts: list[tuple[str, bool, bytes]], cuts: list[int]) -> None:
    parts = [part for part in parts if b"--XyX" not in b"\r\n" + part[2]]
    assert read(written(parts), cuts) == parts


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_garbage_is_refused_or_read(first: bytes, second: bytes) -> None:
    form = Multipart("multipart/form-data; boundary=XyX")
    try:
        for data in (b"--XyX\r\n", first, b"\r\n--XyX\r\n", second):
            form.feed(data)
    except ApiError as error:
        assert error.status == 400
