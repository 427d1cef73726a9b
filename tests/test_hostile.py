"""Corrupt and hostile checkpoints, as a user meets them: one sentence that names the thing, exit code 1,
never a traceback, and nothing half done is left."""

from __future__ import annotations

import json
import os
import shlex
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elinvar import cli
from elinvar.base.errors import MAX_MESSAGE, ElinvarError, ModelError
from elinvar.models.registry import FAMILIES, read_config
from elinvar.weights import sources
from elinvar.weights.checkpoint import open_checkpoint
from elinvar.weights.load import load_weights
from elinvar.weights.rules import bind
from elinvar.weights.safetensors import INDEX, SINGLE
from families import CASES
from families.base import SIZES
from model_files import random_blocks, write_gguf
from test_gguf import WORDS, header, tensor, text
from test_sources import Hub, cache, hub  # noqa: F401 (fixtures)

CONFIG: dict[str, Any] = {
    **{"architectures": ["LlamaForCausalLM"], "vocab_size": 40, "hidden_size": 32},
    **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
    **{"intermediate_size": 64, "max_position_embeddings": 64, "rms_norm_eps": 1e-5},
}
LLAMA = next(family for family in FAMILIES if family.name == "llama")
BINDINGS = bind(LLAMA.rules(LLAMA.config_from_hf(CONFIG)), "safetensors", 1)
SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
Q, DOWN = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"


@dataclass
class Folder:
    """A model of two shards; tests break it before it is written."""

    path: Path
    config: Any = field(default_factory=lambda: deepcopy(CONFIG))
    index: Any = None
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    """File -> header."""
    data: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at = dict.fromkeys(SHARDS, 0)
        weight_map = {}
        for i, binding in enumerate(BINDINGS):
            file, shape = SHARDS[i % 2], binding.stored_shape or ()
            end = at[file] + 4 * int(np.prod(shape))
            info = {"dtype": "F32", "shape": list(shape), "data_offsets": [at[file], end]}
            self.shards.setdefault(file, {})[binding.source] = info
            weight_map[binding.source], at[file] = file, end
        self.data = {file: bytes(size) for file, size in at.items()}
        self.index = {"metadata": {}, "weight_map": weight_map}

    def info(self, name: str) -> dict[str, Any]:
        return next(shard[name] for shard in self.shards.values() if name in shard)

    def write(self) -> Path:
        self.path.mkdir()
        for file, shard in self.shards.items():
            raw = shard if isinstance(shard, bytes) else json.dumps(shard).encode()
            (self.path / file).write_bytes(struct.pack("<Q", len(raw)) + raw + self.data[file])
        for name, value in (("config.json", self.config), (INDEX, self.index)):
            raw = value if isinstance(value, bytes) else json.dumps(value).encode()
            (self.path / name).write_bytes(raw)
        return self.path


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


