"""`elinvar serve` as a process: tenants, traces, a warm start."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import ssl
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from elinvar.server.tenants import hash_key, read_tenants
from processes import ELINVAR, ENVIRONMENT, assert_fails, run
from serving import TEMPLATE, eventually

LONG = "The first words of all that is asked here, which are always the same. " * 4
BODY: dict[str, Any] = {"model": "tiny", "prompt": LONG, "max_tokens": 4, "ignore_eos": True}


@contextmanager
def served(
    model: Path, *arguments: object, through: Sequence[str] = ()
) -> Iterator[tuple[str, subprocess.Popen[str], str]]:
    """(address, process, what was said before it listened). through: a command that runs it."""
    command = [*through, ELINVAR, "serve", str(model), "--port", "0", "--served-model-name", "tiny"]
    command += ["--kv-memory", "64M", *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as server:
        assert server.stderr is not None
        said = ""
        try:
            while True:
                line = server.stderr.readline()
                assert line, said
                said += line
                if found := re.search(r"serves tiny at (https?://[^\s,]+)", line):
                    break
            yield found[1], server, said
        finally:
            if server.poll() is None:
                server.kill()


def test_a_warm_start_with_tenants_and_a_trace(tiny_gguf: Path, tmp_path: Path) -> None:
    prompts, tenants = tmp_path / "prompts.jsonl", tmp_path / "tenants.toml"
    trace = tmp_path / "trace.jsonl"
    prompts.write_text(
        f"{json.dumps({'prompt': LONG, 'tenant': 'alice'})}\n\n"
        '{"prompt_ids": [7, 8, 9], "tenant": "bob"}\n'
    )
    tenants.write_text(
        f'[tenants.alice]\nkey_sha256 = "{hash_key("sk-a")}"\ntokens_per_s = 1\nmax_waiting = 1\n'
        '[tenants.bob]\nkey = "sk-b"\n'
    )
    options = ("--warm", prompts, "--tenants", tenants, "--trace-requests", trace)
    with served(tiny_gguf, *options, "--trace-events", "--policy", "fair") as (url, server, said):
        assert "Warmed 2 prompts" in said
        found = []
        for key in ("sk-a", "sk-b"):
            headers = {"Authorization": f"Bearer {key}"}
            answer = httpx.post(f"{url}/completions", json=BODY, headers=headers, timeout=30)
            found.append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert found[0] >= 32 and found[1] == 0
        assert httpx.get(f"{url}/models").status_code == 401
        headers = {"Authorization": "Bearer sk-b"}
        with httpx.stream("POST", f"{url}/completions", json=BODY | {"max_tokens": 100, "stream": True}, headers=headers, timeout=30) as answer:  # fmt: skip
            lines = answer.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.wait(timeout=30) == 0
    records = [json.loads(line) for line in trace.read_text().splitlines()]
    assert [record["tenant"] for record in records] == ["alice", "bob", "bob"]
    assert records[-1]["generated_tokens"] == 100
    for record in records:
        assert sum(record["parts_ns"].values()) == record["wall_ns"]
        assert record["events"][0] == {"at_ns": 0, "state": "queued"}


@pytest.mark.parametrize(
    ("line", "tenants", "words"),
    [
        ('{"prompt": 3}', False, ['"prompt"', "3"]),
        ("{", False, ["not JSON"]),
        ('{"prompt": "x", "prompt_ids": [1]}', False, ["either"]),
        ('{"prompt_ids": [1, "2"]}', False, ["token ids"]),
        ('{"prompt_ids": [1, 99999999]}', False, ["99999999"]),
        ('{"prompt": "x", "tenant": "eve"}', False, ["no tenant 'eve'"]),
        ('{"prompt": "x", "tenant": "eve"}', True, ["no tenant 'eve'"]),
        ('{"prompt": "x"}', True, ["name its tenant"]),
        ('{"prompt": "x", "adapter": "none"}', False, ["none"]),
    ],
)
def test_bad_lines_of_a_warm_start(
    tiny_gguf: Path, tmp_path: Path, line: str, tenants: bool, words: list[str]
) -> None:
    prompts, file = tmp_path / "prompts.jsonl", tmp_path / "tenants.toml"
    prompts.write_text(f'{{"prompt_ids": [1], "tenant": ""}}\n{line}\n')
    file.write_text('[tenants.a]\nkey = "k"\nshare_prefixes = true\n[tenants.b]\nkey = "j"\n')
    if words == ["name its tenant"]:
        file.write_text('[tenants.a]\nkey = "k"\n')
        prompts.write_text(f'{{"prompt_ids": [1], "tenant": "a"}}\n{line}\n')
    more = ["--tenants", file] if tenants else []
    done = run("serve", tiny_gguf, "--port", 0, "--kv-memory", "64M", "--warm", prompts, *more)
    assert_fails(done, 1, "line 2", "prompts.jsonl", *words)


def test_mistakes_before_the_model_is_loaded(tmp_path: Path) -> None:
    bad = tmp_path / "tenants.toml"
    bad.write_text("[tenants.a]\n")
    assert_fails(run("serve", "./none.gguf", "--tenants", bad), 1, "tenants.toml", "'a'", "key")
    assert_fails(run("serve", "./none.gguf", "--trace-events"), 2, "--trace-requests")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert_fails(run("serve", "./none.gguf", "--warm", empty), 1, "empty.jsonl", "no prompt")
    for flag, value in (
        ("--policy", "random"),
        ("--ageing-s", "0"),
        ("--ttft-target", "nan"),
        ("--itl-target", "soon"),
        ("--itl-target", "-1"),
    ):
        assert_fails(run("serve", "./none.gguf", flag, value), 2, flag, value)
    assert_fails(run("serve", "./none.gguf", "--ageing-s", "5"), 2, "--ageing-s", "--policy")


def test_places_below_the_cache_are_named_as_they_were_given(
    tiny_gguf: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "kv_tiers"
    for flags, words in (
        (("--kv-disk-size", "1G"), ("--kv-disk-size needs", "--kv-tier")),
        (("--kv-disk-size", "1G", "--kv-tier", "tcp://h:1"), ("--kv-disk-size needs",)),
        (("--kv-host-path", folder), ("--kv-host-path needs --kv-host-memory",)),
        (("--kv-tier", folder), (f"{folder} of --kv-tier", "give --kv-disk-size")),
        (("--kv-host-memory", "1K"), ("give more --kv-host-memory",)),
    ):
        done = run("generate", tiny_gguf, "--prompt", "x", "--kv-memory", "64M", *flags)
        assert_fails(done, 2, *words)


def test_ctrl_c_ends_the_warming_and_the_server_goes_on(tiny_gguf: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = ({"prompt": f"{i} {'once more and again ' * 200}"} for i in range(3000))
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [ELINVAR, "serve", str(tiny_gguf), "--port", "0", "--kv-memory", "64M"]
    command += ["--served-model-name", "tiny", "--warm", str(prompts), "--threads", "1"]
    # At a terminal, for the bar says when it has begun.
    master, slave = pty.openpty()
    with subprocess.Popen(command, stderr=slave, env=ENVIRONMENT) as server:
        os.close(slave)
        try:
            said = ""
            while "tokens/s" not in said:
                said += os.read(master, 4096).decode(errors="replace")
            assert "Warming" in said and "tokens" in said
            server.send_signal(signal.SIGINT)
            while "Ctrl-C stops it" not in said:
                said += os.read(master, 4096).decode(errors="replace")
            stopped = re.search(r"Warming was stopped after (\d+) of 3000 prompts", said)
            assert stopped and int(stopped[1]) < 3000
            found = re.search(r"at (http://\S+)", said)
            assert found
            assert httpx.post(f"{found[1]}/completions", json=BODY, timeout=30).status_code == 200
        finally:
            server.terminate()
            server.wait(timeout=30)
            os.close(master)


def test_generate_explains(tiny_gguf: Path, tmp_path: Path) -> None:
    flags = ("--explain", "--max-tokens", "3", "--kv-memory", "64M")
    told = run("generate", tiny_gguf, "--prompt", LONG, *flags)
    assert re.search(
        r"prefill [\d.]+ ms \(\d+ tokens in 1 chunk\), decode .*ms in all", told.stderr
    )
    done = json.loads(run("generate", tiny_gguf, "--prompt", LONG, "--json", *flags).stdout)
    explained = done["explanation"]
    assert sum(explained["parts_ns"].values()) == explained["wall_ns"]
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt_ids": [5, 6, 7]}\n{"prompt": "x"}\n')
    lines = run("generate", tiny_gguf, "--prompts-file", file, *flags).stdout.splitlines()
    assert [json.loads(line)["explanation"]["steps"] for line in lines] == [3, 3]
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    talk = run("chat", tiny_gguf, *flags, "--chat-template", template, stdin="Hello\nAnd?\n")
    assert talk.stderr.count("ms in all") == 2 and "found in memory" in talk.stderr
    assert "explanation" not in run("generate", tiny_gguf, "--prompts-file", file).stdout


def test_keys_to_paste() -> None:
    made = run("keys", "make")
    key, line = made.stdout.splitlines()
    assert line == f'key_sha256 = "{hash_key(key)}"' and len(key) > 40
    assert run("keys", "make").stdout != made.stdout
    assert run("keys", "hash", stdin=f"{key}\n").stdout.strip() == line
    assert_fails(run("keys", "hash", stdin="\n"), 1, "stdin", "no key")
    assert_fails(run("keys", "make", "--tenant", "ann"), 2, "--tenants")


@pytest.mark.parametrize("name", ["tenants.toml", "tenants.json"])
def test_keys_of_a_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    key = run("keys", "make", "--tenants", path, "--tenant", "ann", "--admin").stdout.strip()
    assert path.stat().st_mode & 0o777 == 0o600
    if path.suffix == ".toml":
        path.write_text("# ours\n" + path.read_text())
    made = json.loads(run("keys", "make", "--tenants", path, "--tenant", "ann", "--json").stdout)
    run("keys", "make", "--tenants", path, "--tenant", "bob")
    known = read_tenants(path)
    assert known.of(key.encode()) == known.of(made["key"].encode()) == "ann"
    assert known.admins == {"ann"} and set(known.limits) == {"ann", "bob"}
    ann, bob = json.loads(run("keys", "list", "--tenants", path, "--json").stdout)
    assert ann["keys"] == [hash_key(key)[:12], made["key_sha256"][:12]] and ann["admin"]
    assert key not in path.read_text()

    assert run("keys", "revoke", key, "--tenants", path).returncode == 0
    assert run("keys", "revoke", bob["keys"][0], "--tenants", path).returncode == 0
    known = read_tenants(path)
    assert known.of(key.encode()) is None and set(known.limits) == {"ann"}
    assert (path.suffix == ".json") or path.read_text().startswith("# ours\n")
    before = path.read_bytes()
    assert_fails(run("keys", "revoke", key, "--tenants", path), 1, "no key in it")
    assert_fails(run("keys", "revoke", made["key"], "--tenants", path), 1, "last key")
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == [name]


def test_a_file_that_is_read_again(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "tenants.toml"
    key = run("keys", "make", "--tenants", path, "--tenant", "ann").stdout.strip()
    with served(tiny_gguf, "--tenants", path) as (url, server, _):
        assert server.stderr is not None

        def status(key: str) -> int:
            headers = {"Authorization": f"Bearer {key}"}
            return httpx.get(f"{url}/models", headers=headers).status_code

        other = run("keys", "make", "--tenants", path, "--tenant", "bob").stdout.strip()
        assert (status(key), status(other)) == (200, 401)
        run("keys", "revoke", key, "--tenants", path)
        server.send_signal(signal.SIGHUP)
        assert "again" in server.stderr.readline()
        assert (status(key), status(other)) == (401, 200)
        path.write_text("[tenants.bob")
        server.send_signal(signal.SIGHUP)
        assert "not TOML" in server.stderr.readline()
        assert status(other) == 200


def test_one_key_for_all_and_a_port_for_administrators(tiny_gguf: Path) -> None:
    arguments = ("--api-key", "sk-1", "--admin-port", "0", "--cors-origin", "https://a.example")
    with served(tiny_gguf, *arguments) as (url, _, said):
        base = url.removesuffix("/v1")
        admin = said.rsplit(" ", 1)[-1].strip()
        assert httpx.get(f"{url}/models").status_code == 401
        headers = {"Authorization": "Bearer sk-1", "Origin": "https://a.example"}
        found = httpx.get(f"{url}/models", headers=headers)
        assert found.status_code == 200
        assert found.headers["access-control-allow-origin"] == "https://a.example"
        # Pages read errors, too, and those before any key.
        for asked in (headers, {"Origin": "https://a.example"}):
            refused = httpx.post(f"{url}/completions", headers=asked)
            assert refused.status_code >= 400
            assert refused.headers["access-control-allow-origin"] == "https://a.example"
        preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
        assert httpx.options(f"{url}/models", headers=preflight).status_code == 200
        page = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}
        assert httpx.get(f"{url}/models", headers=headers | page).status_code == 200
        other = headers | {"Origin": "https://b.example"}
        assert httpx.get(f"{url}/models", headers=other | page).status_code == 403
        assert (
            "access-control-allow-origin" not in httpx.get(f"{url}/models", headers=other).headers
        )
        assert httpx.get(f"{base}/metrics").status_code == 404
        assert httpx.get(f"{admin}/metrics").status_code == 200
        assert httpx.get(f"{admin}/v1/models", headers=headers).status_code == 404
        for address in (base, admin):
            assert httpx.get(f"{address}/ready").status_code == 200


def test_https(tiny_gguf: Path, tmp_path: Path) -> None:
    cert, key = self_signed(tmp_path)
    with served(tiny_gguf, "--tls-cert", cert, "--tls-key", key) as (url, _, _said):
        assert url.startswith("https://")
        trusted = ssl.create_default_context(cafile=str(cert))
        assert httpx.get(f"{url}/models", verify=trusted).status_code == 200
    closed = tmp_path / "closed.pem"
    closed.symlink_to(tmp_path / "gone.pem")
    for bad, words in (
        (closed, ("Cannot read", "--tls-key")),
        (cert, ("no certificate and its key",)),
    ):
        done = run("serve", tiny_gguf, "--tls-cert", cert, "--tls-key", bad)
        assert_fails(done, 1, str(bad), *words)
    assert_fails(run("serve", tiny_gguf, "--tls-key", key), 2, "--tls-cert")


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate of this machine's loopback address, made by openssl."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", "/CN=localhost", "-keyout", str(key)]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(cert)]
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not here to make a certificate")
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


def test_several_models(tiny_gguf: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.symlink_to(tiny_gguf)
    mistakes: list[tuple[list[object], tuple[str, ...]]] = [
        ([other, other], ("named twice",)),
        ([other, tiny_gguf, "--served-model-name", "x"], ("--alias",)),
        ([other, tiny_gguf, "--default", "x"], ("--default", str(other))),
        ([other, tiny_gguf, "--alias", "x=y"], ("--alias", "NAME=MODEL")),
        ([other, "--model-memory", "1G"], ("--model-memory", "one model")),
        ([other, tiny_gguf, "--model-memory", "1M", "--kv-memory", "16M"], ("alone takes",)),
    ]
    for arguments, words in mistakes:
        assert_fails(run("serve", *arguments, "--port", "0"), 2, *words)
    command = [ELINVAR, "serve", str(tiny_gguf), str(other), "--port", "0", "--alias", f"b={other}"]
    command += ["--kv-memory", "16M"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as server:
        assert server.stderr is not None
        try:
            line = server.stderr.readline()
            found = re.search(r"serves \S+, \S+ at (http://\S+)", line)
            assert found, line
            answers = [
                httpx.post(
                    f"{found[1]}/completions", json=BODY | {"model": name, "seed": 1}, timeout=30
                )
                for name in ("default", "b", str(other))
            ]
            assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
        finally:
            server.terminate()
            assert server.wait(timeout=30) == 0


def test_a_model_for_texts_beside_one_that_generates(tiny_gguf: Path, minilm: Path) -> None:
    done = run("serve", minilm, tiny_gguf, "--port", "0")
    assert_fails(done, 2, "generates no text", "--default")
    command = [ELINVAR, "serve", str(tiny_gguf), str(minilm), "--port", "0"]
    command += ["--kv-memory", "16M", "--alias", f"embedder={minilm}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as server:
        assert server.stderr is not None
        try:
            line = server.stderr.readline()
            found = re.search(r"at (http://\S+)", line)
            assert found, line
            client = openai.OpenAI(base_url=found[1], api_key="x", max_retries=0)
            assert {str(tiny_gguf), str(minilm)} <= {one.id for one in client.models.list()}
            vectors = [
                client.embeddings.create(model=name, input="x").data[0].embedding
                for name in (str(minilm), "embedder")
            ]
            assert vectors[0] == vectors[1] and len(vectors[0]) == 384
            assert client.completions.create(model="default", prompt="x", max_tokens=2).choices
            with pytest.raises(openai.BadRequestError, match="generates no text"):
                client.completions.create(model=str(minilm), prompt="x")
            with pytest.raises(openai.NotFoundError):
                client.embeddings.create(model="default", input="x")
            # The line of a model of the other kind has failed: it does not wait for another one.
            every = {"method": "POST", "url": "/v1/embeddings"}
            lines: list[dict[str, Any]] = [
                {**every, "custom_id": name, "body": {"model": name, "input": "x"}}
                for name in ("default", "embedder")
            ]
            source = client.files.create(
                file="\n".join(map(json.dumps, lines)).encode(), purpose="batch"
            )
            batch = client.batches.create(
                input_file_id=source.id, endpoint="/v1/embeddings", completion_window="24h"
            ).id
            assert eventually(lambda: client.batches.retrieve(batch).status == "completed")
            counts = client.batches.retrieve(batch).request_counts
            assert counts is not None and (counts.completed, counts.failed) == (1, 1)
        finally:
            server.terminate()
            assert server.wait(timeout=30) == 0
