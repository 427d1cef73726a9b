"""The safetensors reader and writer against the reference package, and against damaged files."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from elinvar.base.errors import ModelError
from elinvar.weights.checkpoint import open_checkpoint
from elinvar.weights.safetensors import INDEX, SINGLE, read_safetensors, write_safetensors
from model_files import float_rows, read_or_model_error, touch, write_gguf

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8}


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.standard_normal((3, 8)).astype(np.float32),
        "b.weight": rng.standard_normal((5, 4)).astype(np.float16),
        "norm.weight": rng.standard_normal(7).astype(np.float32),
        "cube": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "ids": np.arange(5),
        "none": np.zeros((0, 4), np.float32),
    }


def folder_of(path: Path, config: object = CONFIG) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(arrays(), path / SINGLE)
    return path


def sharded(path: Path) -> Path:
    folder_of(path)
    (path / SINGLE).unlink()
    weight_map = {}
    for i, (name, value) in enumerate(arrays().items()):
        shard = f"model-0000{i % 2 + 1}-of-00002.safetensors"
        weight_map[name] = shard
        old = load_file(path / shard) if (path / shard).exists() else {}
        save_file({**old, name: value}, path / shard)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def parse(folder: Path) -> None:
    files, tensors = read_safetensors(folder)
    touch({}, tensors)
    tensors.clear()
    for file in files:
        file.close()


@pytest.mark.parametrize("make", [folder_of, sharded])
def test_checkpoint_folder(make, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make(tmp_path / "m"))
    assert checkpoint.format == "safetensors" and checkpoint.architecture == "LlamaForCausalLM"
    assert checkpoint.metadata == CONFIG and set(checkpoint.tensors) == set(arrays())
    for name, value in arrays().items():
        tensor = checkpoint.tensors[name]
        assert tensor.shape == value.shape
        assert tensor.data.tobytes() == value.tobytes()
    assert checkpoint.tensors["cube"].data.shape == (6, 16)
    assert checkpoint.tensors["norm.weight"].data.shape == (1, 28)
    checkpoint.close()


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m")
    first = open_checkpoint(folder).fingerprint
    assert open_checkpoint(folder).fingerprint == first
    (folder / "config.json").write_text(json.dumps({**CONFIG, "hidden_size": 9}))
    second = open_checkpoint(folder).fingerprint
    (folder / SINGLE).touch()
    assert len({first, second, open_checkpoint(folder).fingerprint}) == 3


def test_write_is_read_by_the_reference(tmp_path: Path) -> None:
    values = {k: v for k, v in arrays().items() if k != "ids"}
    dtypes = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}
    entries = [(name, dtypes[v.dtype], v.shape) for name, v in values.items()]
    write_safetensors(tmp_path / SINGLE, entries, values.__getitem__)
    for name, value in load_file(tmp_path / SINGLE).items():
        assert value.dtype == values[name].dtype and np.array_equal(value, values[name])
    bits = float_rows("BF16", np.ones((2, 4), np.float32))
    write_safetensors(tmp_path / SINGLE, [("w", "BF16", (2, 4))], lambda name: bits)
    _, tensors = read_safetensors(tmp_path)
    assert tensors["w"].dtype == "BF16" and np.array_equal(tensors["w"].data, bits)


def test_every_truncation_is_a_model_error(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "m") / SINGLE
    for size in range(path.stat().st_size - 1, -1, -1):
        with path.open("r+b") as file:
            file.truncate(size)
        assert not read_or_model_error(parse, path.parent), size
    save_file(arrays(), path)
    with path.open("ab") as file:
        file.write(b"more")
    assert not read_or_model_error(parse, path.parent)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_flipped_bytes(tmp_path: Path, data: st.DataObject) -> None:
    path = folder_of(tmp_path / "m") / SINGLE
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack_from("<Q", raw)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, length + 8))
        raw[at : at + 1] = data.draw(st.binary(min_size=1, max_size=4))
    path.write_bytes(raw)
    read_or_model_error(parse, path.parent)


def info(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def raw_file(header: object, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is empty"),
        (b"1234", "shorter than a header"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "said to take"),
        (raw_file(b"{" * 5000), "not valid JSON"),
        (raw_file(b"[" * 200_000), "not valid JSON"),
        (raw_file(b"\xff\xfe"), "not valid JSON"),
        (raw_file(b"9" * 5000), "not valid JSON"),
        (raw_file([]), "not a JSON object"),
        (raw_file({"w": 3}), "has no description"),
        (raw_file(info(dtype="F4")), "type F4, which is not supported; use"),
        (raw_file(info(dtype=["F32"])), "which is not supported; use"),
        (raw_file(info(shape=[-2])), "has shape [-2]"),
        (raw_file(info(shape=[True, 2])), "has shape [True, 2]"),
        (raw_file(info(shape=[2.0])), "has shape [2.0]"),
        (raw_file(info(shape="2")), "has shape '2'"),
        (raw_file(info(shape=[2**62, 2**62])), "takes 8 bytes where"),
        (raw_file(info(shape=[1] * 9)), "has shape"),
        (raw_file(info(offsets=[0, 8, 9])), "and offsets [0, 8, 9]"),
        (raw_file(info(offsets=[8, 0])), "takes -8 bytes where"),
        (raw_file(info(offsets=[8, 16]), bytes(16)), "begins at byte 8 and not at 0"),
        (raw_file(info(), bytes(4)), "lies outside the file"),
        (raw_file(info(), bytes(12)), "take 8 bytes of 12"),
        (raw_file({**info(), "v": info()["w"]}), "begins at byte 0 and not at 8"),
        (raw_file(b'{"w":1,"w":2}'), "not valid JSON"),
    ],
)
def test_bad_files(raw: bytes, message: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m")
    (folder / SINGLE).write_bytes(raw)
    with pytest.raises(ModelError) as caught:
        open_checkpoint(folder)
    assert message in str(caught.value)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "a\\b", "..", "", "a\0b", 3])
def test_shards_stay_in_the_folder(shard: object, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a.weight": shard}}))
    with pytest.raises(ModelError, match="not a plain file name"):
        open_checkpoint(folder)


def test_shards_that_do_not_fit_together(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lost"] = "model-00001-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match="does not hold lost"):
        open_checkpoint(folder)
    for name in (
        "model-00002-of-00002.safetensors",
        "n" * 300 + ".safetensors",
        "\ud800.safetensors",
    ):
        index["weight_map"]["lost"] = name
        (folder / INDEX).write_text(json.dumps(index))
        (folder / "model-00002-of-00002.safetensors").unlink(missing_ok=True)
        with pytest.raises(ModelError, match="is missing, though"):
            open_checkpoint(folder)
    (folder / INDEX).write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        open_checkpoint(folder)
    (folder / INDEX).unlink()
    save_file(arrays(), folder / "other.safetensors")
    with pytest.raises(ModelError, match="holds 2 safetensors files and no model"):
        open_checkpoint(folder)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    save_file(arrays(), folder / "model-00002-of-00002.safetensors")
    with pytest.raises(ModelError, match="so does another shard"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must hold a JSON object"),
        ("{}", "names no architecture"),
        ('{"architectures": []}', "names no architecture"),
        ('{"architectures": [3]}', "names no architecture"),
    ],
)
def test_bad_config(config: str, message: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m")
    (folder / "config.json").write_text(config)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(folder)


def test_what_is_not_a_model(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(ModelError) as caught:
            open_checkpoint(path)
        return str(caught.value)

    assert "does not exist" in message(tmp_path / "nothing")
    assert "holds no config.json and no *.gguf" in message(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert "holds no *.safetensors and no *.gguf" in message(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert "is a pickle" in message(tmp_path)
    assert "is a pickle" in message(tmp_path / "pytorch_model.bin")
    (tmp_path / "notes.txt").write_text("hello")
    assert "is not a model file" in message(tmp_path / "notes.txt")
    save_file(arrays(), tmp_path / "part.safetensors")
    assert "give the folder" in message(tmp_path / "part.safetensors")
    (tmp_path / "x.gguf").mkdir()
    assert "holds no config.json" in message(tmp_path / "x.gguf")


def test_folder_with_gguf(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", {"w": ("F32", float_rows("F32", np.ones((2, 2))))})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.format == "gguf" and checkpoint.path == tmp_path / "a.gguf"
    assert checkpoint.architecture == "llama" and list(checkpoint.tensors) == ["w"]
    write_gguf(tmp_path / "b.gguf", {"w": ("F32", float_rows("F32", np.ones((2, 2))))})
    with pytest.raises(ModelError, match=r"2 GGUF files \(a.gguf, b.gguf\); name one"):
        open_checkpoint(tmp_path)
    (tmp_path / "blob").write_bytes((tmp_path / "a.gguf").read_bytes())
    assert open_checkpoint(tmp_path / "blob").format == "gguf"
