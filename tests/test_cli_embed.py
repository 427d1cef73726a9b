"""`elinvar embed` and `elinvar rerank` as processes, on tiny random models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from elinvar import Embedder
from processes import assert_fails, run

pytest.importorskip("torch")
pytest.importorskip("transformers")


def test_vectors_as_lines(bert: Path) -> None:
    done = run("embed", bert, "one", "-", stdin="many " * 99)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    expected = Embedder(bert).embed(["one", "many " * 99])
    assert np.array_equal(np.float32([line["embedding"] for line in lines]), expected)
    assert [(line["index"], line["truncated"]) for line in lines] == [(0, False), (1, True)]
    assert "2 texts, 1 cut to 50 tokens" in done.stderr


def test_a_file_to_an_array(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('"one"\n\n{"text": "two", "id": 7}\n')
    command = ["embed", bert, "--file", tmp_path / "in.jsonl", "--prompt-name", "query"]
    done = run(*command, "--dimensions", "8", "--output", tmp_path / "x.npy", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_truncated"] == 0
    expected = Embedder(bert).embed(["one", "two"], prompt="find: ", dimensions=8)
    assert np.array_equal(np.load(tmp_path / "x.npy"), expected)
    lines = run("embed", bert, "--file", "-", stdin='{"text": "two", "id": 7}').stdout
    assert json.loads(lines)["id"] == 7


def test_ranks(bert: Path, reranker: Path) -> None:
    for model in (bert, reranker):
        command = ["rerank", model, "--query", "what?", "a metal", "-", "--json"]
        done = run(*command, stdin="a watch\nno answer\n")
        assert done.returncode == 0, done.stderr
        results = json.loads(done.stdout)["results"]
        ranked = Embedder(model).rank("what?", ["a metal", "a watch", "no answer"])
        assert [(r["index"], r["score"]) for r in results] == [(r.index, r.score) for r in ranked]
    best = run("rerank", reranker, "--query", "what?", "a metal", "a watch", "--top-n", "1").stdout
    assert len(best.splitlines()) == 1 and best.split()[1] == "a"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["embed", "m"], ["either texts or --file"]),
        (["embed", "m", "text", "--file", "x"], ["either texts or --file"]),
        (["embed", "m", "text", "--dimensions", "0"], ["--dimensions"]),
        (["embed", "m", "text", "--output", "/nowhere/x.npy"], ["no folder /nowhere"]),
        (["embed", "m", "x", "--prompt", "y", "--prompt-name", "z"], ["either --prompt or"]),
        (["rerank", "m", "document"], ["--query"]),
        (["rerank", "m", "--query", "q"], ["DOC"]),
        (["rerank", "m", "--query", "q", "-"], ["no document on stdin"]),
    ],
)
def test_a_mistake_in_the_command_line_exits_2(arguments: list[str], words: list[str]) -> None:
    assert_fails(run(*arguments), 2, *words)


def test_what_does_not_fit_exits_1(bert: Path, reranker: Path, tmp_path: Path) -> None:
    assert_fails(run("generate", bert, "--prompt", "x"), 1, "is an encoder", "elinvar embed")
    assert_fails(run("embed", reranker, "x"), 1, "is a reranker", "elinvar rerank")
    assert_fails(run("embed", bert, "x", "--prompt-name", "doc"), 1, "no prompt 'doc'", "query")
    assert_fails(run("embed", bert, "x " * 99, "--no-truncate"), 1, "Text 0", "50 tokens")
    (tmp_path / "bad.jsonl").write_text('"fine"\n{"texts": 3}\n')
    assert_fails(run("embed", bert, "--file", tmp_path / "bad.jsonl"), 1, "line 2", "JSON text")
    (tmp_path / "bad.jsonl").write_text("\n")
    assert_fails(run("embed", bert, "--file", tmp_path / "bad.jsonl"), 1, "holds no text")


def test_what_a_model_is(bert: Path, reranker: Path) -> None:
    shown = run("models", "show", bert).stdout
    assert "vectors of texts" in shown and "WordPiece" in shown and "problem" not in shown
    assert "scores of 1 label\n" in run("models", "show", reranker).stdout
