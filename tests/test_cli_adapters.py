"""LoRA adapters at the terminal: real processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapters import save_adapter
from elinvar.engine.llm import LLM
from processes import assert_fails, run


@pytest.fixture(scope="module")
def folders(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    with LLM(tiny_gguf, kv_memory=2**24) as llm:
        c = llm.engine.model_config
    modules = {f"model.layers.{i}.mlp.down_proj": (c.ff_dim, c.dim) for i in range(c.num_layers)}
    folder = tmp_path_factory.mktemp("adapters")
    return [save_adapter(folder / str(i), modules, seed=i, lora_alpha=400) for i in (1, 2)]


GREEDY = ("--temperature", 0, "--max-tokens", 8)


def test_generate(tiny_gguf: Path, folders: list[Path], tmp_path: Path) -> None:
    """One adapter answers all; of several, each line names its own, or none."""
    adapters = [f"{name}={folder}" for name, folder in zip(("one", "two"), folders, strict=True)]
    ask = ("generate", tiny_gguf, *GREEDY, "--prompt", "Hello")
    texts = [run(*ask).stdout]
    texts += [run(*ask, "--adapter", one).stdout for one in adapters]
    assert len(set(texts)) == 3
    lines = [{"prompt": "Hello"}, *({"prompt": "Hello", "adapter": n} for n in ("one", "two"))]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    both = [word for one in adapters for word in ("--adapter", one)]
    done = run("generate", tiny_gguf, *GREEDY, "--prompts-file", file, *both)
    assert [json.loads(line)["text"] + "\n" for line in done.stdout.splitlines()] == texts
    assert_fails(run(*ask, "--adapter", f"x={tmp_path}"), 1, "not a LoRA adapter")
    more = ("--max-adapters", 1, "--prompts-file", file, *both)
    assert_fails(run("generate", tiny_gguf, *more), 1, "max_adapters is 1")
    file.write_text('{"prompt": "x", "adapter": "three"}')
    failed = run("generate", tiny_gguf, "--prompts-file", file, *both)
    assert_fails(failed, 1, "line 1", "no adapter 'three'", "one, two")


def test_chat(tiny_gguf: Path, folders: list[Path], tmp_path: Path) -> None:
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    script = "Hi\n/reset\n/adapter two\nHi\n/reset\n/adapter\nHi\n/adapter three\n"
    both = [f"--adapter={name}={at}" for name, at in zip(("one", "two"), folders, strict=True)]
    done = run("chat", tiny_gguf, *GREEDY, "--chat-template", template, *both, stdin=script)
    assert done.returncode == 0
    ask = ("generate", tiny_gguf, *GREEDY, "--prompt", "Hi")
    alone = [run(*ask, *one).stdout for one in ([both[0]], [both[1]], [])]
    assert done.stdout == "".join(alone)
    assert "two answers." in done.stderr and "no adapter 'three'" in done.stderr
