"""`elinvar serve` as a process: tenants, traces, a warm start."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from elinvar.server.tenants import hash_key
from processes import ELINVAR, ENVIRONMENT, assert_fails, run
from serving import TEMPLATE

LONG = "The first words of all that is asked here, which are always the same. " * 4
BODY: dict[str, Any] = {"model": "tiny", "prompt": LONG, "max_tokens": 4, "ignore_eos": True}


@contextmanager
def served(model: Path, *arguments: object) -> Iterator[tuple[str, subprocess.Popen[str], str]]:
    """(address, process, what was said before it listened)."""
    command = [ELINVAR, "serve", str(model), "--port", "0", "--served-model-name", "tiny"]
    command += ["--kv-memory", "64M", *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as server:
        assert server.stderr is not None
        said = ""
        try:
            while True:
                line = server.stderr.readline()
                assert line, said
                if found := re.search(r"serves tiny at (http://\S+)", line):
                    break
                said += line
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
        assert server.wait(timeout=30) == 143
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


def test_key() -> None:
    made = run("key")
    key, line = made.stdout.splitlines()
    assert line == f'key_sha256 = "{hash_key(key)}"' and len(key) > 40
    assert run("key").stdout != made.stdout
    assert run("key", "--hash", stdin=f"{key}\n").stdout.strip() == line
    assert_fails(run("key", "--hash", stdin="\n"), 1, "stdin", "no key")
