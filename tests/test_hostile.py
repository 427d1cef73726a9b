"""Corrupt and hostile checkpoints, as a user meets them: one sentence that names the thing, exit code 1,
never a traceback, and nothing half done is left."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elinvar import cli
from elinvar.base.errors import MAX_MESSAGE
from elinvar.weights.rules import bind
from elinvar.weights.safetensors import INDEX
from hostile_files import (
    CONFIG,
    DOWN,
    LLAMA,
    SHARDS,
    Folder,
    Q,
    deep,
    lose,
    nested_twice,
    overlap,
    put,
    say,
    shard_header,
    swap_shards,
    tell,
    twice,
    whole,
)
from model_files import random_blocks, write_gguf
from test_gguf import WORDS, header, tensor, text


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELINVAR_CACHE", str(tmp_path / "cache"))


def sentence(path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """How `generate` ends with this model, and that `models show` ends well, too."""
    for command in (["generate", str(path), "--prompt", "x"], ["models", "show", str(path)]):
        code = cli._run(command)
        out, err = capsys.readouterr()
        if command[0] == "models" and code == 0:
            continue  # what cannot be run is shown, with its problems
        assert code == 1 and out == "", (command, out)
        lines = err.splitlines()
        assert len(lines) == 1 and lines[0].endswith("."), err
        assert len(lines[0]) < MAX_MESSAGE + 100
        for word in words:
            assert word in lines[0], lines[0]
    packed = path.parent / "cache" / "packed"
    assert not packed.exists() or not list(packed.glob(".*"))
    return lines[0]


def test_the_model_that_is_broken_below_can_be_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence(Folder(tmp_path / "m").write(), capsys, "tokenizer.json")


BROKEN: dict[str, tuple[Callable[[Folder], None], list[str]]] = {
    # config.json
    "no-json": (whole("config", b"{"), ["config.json is not valid JSON"]),
    "a-list": (whole("config", []), ["must hold a JSON object"]),
    "not-utf8": (whole("config", b'{"a": "\xff"}'), ["config.json is not valid JSON"]),
    "deep": (whole("config", b'{"a": ' + deep(100_000) + b"}"), ["config.json is not valid JSON"]),
    "long-number": (whole("config", b'{"a": ' + b"9" * 9999 + b"}"), ["is not valid JSON"]),
    "long-name": (put("architectures", ["A" * 10**6]), ["AAAA", "adding-a-model"]),
    "line-break": (put("architectures", ["A\nB\x1b[2J"]), ["A\\nB\\x1b[2J"]),
    "negative": (put("hidden_size", -1), ["hidden_size = -1", "whole number"]),
    "zero": (put("num_attention_heads", 0), ["num_attention_heads = 0"]),
    "float": (put("hidden_size", 1e30), ["hidden_size = 1e+30"]),
    "huge": (put("vocab_size", 10**30), ["vocab_size = 1000000000"]),
    "text": (put("hidden_size", "32"), ["hidden_size = '32'"]),
    "bool": (put("num_hidden_layers", True), ["num_hidden_layers = True"]),
    "nan": (put("rms_norm_eps", float("nan")), ["rms_norm_eps = nan"]),
    "infinity": (put("rope_theta", float("inf")), ["rope_theta = inf"]),
    "object": (put("intermediate_size", {"a": 1}), ["intermediate_size = {'a': 1}"]),
    "many-layers": (put("num_hidden_layers", 4096), ["lacks the tensor", "and 36854 more"]),
    "other-size": (put("vocab_size", 41), ["embed_tokens", "[40, 32]", "says [41, 32]"]),
    # the index
    "index-no-json": (whole("index", b"nul"), [INDEX, "not valid JSON"]),
    "index-deep": (whole("index", b'{"weight_map":' + deep(99_999) + b"}"), ["not valid JSON"]),
    "index-list": (whole("index", {"weight_map": []}), ["has no weight_map"]),
    "index-number": (tell(Q, 10**30), ["names the shard 1000", "not a plain file name"]),
    "index-up": (tell(Q, "../m/" + SHARDS[0]), ["'../m/model", "not a plain file name"]),
    "index-root": (tell(Q, "/etc/passwd"), ["'/etc/passwd', which is not a plain file name"]),
    "index-windows": (tell(Q, "..\\..\\x"), ["which is not a plain file name"]),
    "index-nul": (tell(Q, "a\0.safetensors"), ["which is not a plain file name"]),
    "index-pickle": (tell(Q, "pytorch_model.bin"), ["which is no *.safetensors file"]),
    "index-missing-file": (tell(Q, "gone.safetensors"), ["gone.safetensors is missing"]),
    "index-wrong-shard": (swap_shards, [f"does not hold {Q}, though"]),
    "index-too-much": (tell("more", SHARDS[0]), ["does not hold more, though"]),
    # headers
    "in-two-shards": (twice, ["and so does another shard"]),
    "nested-twice": (nested_twice, ["language_model.model.norm.weight", "are one weight"]),
    "overlap": (overlap, ["truncated or corrupt", "begins at byte"]),
    "header-no-json": (shard_header(b"{]"), [SHARDS[0], "its header is not valid JSON"]),
    "header-deep": (shard_header(deep(99_999)), ["its header is not valid JSON"]),
    "header-list": (shard_header(b"[]"), ["its header is not a JSON object"]),
    "header-number": (shard_header(b'{"w": 1' + b"0" * 400 + b"}"), ["'w' has no description"]),
    "offsets-huge": (say(Q, data_offsets=[0, 2**80]), [f"tensor '{Q}' has shape"]),
    "offsets-back": (say(Q, data_offsets=[9, 3]), ["truncated or corrupt"]),
    "shape-negative": (say(Q, shape=[-32, -32]), ["has shape [-32, -32]"]),
    "shape-overflow": (say(Q, shape=[2**40, 2**40]), ["bytes where its shape needs"]),
    "type-unknown": (say(Q, dtype="F4"), ["has type F4, which is not supported"]),
    # what is there and what should be
    "missing": (lose(Q), [f"lacks the tensor {Q}"]),
    "turned": (say(DOWN, shape=[64, 32]), [f"{DOWN} of", "[64, 32]", "says [32, 64]"]),
    "flat": (say(DOWN, shape=[2048]), ["has shape [2048]", "says [32, 64]"]),
    "integers": (say(Q, dtype="I32"), [f"{Q} has type I32, which is not supported"]),
    # quantisation
    "method": (put("quantization_config", {"quant_method": "x" * 999}), ["quantised with xxx"]),
    "no-parts": (put("quantization_config", {"quant_method": "gptq"}), ["tokenizer"]),
    "settings": (put("quantization_config", 3), ["is quantised with None"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, words = BROKEN[case]
    folder = Folder(tmp_path / "m")
    change(folder)
    sentence(folder.write(), capsys, *words)


def test_headers_of_two_gigabytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the file is as large as it says: it has a hole, and nothing of it is read."""
    path = Folder(tmp_path / "m").write()
    for size in (100, 3 << 30):
        with (path / SHARDS[0]).open("wb") as file:
            file.write(struct.pack("<Q", 2 << 30) + b'{"')
            file.truncate(size)
        began = time.monotonic()
        sentence(path, capsys, "its header is said to take 2147483648 bytes")
        assert time.monotonic() - began < 5
    with (path / "config.json").open("wb") as file:
        file.truncate(3 << 30)
    sentence(path, capsys, "config.json is larger than 100,000,000 bytes")


