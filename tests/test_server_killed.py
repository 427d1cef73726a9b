"""Servers that are killed amid batches and background responses, or whose disk is full."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import openai
import pytest

from processes import assert_fails, run
from serving import TEMPLATE, eventually
from test_cli_serve import served

LINES = 400
ASK: dict[str, Any] = {"model": "tiny", "input": "Hello", "max_output_tokens": 400}
FIXED: dict[str, Any] = {"seed": 7, "ignore_eos": True}


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="unused", max_retries=0)


def completed(client: openai.OpenAI, name: str) -> int:
    counts = client.batches.retrieve(name).request_counts
    return 0 if counts is None else counts.completed


def test_no_line_is_lost_and_none_is_answered_twice(tiny_gguf: Path, tmp_path: Path) -> None:
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 24, "ignore_eos": True}
    lines = [
        {
            "custom_id": f"{i}",
            "method": "POST",
            "url": "/v1/completions",
            "body": body | {"seed": i},
        }
        for i in range(LINES)
    ]
    text = "\n".join(map(json.dumps, lines))
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    options = ("--chat-template", template, "--state-dir", tmp_path / "state")
    with served(tiny_gguf, *options) as (url, server, _):
        client = client_of(url)
        source = client.files.create(file=text.encode(), purpose="batch")
        batch = client.batches.create(
            input_file_id=source.id, endpoint="/v1/completions", completion_window="24h"
        )
        late = client.responses.create(**ASK, background=True, extra_body=FIXED)
        assert eventually(lambda: completed(client, batch.id) >= 20, 60)
        server.send_signal(signal.SIGKILL)
        server.wait(60)
    with served(tiny_gguf, *options) as (url, server, _):
        client = client_of(url)
        before = completed(client, batch.id)
        assert before >= 20
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    with served(tiny_gguf, *options) as (url, server, _):
        client = client_of(url)
        assert eventually(lambda: client.batches.retrieve(batch.id).status == "completed", 120)
        done = client.batches.retrieve(batch.id)
        assert done.output_file_id is not None and done.error_file_id is None
        found = [json.loads(one) for one in client.files.content(done.output_file_id).iter_lines()]
        assert [one["custom_id"] for one in found] == [f"{i}" for i in range(LINES)]
        assert done.usage is not None and done.usage.output_tokens == LINES * 24
        for i in (0, 19, LINES - 1):
            answer = client.completions.create(
                model="tiny", prompt="Hello", max_tokens=24, seed=i, extra_body={"ignore_eos": True}
            )
            assert found[i]["response"]["body"]["choices"][0]["text"] == answer.choices[0].text
        assert eventually(lambda: client.responses.retrieve(late.id).status == "incomplete", 60)
        again = client.responses.create(**ASK, extra_body=FIXED)
        assert client.responses.retrieve(late.id).output_text == again.output_text
        other = run("serve", tiny_gguf, "--port", 0, "--kv-memory", "64M", *options)
        assert_fails(other, 1, "in use by another server", "--state-dir")
    assert len(list((tmp_path / "state" / "files").iterdir())) == 2


def test_nothing_is_kept(tiny_gguf: Path, tmp_path: Path) -> None:
    """Where that is asked for, not even a folder is left."""
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    places = {"XDG_STATE_HOME": str(tmp_path / "state"), "TMPDIR": str(tmp_path)}
    through = ["env", *(f"{name}={value}" for name, value in places.items())]
    options = ("--chat-template", template, "--state-dir", "none")
    with served(tiny_gguf, *options, through=through) as (url, server, _):
        made = client_of(url).responses.create(**ASK | {"max_output_tokens": 1})
        assert client_of(url).responses.retrieve(made.id) == made
        assert [path.name[:13] for path in tmp_path.iterdir() if path.is_dir()] == ["elinvar-state"]
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    assert [path.name for path in tmp_path.iterdir()] == ["template.jinja"]


SMALL_DISK = 'mount -t tmpfs -o size=16m tmpfs "$0" && exec "$@"'


def test_a_disk_that_is_full(tiny_gguf: Path, tmp_path: Path) -> None:
    """A real one, small: what is refused is told, what was accepted waits for room and is finished."""
    through = ["unshare", "--mount", "sh", "-c", SMALL_DISK, str(tmp_path)]
    try:
        subprocess.run([*through, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file systems can be mounted here")
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 24, "ignore_eos": True}
    lines = [
        {
            "custom_id": f"{i}",
            "method": "POST",
            "url": "/v1/completions",
            "body": body | {"seed": i},
        }
        for i in range(400)
    ]
    text = "\n".join(map(json.dumps, lines)).encode()
    with served(tiny_gguf, "--state-dir", tmp_path / "state", through=through) as (url, _, _):
        client = client_of(url)
        source = client.files.create(file=text, purpose="batch")
        batch = client.batches.create(
            input_file_id=source.id, endpoint="/v1/completions", completion_window="24h"
        )
        fillers = []
        size = 2**20
        while size >= 2**12:
            try:
                fillers.append(client.files.create(file=b"x" * size, purpose="batch").id)
            except openai.InternalServerError as error:
                assert error.status_code == 507 and "disk is full" in str(error)
                size //= 2
        for name in fillers:
            client.files.delete(name)
        assert eventually(lambda: client.batches.retrieve(batch.id).status == "completed", 120)
        done = client.batches.retrieve(batch.id)
        assert done.output_file_id is not None and done.error_file_id is None
        found = [json.loads(one) for one in client.files.content(done.output_file_id).iter_lines()]
        assert [one["custom_id"] for one in found] == [f"{i}" for i in range(400)]
