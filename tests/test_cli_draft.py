"""`elinvar draft train` as a process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from elinvar import LLM, SamplingParams
from elinvar.models.eagle import is_eagle
from elinvar.models.load import is_mtp
from elinvar.weights.checkpoint import open_checkpoint
from processes import ENVIRONMENT, assert_fails, run

pytest.importorskip("torch")

TRAIN = ("draft", "train")
OPTIONS = ("--answer-tokens", 12, "--epochs", 1, "--depth", 2, "--draft-vocab", 64)


def write(path: Path, count: int) -> Path:
    lines = ({"prompt": f"def number_{i}(x):"} for i in range(count))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("method", ["eagle", "mtp"])
def test_a_head_is_made(method: str, tiny_gguf: Path, tmp_path: Path) -> None:
    data, out = write(tmp_path / "prompts.jsonl", 12), tmp_path / "head"
    asked = *TRAIN, tiny_gguf, "--method", method, "--data", data, "--out", out, *OPTIONS
    done = run(*asked)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("temperature 0: accepted by place ")
    report = json.loads((out / "report.json").read_text())
    assert len(report["temperature 1"]["chances"]) == 4
    checkpoint = open_checkpoint(out)
    assert is_mtp(checkpoint) == (method == "mtp")
    assert is_eagle(checkpoint) == (method == "eagle")
    tokens = []
    for options in ({"speculation": "off"}, {"draft_model": str(out)}):
        llm = LLM(tiny_gguf, max_context=256, num_threads=1, **options)
        stats = [one.name for one in llm.engine.metrics.drafters]
        assert (method in stats) == ("draft_model" in options)
        [answer] = llm.generate("def add(a, b):", SamplingParams(max_tokens=24, seed=1))
        tokens.append(answer.token_ids)
    assert tokens[0] == tokens[1]
    assert_fails(run(*asked, "--rate", 0.1), 1, "was begun with rate = 0.0005, not 0.1; go on")


def test_exits_are_measured(tiny_gguf: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "prompts.jsonl", 3)
    early = "--method", "early-exit", "--data", data, "--answer-tokens", 8
    done = run(*TRAIN, tiny_gguf, *early)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("  1 of 2 layers: accepted by place ")


def test_mistakes(tmp_path: Path) -> None:
    data = write(tmp_path / "prompts.jsonl", 1)
    assert_fails(run(*TRAIN, "x", "--data", data), 2, "give --out, a folder for the head")
    alone = run(*TRAIN, "x", "--data", data, "--method", "early-exit")
    assert_fails(alone, 1, "holds one prompt; some are learned from, others tested")
    code = "import sys; sys.modules['torch'] = None; from elinvar.cli import main; main()"
    asked = *TRAIN, "x", "--data", str(data), "--out", str(tmp_path)
    command = [sys.executable, "-c", code, *asked]
    missing = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert_fails(missing, 1, "install it with 'pip install elinvar[train]'")