def deep(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


def put(key: str, value: Any) -> Callable[[Folder], None]:
    return lambda m: m.config.update({key: value})


def tell(name: str, shard: Any) -> Callable[[Folder], None]:
    return lambda m: m.index["weight_map"].update({name: shard})


def say(name: str, **changes: Any) -> Callable[[Folder], None]:
    return lambda m: m.info(name).update(changes)


def twice(m: Folder) -> None:
    first = next(iter(m.shards[SHARDS[0]]))
    end = len(m.data[SHARDS[1]])
    info = m.info(first)
    size = info["data_offsets"][1] - info["data_offsets"][0]
    m.shards[SHARDS[1]][first] = info | {"data_offsets": [end, end + size]}
    m.data[SHARDS[1]] += bytes(size)


def nested_twice(m: Folder) -> None:
    m.config = {"architectures": ["LlamaForCausalLM"], "text_config": CONFIG}
    name, end = "language_model.model.norm.weight", len(m.data[SHARDS[1]])
    info = {"dtype": "F32", "shape": [32], "data_offsets": [end, end + 128]}
    m.shards[SHARDS[1]][name] = info
    m.data[SHARDS[1]] += bytes(128)


def lose(name: str) -> Callable[[Folder], None]:
    """Under another name nobody misses the bytes."""

    def change(m: Folder) -> None:
        shard = next(shard for shard in m.shards.values() if name in shard)
        shard["other"] = shard.pop(name)
        m.index["weight_map"]["other"] = m.index["weight_map"].pop(name)

    return change


def whole(attribute: str, value: Any) -> Callable[[Folder], None]:
    return lambda m: setattr(m, attribute, value)


def shard_header(raw: bytes) -> Callable[[Folder], None]:
    return lambda m: m.shards.update({SHARDS[0]: raw})


def overlap(m: Folder) -> None:
    for name, info in list(m.shards[SHARDS[0]].items())[1:2]:
        begin, end = info["data_offsets"]
        m.shards[SHARDS[0]][name] = info | {"data_offsets": [begin - 4, end - 4]}


def swap_shards(m: Folder) -> None:
    weight_map = m.index["weight_map"]
    weight_map[Q] = next(file for file in SHARDS if file != weight_map[Q])


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


# Scales.


def scale_names(tensors: dict[str, Any]) -> list[str]:
    parts = "scale", "absmax", "SCB"
    return [name for name in tensors if any(p in name for p in parts) and "nested" not in name]


SCHEMES = (
    *("gptq", "gptq-act-order", "gptq-8", "awq", "w4a16", "w4a16-asymmetric", "w8a16", "w8a8"),
    *("w8a8-fp8", "w8a8-fp8-channel", "nvfp4", "nvfp4-modelopt", "fp8-blocks", "mxfp4"),
    *("nf4", "llm-int8", "sparse-fp8", "hqq", "hqq-8", "hqq-axis-0"),
)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_scales(
    scheme: str, value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A scale that is not finite is found when weights are packed, and its tensor named. Zeros and
    negative ones are numbers like others: no tool writes them, and the weights are what they say."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import test_schemes

    tensors, quantisation = test_schemes.matrix(scheme)
    names = scale_names(tensors)
    assert names
    for name in names:
        changed = tensors[name].clone()
        if changed.dtype == torch.uint8:  # exponents
            if value <= 0 or np.isinf(value):
                continue
            changed.view(-1)[-1] = 255
        else:
            changed.view(-1)[-1] = value
            if np.isinf(value) and not changed.float().isinf().any():
                continue  # e4m3 has none
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        checkpoint = test_schemes.folder_of(folder, tensors | {name: changed}, quantisation)
        ((matrix, stored),) = checkpoint.tensors.items()
        rules = [test_schemes.Rule("w", matrix, None, stored.shape)]
        for format in ("auto", "f32"):
            if np.isfinite(value) and not (value == 0 and "global" in name):
                load_weights(checkpoint, rules, test_schemes.CONFIG, format)  # type: ignore[arg-type]
                continue
            with pytest.raises(ModelError) as caught:
                load_weights(
                    checkpoint,
                    rules,
                    test_schemes.CONFIG,
                    format,
                    tmp_path / "cache",  # type: ignore[arg-type]
                )
            assert f"Tensor {name} holds scales that are not finite" in str(caught.value)
        assert not list((tmp_path / "cache").glob("packed/*"))


# Anything at all.

ODD: list[Any] = [
    *(-1, 0, 1, 3, 10**30, 10**400, 1e30, -1e30, 1e-30, float("nan"), float("inf"), True, False),
    *("x", "", "\ud800", None, [], [1], [None], {}, {"a": 1}, {"rope_type": ["yarn"]}),
    *([10**400] * 8, [float("nan")] * 8, json.loads(deep(800))),
]


@pytest.mark.parametrize("case", CASES)
def test_every_key_of_every_family_may_be_anything(case: str) -> None:
    transformers = pytest.importorskip("transformers")
    one = CASES[case]
    settings = deepcopy(SIZES | one.settings)
    if one.around is not None:
        settings = one.around | {"text_config": settings}
    good = getattr(transformers, one.config)(**settings).to_dict()
    good = good["text_config"] if one.around is not None else good
    good = one.published.config(good) if one.published else good
    architecture = one.published.architecture if one.published else one.architecture
    family = next(f for f in FAMILIES if architecture in f.hf_architectures)
    good["architectures"] = [architecture]
    variants = [good | {key: value} for key in good for value in ODD if key != "architectures"]
    for key in ("rope_parameters", "rope_scaling"):
        inner = good.get(key)
        if isinstance(inner, dict):
            variants += [good | {key: inner | {k: value}} for k in inner for value in ODD]
    for config in variants:
        try:
            family.config_from_hf(config)
        except ElinvarError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_setting_and_small_part_of_a_scheme_may_be_anything(
    scheme: str, tmp_path: Path
) -> None:
    """Of its settings, the sizes among its tensors, and JSON inside of one."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import test_schemes

    tensors, quantisation = test_schemes.matrix(scheme)
    variants = [(tensors, quantisation | {key: v}) for key in quantisation for v in ODD]
    for name, values in tensors.items():
        if values.numel() <= 2 and values.dtype in (torch.int32, torch.int64):
            variants += [
                (tensors | {name: torch.full_like(values, number)}, quantisation)
                for number in (-(2**31), -1, 0, 1, 7, 31, 2**31 - 1)
            ]
        if "quant_state" in name:
            state = json.loads(bytes(values.tolist()))
            for key, value in ((key, value) for key in [*state, "nested_offset"] for value in ODD):
                raw = json.dumps(state | {key: value}).encode()
                said = torch.tensor(list(raw), dtype=torch.uint8)
                variants.append((tensors | {name: said}, quantisation))
    for parts, said in variants:
        try:
            checkpoint = test_schemes.folder_of(tmp_path, parts, said)
            for stored in checkpoint.tensors.values():
                if stored.matrix is not None:
                    rules = [test_schemes.Rule("w", stored.name, None, stored.shape)]
                    load_weights(checkpoint, rules, test_schemes.CONFIG)
        except ModelError as error:
            assert "\n" not in str(error)


def test_truncated_json(tmp_path: Path) -> None:
    path = Folder(tmp_path / "m").write()
    for name in ("config.json", INDEX):
        good = (path / name).read_bytes()
        for size in range(0, len(good), 3):
            (path / name).write_bytes(good[:size])
            with pytest.raises(ModelError, match="is not valid JSON"):
                open_checkpoint(path)
        (path / name).write_bytes(good)


FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(data=st.data())
def test_flipped_bytes_of_a_folder(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "m"
    if not path.exists():
        Folder(path).write()
    name = data.draw(st.sampled_from(["config.json", INDEX, *SHARDS]))
    good = (path / name).read_bytes()
    raw = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(len(raw) - 1, 1500)))
        raw[at : at + 1] = data.draw(st.binary(min_size=1, max_size=3))
    (path / name).write_bytes(raw)
    try:
        checkpoint = open_checkpoint(path)
        config = read_config(checkpoint)
        load_weights(checkpoint, LLAMA.rules(config), config)
    except ModelError as error:
        assert "\n" not in str(error)
    finally:
        (path / name).write_bytes(good)


# Pickles, and what comes from elsewhere.


@pytest.mark.parametrize("name", ["pytorch_model.bin", "it's.pt"])
def test_the_command_that_converts_a_pickle_works(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    folder = tmp_path / "a model [1]"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    w = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    torch.save({"w": w.T, "tied": w}, folder / name)
    (folder / "optimizer.pt").write_bytes(b"\x80\x04")
    with pytest.raises(ModelError) as caught:
        open_checkpoint(folder if name == "pytorch_model.bin" else folder / name)
    assert f"{name} is a pickle, which can run code when opened; python3 -c " in str(caught.value)
    message = str(caught.value)
    command = shlex.split(message[message.index("python3") : message.index(" makes ")])
    subprocess.run([sys.executable, *command[1:]], check=True)
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.tensors) == {"w", "tied"}
    assert checkpoint.tensors["w"].data.tobytes() == w.T.contiguous().numpy().tobytes()


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def test_no_pickle_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for name in ("pytorch_model.bin", "x.pkl", "model.pt", "x.pth", "x.ckpt"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil()))
        for path in (tmp_path, tmp_path / name):
            with pytest.raises(ModelError, match="is a pickle"):
                open_checkpoint(path)
    assert not (tmp_path / "ran").exists()
    (tmp_path / SINGLE).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ModelError, match="truncated or corrupt"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name", ["../../evil.gguf", "/tmp/evil.gguf", "a/../../evil.gguf", "..\\evil.gguf"]
)
def test_names_in_a_hub_s_list_stay_in_the_folder(
    name: str,
    hub: type[Hub],  # noqa: F811
    cache: Path,  # noqa: F811
) -> None:
    hub.files = {name: b"GGUF" + bytes(99)}
    answer = hub.file
    hub.file = lambda self, asked: answer(self, name)  # type: ignore[method-assign,assignment]
    try:
        path = sources.pull("hf:org/name")
    except ModelError as error:
        assert "\n" not in str(error)
    else:
        assert path.resolve().is_relative_to(cache.resolve())
    assert not Path("/tmp/evil.gguf").exists() and not list(cache.parent.glob("evil*"))


@pytest.mark.parametrize(
    "listing",
    [
        b"[" * 99_999,
        b'{"sha": "c", "siblings": ' + deep(50_000) + b"}",
        b'{"sha": "c", "siblings": [{"rfilename": "a\\u0000.safetensors", "size": 1, "blobId": ""}]}',
        b'{"sha": "c", "siblings": [{"rfilename": "\\ud800.safetensors", "size": 1, "blobId": ""}]}',
        b'{"sha": "c", "siblings": [{"rfilename": "m.gguf", "size": Infinity, "blobId": ""}]}',
        b'{"sha": "c", "siblings": [{"rfilename": "m.gguf", "size": "NaN", "blobId": ""}]}',
    ],
)
def test_a_hub_that_answers_nonsense(
    listing: bytes,
    hub: type[Hub],  # noqa: F811
    cache: Path,  # noqa: F811
) -> None:
    hub.info = lambda self: self.answer(listing)  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="does not answer like a Hugging Face hub"):
        sources.pull("hf:org/name")
    assert not list(cache.glob("models/*"))