def test_what_is_no_regular_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pipe would be waited for, a device never ends. Links to files are how caches look."""
    path = Folder(tmp_path / "m").write()
    for name in (SHARDS[1], INDEX, "config.json"):
        kept = (path / name).rename(tmp_path / name)
        for make in (os.mkfifo, os.mkdir, lambda at: os.symlink("/dev/zero", at)):
            make(path / name)
            sentence(path, capsys, f"{name} is not a regular file")
            (path / name).rmdir() if (path / name).is_dir() else (path / name).unlink()
        (path / name).symlink_to(tmp_path / "gone")
        sentence(path, capsys)
        (path / name).unlink()
        (path / name).symlink_to(kept)
        sentence(path, capsys, "tokenizer.json")


HUGE = 2**64 - 1
GGUFS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "zip": (b"PK\3\4" + bytes(99), "is not a GGUF file"),
    "tensors": (header(2**60, 0, b""), "the number of tensors is 1152921504606846976, more than"),
    "keys": (header(0, 2**60, b""), "the number of metadata keys is"),
    "text-length": (header(0, 1, struct.pack("<Q", 2**63)), "ends within a metadata key"),
    "array-length": (header(0, 1, text("k") + struct.pack("<IIQ", 9, 6, 2**60)), "length of k is"),
    "arrays-of-arrays": (
        header(0, 1, text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 1000),
        "k has the unknown value type 9",
    ),
    "words-length": (header(0, 1, WORDS + struct.pack("<QQ", 3, HUGE)), "ends within the value"),
    "alignment-0": (
        header(1, 1, text("general.alignment") + struct.pack("<II", 4, 0) + tensor((4,))),
        "an alignment of 0",
    ),
    "alignment-3": (
        header(1, 1, text("general.alignment") + struct.pack("<II", 4, 3) + tensor((4,))),
        "an alignment of 3",
    ),
    "alignment-huge": (
        header(1, 1, text("general.alignment") + struct.pack("<IQ", 10, 2**63) + tensor((4,))),
        "'w' lies outside the file",
    ),
    "alignment-text": (
        header(1, 1, text("general.alignment") + struct.pack("<I", 8) + text("x") + tensor((4,))),
        "an alignment of 'x'",
    ),
    "offset": (header(1, 0, tensor((4,), offset=2**64 - 32)), "'w' lies outside the file"),
    "shape": (header(1, 0, tensor((2**63, 2**63))), "'w' lies outside the file"),
    "twice": (header(2, 0, 2 * tensor((4,))), "the tensor 'w' appears twice"),
    "no-architecture": (header(0, 0, b""), "has no general.architecture"),
    "long-architecture": (
        header(0, 1, text("general.architecture") + struct.pack("<I", 8) + text("y" * 10**5)),
        "adding-a-model",
    ),
}


@pytest.mark.parametrize("case", GGUFS)
def test_broken_gguf(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, word = GGUFS[case]
    (tmp_path / "m.gguf").write_bytes(raw)
    sentence(tmp_path / "m.gguf", capsys, word)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"llama__embedding_length": -1.0}, ["llama.embedding_length = -1.0"]),
        ({"llama__block_count": True}, ["llama.block_count = True"]),
        ({"llama__context_length": "many"}, ["llama.context_length = 'many'"]),
        ({"llama__attention__head_count": [2, 2]}, ["llama.attention.head_count ="]),
        ({"llama__rope__freq_base": float("nan")}, ["llama.rope.freq_base = nan"]),
        ({"llama__expert_count": 4096, "llama__block_count": 4096}, ["16777216"]),
        ({"llama__feed_forward_length": 96}, ["ffn_gate", "[64, 32]", "says [96, 32]"]),
    ],
)
def test_gguf_keys(
    keys: dict[str, Any], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good: dict[str, Any] = {
        **{"llama__embedding_length": 32, "llama__block_count": 1, "llama__context_length": 64},
        **{"llama__attention__head_count": 2, "llama__attention__head_count_kv": 1},
        **{"llama__feed_forward_length": 64, "llama__attention__layer_norm_rms_epsilon": 1e-5},
    }
    if "llama__expert_count" in keys:
        keys = keys | {"llama__expert_used_count": 2}
        words = ["4096 layers of 4096 experts"]
    rules = LLAMA.rules(LLAMA.config_from_hf(CONFIG))
    tensors = {
        b.source: ("F32", random_blocks("F32", *(1, *(b.shape or ()))[-2:]))
        for b in bind(rules, "gguf", 1)
    }
    sentence(write_gguf(tmp_path / "m.gguf", tensors, **good | keys), capsys, *words)
