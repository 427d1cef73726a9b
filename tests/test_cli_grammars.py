"""`elinvar generate` with a format for the answer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest

from processes import assert_fails, run

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    texts = {
        "schema": json.dumps(SCHEMA),
        "lark": 'start: "<" /[a-z]{2}/ ">"',
        "gbnf": 'root ::= "(" [0-9] ")"',
        "lacking": '{"not": {}}',
        "bytes": "\udcff",
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    return {name: str(tmp_path / name) for name in texts}


def test_answers_keep_to_it(tiny_gguf: Path, files: dict[str, str]) -> None:
    def answer(*arguments: str) -> str:
        done = run("generate", str(tiny_gguf), "--prompt", "x", "--max-tokens", "200", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout[:-1]

    jsonschema.validate(json.loads(answer("--json-schema", files["schema"])), SCHEMA)
    assert re.fullmatch("<[a-z]{2}>", answer("--grammar", files["lark"]))
    assert re.fullmatch(r"\(\d\)", answer("--grammar", files["gbnf"]))
    assert re.fullmatch("a{3}b?", answer("--regex", "a{3}b?", "--temperature", "2"))


def test_what_cannot_be_done_is_said(tiny_gguf: Path, files: dict[str, str]) -> None:
    def failed(code: int, *arguments: str, words: str) -> None:
        assert_fails(run("generate", str(tiny_gguf), "--prompt", "x", *arguments), code, words)

    failed(1, "--json-schema", files["lacking"], words='keywords "not"')
    failed(1, "--regex", "(", words="unclosed group")
    failed(1, "--json-schema", files["bytes"], words="UTF-8")
    failed(2, "--regex", "a", "--grammar", files["lark"], words="give one of")
    failed(2, "--json-schema", "/none", words="/none")
