"""The command line as a person meets it: real processes, real terminals, real exit codes."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from processes import ELINVAR, ENVIRONMENT, assert_fails, run

# Mistakes that are found before a model is loaded.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frobnicate"], ["frobnicate"]),
        (["generate"], ["MODEL"]),
        (["generate", "m"], ["--prompt", "--prompts-file"]),
        (["generate", "m", "--prompt", "x", "--prompts-file", "y"], ["either"]),
        (["generate", "m", "--prompt", "x", "--no-such-flag"], ["--no-such-flag"]),
        (["generate", "m", "--prompt", "x", "--max-tokens", "ten"], ["--max-tokens"]),
        (["generate", "m", "--prompt", "x", "--max-tokens", "0"], ["--max-tokens", "got 0"]),
        (["generate", "m", "--prompt", "x", "--temperature", "nan"], ["--temperature", "nan"]),
        (["generate", "m", "--prompt", "x", "--top-p", "1.5"], ["--top-p", "1.5"]),
        (["generate", "m", "--prompt", "x", "--stop", ""], ["--stop", "non-empty"]),
        (["generate", "m", "--prompt", "x", "--logprobs", "2"], ["--logprobs", "--json"]),
        (["generate", "m", "--prompt", "x", "--kv-memory", "lots"], ["--kv-memory", "lots"]),
        (["generate", "m", "--prompt", "x", "--kv-dtype", "int3"], ["--kv-dtype", "int3"]),
        (["generate", "m", "--prompt", "x", "--adapter", "one"], ["--adapter", "NAME=PATH"]),
        (
            ["generate", "m", "--prompt", "x", "--adapter", "a=b", "--adapter", "c=d"],
            ["--adapter", "one prompt"],
        ),
        (["serve", "m", "--adapter", "m=x"], ["--adapter", "own name"]),
        (["chat", "m", "--seed", "x"], ["--seed"]),
        (["serve", "m", "--port", "70000"], ["--port", "65535"]),
        (["bench", "m", "--batch", "1,two"], ["--batch", "two"]),
        (["bench"], ["MODEL"]),
        (["bench", "offline"], ["MODEL"]),
        (["bench", "kernels", "--shape", "30,30"], ["--shape", "multiple of 32"]),
        (["bench", "kernels", "--kinds", "q4,q6"], ["--kinds", "q6"]),
        (["bench", "serve", "m", "--rate", "0"], ["--rate", "above 0"]),
        (["bench", "serve", "m", "--prompt-tokens", "9-3"], ["--prompt-tokens", "32-512"]),
        (["bench", "serve", "m", "--trace", "/none"], ["--trace", "/none"]),
        (["profile", "m", "--prefill", "x"], ["--prefill", "x"]),
    ],
)
def test_a_mistake_in_the_command_line_exits_2(arguments: list[str], words: list[str]) -> None:
    assert_fails(run(*arguments), 2, *words)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("not json", ["line 1", "not JSON"]),
        ('{"prompt": "a"}\n\n[1]', ["line 3", "object"]),
        ('{"prompt": "a"}\n{"id": 1}', ["line 2", "prompt", "messages"]),
        ('{"prompt": 5}', ["line 1", "must be a text"]),
        ('{"prompt": "a", "max_token": 5}', ["line 1", "'max_token'", "max_tokens"]),
        ('{"prompt": "a", "temperature": NaN}', ["line 1", "temperature"]),
        ('{"prompt": "a", "stop": 7}', ["line 1", "stop"]),
        ('{"messages": []}', ["line 1", "messages"]),
        ('{"messages": [{"role": "user"}]}', ["line 1", "content"]),
        ("[" * 100_000, ["line 1", "not JSON"]),
        ("\n\n", ["no prompt"]),
        (b"\xff\xfe", ["not UTF-8"]),
    ],
)
def test_a_bad_prompts_file_is_told_by_line(
    tmp_path: Path, lines: str | bytes, words: list[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    assert_fails(run("generate", "m", "--prompts-file", file), 1, "prompts.jsonl", *words)


def test_missing_files_and_models_are_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing.jsonl"
    assert_fails(run("generate", "m", "--prompts-file", missing), 1, str(missing))
    assert_fails(run("generate", "./none.gguf", "--prompt", "x"), 1, "none.gguf")
    assert_fails(run("chat", "smolm2-135m"), 1, "smollm2-135m")


def test_a_taken_port_is_told_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_fails(run("serve", "./none.gguf", "--port", port), 1, str(port), "--port")


@pytest.mark.parametrize(
    "command", ["generate", "chat", "serve", "bench", "profile", "doctor", "pull"]
)
def test_help_of_each_command(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0 and f"elinvar {command}" in done.stdout


def test_bare_command_and_version() -> None:
    bare = run()
    assert bare.returncode == 0 and "generate" in bare.stdout
    assert run("--version").stdout == f"elinvar {version('elinvar')}\n"


def test_a_command_that_was_mistyped() -> None:
    assert_fails(run("generat", "m"), 2, "generat", "Did you mean 'generate'?")


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("from elinvar.cli import app; app(['-h'], standalone_mode=False)", "numpy tokenizers"),
        ("import elinvar.cli.generate, elinvar.cli.load", "socket tempfile csv"),
        ("import elinvar.cli.bench.offline, elinvar.cli.load", "socket tempfile csv"),
    ],
)
def test_a_command_imports_nothing_that_only_others_need(code: str, heavy: str) -> None:
    """Start-up time and memory as a fact. _hashlib is OpenSSL, 3 MB."""
    heavy += " starlette uvicorn jinja2 msgspec rich asyncio prometheus_client torch pydantic"
    heavy += " statistics _hashlib"
    code = f"import sys; {code}; print('heavy:', *set({heavy.split()}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("heavy:\n"), done.stdout + done.stderr


def test_doctor_reports_as_json() -> None:
    done = run("doctor", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["ok"]
    assert set(report["provider"]["ops"]) >= {"linear", "attention", "sample"}
    assert report["provider"]["simd"] in report["provider"]["simd_available"]
    assert report["machine"]["cpus"] >= 1


def test_doctor_exits_1_when_the_cache_cannot_be_written() -> None:
    environment = {**ENVIRONMENT, "ELINVAR_CACHE": "/proc/nowhere"}
    done = subprocess.run([ELINVAR, "doctor"], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "MISSING" in done.stdout and "ELINVAR_CACHE" in done.stdout


# With the real model.


def test_generate_continues_a_prompt(smollm2_gguf: Path) -> None:
    arguments = ["generate", smollm2_gguf, "--temperature", 0, "--max-tokens", 12]
    text = run(*arguments, "--prompt", "The capital of France is")
    assert text.returncode == 0 and "Paris" in text.stdout and text.stderr == ""
    assert run(*arguments, "--prompt", "-", stdin="The capital of France is").stdout == text.stdout
    told = json.loads(run(*arguments, "--prompt", "The capital of France is", "--json").stdout)
    assert told["text"] + "\n" == text.stdout
    assert told["finish_reason"] == "length" and len(told["token_ids"]) == 12
    assert told["usage"] == {"prompt_tokens": 5, "cached_tokens": 0, "completion_tokens": 12}


def test_json_carries_seed_logprobs_and_stop(smollm2_gguf: Path) -> None:
    # Cool, so that no seed that is drawn ends the story.
    arguments = ["generate", smollm2_gguf, "--prompt", "Once upon a time", "--json"]
    arguments += ["--temperature", 0.2]
    first = json.loads(run(*arguments, "--max-tokens", 20, "--logprobs", 2).stdout)
    assert len(first["logprobs"]) == 20
    for step, token in zip(first["logprobs"], first["token_ids"], strict=True):
        assert step["id"] == token and step["logprob"] <= 0 and len(step["top"]) == 2
    again = [*arguments, "--max-tokens", 20, "--seed", first["seed"]]
    assert json.loads(run(*again).stdout)["text"] == first["text"]
    stop = first["text"].strip().split()[3]
    stopped = json.loads(run(*again, "--stop", stop).stdout)
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == first["text"][: first["text"].index(stop)]


def test_prompts_file_keeps_order_and_equals_single_runs(
    smollm2_gguf: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    lines: list[dict[str, Any]] = [
        {"prompt": "The sea is", "id": "slow", "max_tokens": 40, "seed": 1},
        {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "seed": 2},
        {"prompt": "Six", "id": {"any": "json"}, "temperature": 0, "max_tokens": 3, "seed": 3},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    done = run("generate", smollm2_gguf, "--prompts-file", file)
    assert done.returncode == 0 and "3 of 3 prompts" in done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["index"] for r in results] == [0, 1, 2]
    assert [r.get("id") for r in results] == ["slow", None, {"any": "json"}]
    assert [len(r["token_ids"]) for r in results] == [40, 8, 3]
    alone = ["generate", smollm2_gguf, "--json", "--max-tokens", 8, "--seed", 2]
    single = json.loads(run(*alone, "--chat", "--prompt", "Hi").stdout)
    assert single["token_ids"] == results[1]["token_ids"]
    piped = run("generate", smollm2_gguf, "--prompts-file", "-", stdin=file.read_text())
    assert piped.stdout == done.stdout


def test_a_window_changes_the_answer_where_the_past_is_long(smollm2_gguf: Path) -> None:
    text = "The colour of the house is blue. " + "It rained. " * 60 + "The colour of the house is"
    command = ["generate", smollm2_gguf, "--prompt", "-", "--temperature", 0, "--max-tokens", 12]
    everything = run(*command, stdin=text).stdout
    wide = [*command, "--attention-window", 1000]
    assert run(*wide, stdin=text).stdout == everything
    narrow = [*command, "--attention-window", 64]
    assert run(*narrow, "--attention-sinks", 64, stdin=text).returncode == 0
    assert_fails(run(*command, "--attention-sinks", 64, stdin=text), 2, "attention_window")
    assert run(*command, "--attention-budget", 1000, stdin=text).stdout == everything
    assert run(*command, "--attention-budget", 64, stdin=text).returncode == 0
    assert_fails(run(*narrow, "--attention-budget", 64, stdin=text), 2, "exclude each other")


def test_ctrl_c_keeps_the_finished_lines(smollm2_gguf: Path, tmp_path: Path) -> None:
    """The second prompt goes on for long; those behind it are done when Ctrl-C comes."""
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "A", "max_tokens": n} for n in (1, 8000, 1, 1)]
    file.write_text("\n".join(map(json.dumps, lines)))
    command = [ELINVAR, "generate", str(smollm2_gguf), "--prompts-file", str(file)]
    command += ["--temperature", "0"]
    pipes = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipes, stderr=pipes, text=True, env=ENVIRONMENT) as child:
        assert child.stdout is not None
        # All four are in the first step, so the others behind this one are done as well.
        first = child.stdout.readline()
        child.send_signal(signal.SIGINT)
        rest, err = child.communicate(timeout=30)
    assert child.returncode == 130 and "Traceback" not in err
    assert [json.loads(line)["index"] for line in [first, *rest.splitlines()]] == [0, 2, 3]
    assert "3 of 4 prompts" in err


def test_a_prompt_longer_than_the_context_is_told(smollm2_gguf: Path, tmp_path: Path) -> None:
    long = "word " * 9000
    assert_fails(
        run("generate", smollm2_gguf, "--prompt", "-", stdin=long), 1, "8192", "shorten the prompt"
    )
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "short"}}\n{{"prompt": "{long}"}}\n')
    assert_fails(run("generate", smollm2_gguf, "--prompts-file", file), 1, "line 2", "8192")
    short = ["generate", smollm2_gguf, "--max-context", 40, "--temperature", 0, "--json"]
    result = json.loads(run(*short, "--prompt", "One, two,").stdout)
    assert result["usage"]["prompt_tokens"] + result["usage"]["completion_tokens"] == 40
    assert_fails(run(*short, "--prompt", "word " * 40), 1, "40", "shorten the prompt")


def test_corrupt_models_are_one_sentence(smollm2_gguf: Path, tmp_path: Path) -> None:
    whole = smollm2_gguf.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: len(whole) // 2])
    assert_fails(run("generate", cut, "--prompt", "x"), 1, "cut.gguf")
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"GGUF" + bytes(range(256)) * 16)
    assert_fails(run("generate", junk, "--prompt", "x"), 1, "junk.gguf")
    assert_fails(run("generate", tmp_path, "--prompt", "x"), 1, str(tmp_path))


def test_a_closed_pipe_is_quiet(smollm2_gguf: Path) -> None:
    command = f"'{ELINVAR}' generate '{smollm2_gguf}' --prompt Hello --temperature 0 | head -c 5"
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, timeout=60, env=ENVIRONMENT
    )
    assert done.stderr == ""


# chat


def test_chat_through_a_pipe(smollm2_gguf: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    script = f"/system Be brief.\nSay hello.\n/save {saved}\n/reset\n/nonsense\n/quit\nnever read\n"
    done = run("chat", smollm2_gguf, "--temperature", 0, "--max-tokens", 8, stdin=script)
    assert done.returncode == 0
    messages = json.loads(saved.read_text())["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant"]
    assert messages[2]["content"] == done.stdout.removesuffix("\n")
    assert "/nonsense is not a command" in done.stderr


def test_chat_needs_a_template(tiny_gguf: Path, tmp_path: Path) -> None:
    assert_fails(run("chat", tiny_gguf, stdin="Hello\n"), 1, "--chat-template FILE")


def test_chat_switches_thinking(tiny_gguf: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% if enable_thinking is false %}{{ raise_exception('off') }}{% endif %}a")
    options = ["--chat-template", template, "--max-tokens", 1]
    assert run("chat", tiny_gguf, *options, "--thinking", stdin="x\n").returncode == 0
    assert_fails(run("chat", tiny_gguf, *options, "--no-thinking", stdin="x\n"), 1, "off")
    template.write_text("a")
    done = run("chat", tiny_gguf, *options, "--no-thinking", stdin="x\n")
    assert_fails(done, 1, "no switch that turns thinking off")
    file = tmp_path / "plain.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    ask = ["generate", tiny_gguf, "--temperature", 0, "--max-tokens", 8, "--prompt", "Hello"]
    assert run(*ask, "--chat", "--chat-template", file).stdout == run(*ask).stdout
    file.write_text("{% for m in")
    assert_fails(run(*ask, "--chat", "--chat-template", file), 1, "broken")
    file.write_bytes(b"\xff")
    assert_fails(run(*ask, "--chat", "--chat-template", file), 1, "UTF-8")


class Terminal:
    """The other side of a pseudo-terminal: types, and reads until a text appears."""

    def __init__(self, master: int) -> None:
        self._master = master
        self._unread = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def expect(self, pattern: str, seconds: float = 30) -> str:
        """What was printed up to and with `pattern`."""
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self._unread)) is None:
            ready, _, _ = select.select([self._master], [], [], max(0, end - time.monotonic()))
            assert ready, f"{pattern!r} did not come, only {self._unread!r}"
            self._unread += os.read(self._master, 4096).decode(errors="replace")
        text, self._unread = self._unread[: found.end()], self._unread[found.end() :]
        return text


@contextmanager
def terminal(*arguments: object) -> Iterator[tuple[Terminal, subprocess.Popen[bytes]]]:
    master, slave = pty.openpty()
    environment = {**ENVIRONMENT, "TERM": "dumb"}

    def take_terminal() -> None:
        os.setsid()
        os.close(os.open(os.ttyname(0), os.O_RDWR))  # the first one opened controls the session

    child = subprocess.Popen(
        [ELINVAR, *map(str, arguments)],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment,
        preexec_fn=take_terminal,
    )
    os.close(slave)
    try:
        yield Terminal(master), child
    finally:
        child.kill()
        child.wait()
        os.close(master)


def test_chat_at_a_terminal(smollm2_gguf: Path) -> None:
    """Ctrl-C ends the answer and not the program, Ctrl-C at the prompt drops the line, Ctrl-D
    leaves."""
    with terminal("chat", smollm2_gguf, "--temperature", 0) as (screen, child):
        screen.expect("> ")
        screen.type("Tell me a very long story about a dragon.\n")
        screen.expect(r"a dragon\.\s+")
        screen.expect(r"\w+ \w+ \w+ \w+")
        screen.type("\x03")
        screen.expect(r"\[stopped\]\s+> ")
        screen.type("half a line")
        screen.expect("half a line")
        time.sleep(0.2)  # Python's input() misses a signal that comes just before it waits
        screen.type("\x03")
        screen.expect("Ctrl-D or /quit leaves")
        screen.expect("> ")
        screen.type("/reset\n")
        screen.expect("new conversation(?s:.*)> ")
        screen.type("What is the capital of France? Answer with one word.\n")
        screen.expect("Paris")
        screen.type("\x03")
        screen.expect("> $")
        screen.type("\x04")
        assert child.wait(timeout=10) == 0


def test_generate_at_a_terminal_stops_on_ctrl_c(smollm2_gguf: Path) -> None:
    arguments = ["generate", smollm2_gguf, "--max-tokens", 4000, "--temperature", 0]
    with terminal(*arguments, "--prompt", "Once upon a time") as (screen, child):
        screen.expect(r"\w+ \w+ \w+ \w+")
        screen.type("\x03")
        assert child.wait(timeout=10) == 130
        assert "Traceback" not in screen.expect("\n")


# serve


def test_serve_answers_and_stops_on_sigterm(smollm2_gguf: Path) -> None:
    command = [ELINVAR, "serve", str(smollm2_gguf), "--port", "0", "--served-model-name", "small"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as server:
        assert server.stderr is not None
        ready = server.stderr.readline()
        found = re.search(r"Elinvar serves small at (http://127\.0\.0\.1:\d+/v1)", ready)
        assert found, ready
        body = {"model": "small", "prompt": "The capital of France is", "temperature": 0}
        request = urllib.request.Request(
            found[1] + "/completions",
            json.dumps({**body, "max_tokens": 3}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            assert "Paris" in json.load(response)["choices"][0]["text"]
        server.send_signal(signal.SIGTERM)
        rest = server.stderr.read()
        assert server.wait(timeout=30) == 0
        assert "Traceback" not in rest


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "m", "--prompt", "-"],
        ["generate", "m", "--prompts-file", "-"],
        ["embed", "m", "-"],
        ["embed", "m", "--file", "-"],
        ["rerank", "m", "--query", "q", "-"],
    ],
)
def test_stdin_that_is_not_text_in_any_locale(arguments: list[str]) -> None:
    for errors in ("strict", "surrogateescape"):  # those of en_US.UTF-8 and of C
        environment = {**ENVIRONMENT, "PYTHONIOENCODING": f"utf-8:{errors}"}
        done = subprocess.run(
            [ELINVAR, *arguments], input=b"\xff\xfe", capture_output=True, env=environment
        )
        assert done.returncode == 1
        assert done.stderr == b"elinvar: stdin is not UTF-8 text: invalid start byte.\n"
