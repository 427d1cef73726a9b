"""The GGUF parser against the reference package, and against damaged files."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elinvar.base.errors import ModelError
from elinvar.weights.gguf import StringArray, read_gguf
from elinvar.weights.quants import SUPPORTED
from model_files import random_blocks, read_or_model_error, touch, write_gguf

FUZZ = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = {f"t.{dtype}": (dtype, random_blocks(dtype, 3, 256)) for dtype in SUPPORTED}
    tensors["norm"] = ("F32", random_blocks("F32", 1, 7))
    return write_gguf(
        tmp_path_factory.mktemp("gguf") / "small.gguf",
        tensors,
        a__int=7,
        a__float=0.5,
        a__text="héllo",
        a__bool=True,
        a__words=["", "one", "zwei", "三"],
        a__numbers=[1, 2, 3],
        a__floats=[0.5, 1.5],
        a__bools=[True, False, True],
    )


def parse(path: Path) -> None:
    file = read_gguf(path)
    touch(file.metadata, file.tensors)
    file.tensors.clear()
    file.file.close()


def test_values_and_tensors(small: Path) -> None:
    file = read_gguf(small)
    assert file.metadata["general.architecture"] == "llama"
    assert (file.metadata["a.int"], file.metadata["a.float"]) == (7, 0.5)
    assert (file.metadata["a.text"], file.metadata["a.bool"]) == ("héllo", True)
    words = file.metadata["a.words"]
    assert len(words) == 4 and list(words) == ["", "one", "zwei", "三"]
    assert words[1:3] == ["one", "zwei"] and words[-1] == "三"
    assert file.metadata["a.numbers"].tolist() == [1, 2, 3]
    assert file.metadata["a.floats"].tolist() == [0.5, 1.5]
    assert file.metadata["a.bools"].tolist() == [True, False, True]
    assert file.tensors["norm"].shape == (7,) and file.tensors["norm"].data.shape == (1, 28)
    for dtype in SUPPORTED:
        tensor = file.tensors[f"t.{dtype}"]
        assert (tensor.shape, tensor.dtype) == ((3, 256), dtype)
        assert np.array_equal(tensor.data, random_blocks(dtype, 3, 256))


def test_strings_outlive_the_file(small: Path) -> None:
    file = read_gguf(small)
    words = file.metadata["a.words"]
    file.file.close()
    assert list(words) == ["", "one", "zwei", "三"]


@pytest.mark.parametrize("name", ["tiny_gguf", "smollm2_gguf"])
def test_real_file_as_the_reference_reads_it(name: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(name)
    file, reference = read_gguf(path), gguf.GGUFReader(path)
    assert list(file.tensors) == [t.name for t in reference.tensors]
    for expected in reference.tensors:
        tensor = file.tensors[expected.name]
        assert tensor.dtype == expected.tensor_type.name
        assert tensor.shape == tuple(reversed(expected.shape.tolist()))
        assert np.array_equal(tensor.data.reshape(-1), expected.data.reshape(-1).view(np.uint8))
    for key, field in reference.fields.items():
        if not key.startswith("GGUF."):
            value = file.metadata[key]
            value = list(value) if isinstance(value, np.ndarray | StringArray) else value
            assert value == field.contents(), key


def test_every_truncation_is_a_model_error(small: Path, tmp_path: Path) -> None:
    raw = small.read_bytes()
    file = read_gguf(small)
    end = max(t.data.__array_interface__["data"][0] + t.data.nbytes for t in file.tensors.values())
    end -= np.frombuffer(file.file.view, np.uint8).__array_interface__["data"][0]
    path = tmp_path / "cut.gguf"
    path.write_bytes(raw)
    data_start = raw.index(b"norm") + 64
    for size in [*range(end - 1, data_start, -97), *range(min(data_start, end - 1), -1, -1)]:
        with path.open("r+b") as out:
            out.truncate(size)
        assert not read_or_model_error(parse, path), size


@FUZZ
@given(data=st.data())
def test_flipped_bytes(small: Path, tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(small.read_bytes())
    header = raw.index(b"norm") + 64
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header))
        raw[at : at + 1] = data.draw(st.binary(min_size=1, max_size=8))
    path = tmp_path / "flipped.gguf"
    path.write_bytes(raw)
    read_or_model_error(parse, path)


@settings(FUZZ, max_examples=40)
@given(data=st.data())
def test_damaged_real_file(tiny_gguf: Path, tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(tiny_gguf.read_bytes())
    at = data.draw(st.one_of(st.integers(0, 1500), st.integers(0, len(raw) - 8)))
    if data.draw(st.booleans()):
        del raw[at:]
    else:
        raw[at : at + 8] = data.draw(st.binary(min_size=8, max_size=8))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(raw)
    read_or_model_error(parse, path)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(num_tensors: int, num_keys: int, body: bytes, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + body + bytes(256)


def tensor(shape: tuple[int, ...], code: int = 0, offset: int = 0, name: str = "w") -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", code, offset)


HUGE = 2**64 - 1
WORDS = text("k") + struct.pack("<II", 9, 8)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "empty"),
        (b"PK\3\4" + bytes(99), "not a GGUF file"),
        (header(0, 0, b"", version=1), "version 1"),
        (header(0, 0, b"", version=3 << 24), "big-endian"),
        (header(HUGE, 0, b""), "number of tensors"),
        (header(0, HUGE, b""), "number of metadata keys"),
        (header(0, 1, struct.pack("<Q", HUGE)), "ends within a metadata key"),
        (header(0, 1, struct.pack("<Q", 2) + b"\xff\xfe"), "not UTF-8"),
        (header(0, 1, text("k") + struct.pack("<I", 77)), "value type 77"),
        (header(0, 1, text("k") + struct.pack("<IIQ", 9, 9, 1)), "value type 9"),
        (header(0, 1, text("k") + struct.pack("<IIQ", 9, 6, HUGE)), "length of k"),
        (header(0, 1, text("k") + struct.pack("<IIQ", 9, 12, 200)), "ends within"),
        (header(0, 1, WORDS + struct.pack("<Q", HUGE)), "length of k"),
        (header(0, 1, WORDS + struct.pack("<QQ", 2, HUGE)), "ends within the value of k"),
        (header(0, 1, WORDS + struct.pack("<QQ", 2, 2**62)), "ends within the value of k"),
        (header(0, 2, 2 * (text("k") + struct.pack("<IB", 7, 1))), "appears twice"),
        (header(1, 0, tensor(())), "0 dimensions"),
        (header(1, 0, tensor((1, 1, 1, 1, 1))), "5 dimensions"),
        (header(1, 0, tensor((4, 0))), "has shape [0, 4]"),
        (header(1, 0, tensor((33, 1), code=8)), "has shape [1, 33]"),
        (header(1, 0, tensor((2**62, 2**62))), "lies outside the file"),
        (header(1, 0, tensor((4,), offset=2**63)), "lies outside the file"),
        (header(1, 0, tensor((4,), offset=3)), "lies outside the file"),
        (header(2, 0, 2 * tensor((4,))), "appears twice"),
        (header(1, 0, tensor((256,), code=15)), "type Q8_K, which is not supported; use"),
        (header(1, 0, tensor((256,), code=99)), "type number 99, which is not supported"),
        (
            header(1, 1, text("general.alignment") + struct.pack("<II", 4, 0) + tensor((4,))),
            "alignment of 0",
        ),
        (header(0, 1, text("split.count") + struct.pack("<IH", 2, 3)), "one of 3 parts"),
    ],
)
def test_bad_headers(raw: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(ModelError) as caught:
        parse(path)
    assert message in str(caught.value)


def test_text_that_is_not_utf8_is_found_when_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "words.gguf"
    words = struct.pack("<Q", 2) + text("fine") + struct.pack("<Q", 1) + b"\xff"
    path.write_bytes(header(0, 1, WORDS + words))
    file = read_gguf(path)
    assert len(file.metadata["k"]) == 2
    with pytest.raises(ModelError, match="k is not UTF-8"):
        file.metadata["k"][0]
