"""What a person sees while weights are packed, and what Ctrl-C leaves of it: nothing."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import time
from pathlib import Path

import pytest

from processes import ELINVAR, ENVIRONMENT, assert_fails, run


def llama(folder: Path, vocab_size: int) -> Path:
    """A model without layers to speak of and with an embedding of vocab_size x 1 KB, all zeros: a file
    with a hole takes no disk. It has no tokenizer."""
    shapes = {
        "model.embed_tokens.weight": (vocab_size, 256),
        "model.norm.weight": (256,),
        **dict.fromkeys(
            (f"model.layers.0.{n}_layernorm.weight" for n in ("input", "post_attention")), (256,)
        ),
        **{f"model.layers.0.self_attn.{n}_proj.weight": (256, 256) for n in "qkvo"},
        **{f"model.layers.0.mlp.{n}_proj.weight": (256, 256) for n in ("gate", "up", "down")},
    }
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 4 * shape[0] * (shape[1] if shape[1:] else 1)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    config = {
        **{"architectures": ["LlamaForCausalLM"], "vocab_size": vocab_size, "hidden_size": 256},
        **{"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 256},
        **{"max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_bar_with_bytes_and_no_half_file(number: int, tmp_path: Path) -> None:
    model, cache = llama(tmp_path / "m", 1 << 21), tmp_path / "cache"
    environment = {**ENVIRONMENT, "ELINVAR_CACHE": str(cache), "TERM": "xterm"}
    environment.pop("NO_COLOR")
    master, slave = pty.openpty()
    command = [ELINVAR, "generate", str(model), "--prompt", "x"]
    child = subprocess.Popen(command, stderr=slave, stdout=subprocess.DEVNULL, env=environment)
    os.close(slave)
    seen = ""
    end = time.monotonic() + 60
    pattern = r"packing.* [\d.]+ MB of 2\.1 GB.*\d:\d\d:\d\d"
    while not re.search(pattern, seen):
        ready, _, _ = select.select([master], [], [], max(0, end - time.monotonic()))
        assert ready, seen
        seen += os.read(master, 4096).decode(errors="replace")
    assert list((cache / "packed").glob("*.tmp")) == list((cache / "packed").iterdir()) != []
    child.send_signal(number)
    while True:
        try:
            more = os.read(master, 4096)
        except OSError:
            break
        if not more:
            break
        seen += more.decode(errors="replace")
    os.close(master)
    assert child.wait(timeout=60) == 128 + number
    assert "Traceback" not in seen
    assert list((cache / "packed").iterdir()) == []


def test_no_bar_where_nobody_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENVIRONMENT, "ELINVAR_CACHE", str(tmp_path / "cache"))
    done = run("generate", llama(tmp_path / "m", 1 << 10), "--prompt", "x")
    assert_fails(done, 1, "tokenizer.json")
    assert len(list((tmp_path / "cache" / "packed").iterdir())) == 1
