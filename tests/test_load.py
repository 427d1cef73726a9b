"""load_weights: packing through the cache, and its errors."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from elinvar.base.config import ModelConfig
from elinvar.base.errors import ModelError
from elinvar.ops.layout import Weight, unpack
from elinvar.weights import atomic, load
from elinvar.weights.checkpoint import Checkpoint, open_checkpoint
from elinvar.weights.fixes import TransposeHeads
from elinvar.weights.load import load_weights
from elinvar.weights.quants import SUPPORTED, dequantize
from elinvar.weights.rules import Part, Rule, State
from model_files import float_rows, host_tensor, write_gguf
from test_rules import CONFIG

ROWS, K = 40, 256
RULES = [Rule(d, None, f"{d}.weight", (ROWS, K)) for d in SUPPORTED]
RULES.append(Rule("gain", None, "gain.weight", (K,)))


def plain_config(checkpoint: Checkpoint) -> tuple[list[Rule], ModelConfig]:
    """Rules that take every tensor of a file by its own name."""
    rules = [Rule(t.name, None, t.name, t.shape) for t in checkpoint.tensors.values()]
    return rules, replace(CONFIG, num_layers=1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tensors = {f"{d}.weight": (d, host_tensor(d, ROWS, K).data) for d in SUPPORTED}
    tensors["gain.weight"] = ("F16", float_rows("F16", np.linspace(-1, 1, K)[None]))
    return write_gguf(tmp_path / "my model.gguf", tensors)


def loaded(model: Path, **options: object) -> tuple[State, list[str]]:
    log: list[str] = []
    return load_weights(open_checkpoint(model), RULES, CONFIG, log=log.append, **options), log


def same(a: State, b: State) -> bool:
    def bits(value: object) -> np.ndarray:
        return (value.data if isinstance(value, Weight) else value).view(np.uint8)

    return list(a) == list(b) and all(np.array_equal(bits(a[n]), bits(b[n])) for n in a)


def test_values(model: Path) -> None:
    state, log = loaded(model)
    source = open_checkpoint(model).tensors
    assert np.array_equal(state["gain"], dequantize(source["gain.weight"]))
    assert state["gain"].dtype == np.float32
    kinds = {name: w.kind for name, w in state.items() if isinstance(w, Weight)}
    assert {kinds[d] for d in ("Q4_0", "Q4_1", "Q4_K")} == {"q4"}
    assert (kinds["F32"], kinds["F16"], kinds["BF16"]) == ("f32", "f16", "bf16")
    assert {kinds[d] for d in ("Q5_0", "Q5_1", "Q5_K")} == {"q5"}
    assert {kinds[d] for d in ("Q8_0", "Q2_K", "Q3_K", "Q6_K", "IQ4_NL")} == {"q8"}
    for dtype in SUPPORTED:
        exact = dequantize(source[f"{dtype}.weight"])
        assert np.abs(unpack(state[dtype]) - exact).max() <= np.abs(exact).max() / 200
    assert "Q6_K -> q8 g32 (requantised): 1 matrix" in log


def test_f32_dequantises_everything(model: Path, tmp_path: Path) -> None:
    source = open_checkpoint(model).tensors
    state, log = loaded(model, weight_format="f32", cache_dir=tmp_path / "cache")
    for dtype in SUPPORTED:
        assert state[dtype].kind == "f32"
        assert np.array_equal(unpack(state[dtype]), dequantize(source[f"{dtype}.weight"]))
    assert "Q6_K -> f32: 1 matrix" in log


def test_q8_quantises_floats_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_stored, _ = loaded(model)
    state, log = loaded(model, weight_format="q8", cache_dir=tmp_path / "cache")
    source, floats = open_checkpoint(model).tensors, ("F32", "F16", "BF16")
    for dtype in floats:
        assert state[dtype].kind == "q8"
        exact = dequantize(source[f"{dtype}.weight"])
        most = np.abs(exact).reshape(ROWS, -1, 32).max(axis=2).repeat(32, axis=1)
        assert (np.abs(unpack(state[dtype]) - exact) <= 0.51 * most / 127).all()
    others = [name for name in state if name not in floats]
    assert same({n: state[n] for n in others}, {n: as_stored[n] for n in others})
    assert "BF16 -> q8 g32 (quantised): 1 matrix" in log
    monkeypatch.setattr(load, "_CHUNK_ELEMENTS", 1)
    assert same(loaded(model, weight_format="q8")[0], state)


def test_first_load_packs_and_second_maps(model: Path, tmp_path: Path) -> None:
    in_memory, _ = loaded(model)
    calls: list[tuple[int, int]] = []
    first, log = loaded(
        model, cache_dir=tmp_path / "c", progress=lambda done, total: calls.append((done, total))
    )
    (pack,) = (tmp_path / "c" / "packed").iterdir()
    assert pack.name.startswith("my-model-") and f"Wrote the packed weights {pack}." in log
    assert calls == sorted(calls) and calls[-1][0] == calls[-1][1]
    stamp = pack.stat().st_mtime_ns
    second, log = loaded(model, cache_dir=tmp_path / "c")
    assert f"Mapped the packed weights {pack}." in log
    assert "Q6_K -> q8 g32 (requantised): 1 matrix" in log
    assert pack.stat().st_mtime_ns == stamp
    assert same(first, in_memory) and same(second, in_memory)
    for state in (in_memory, first, second):
        for value in state.values():
            data = value.data if isinstance(value, Weight) else value
            assert not data.flags.writeable and data.ctypes.data % 64 == 0
    loaded(model, weight_format="f32", cache_dir=tmp_path / "c")
    assert len(list((tmp_path / "c" / "packed").iterdir())) == 2


@pytest.mark.parametrize("chunk", [1, 16 * K, 1 << 20])
def test_chunks_of_any_size_give_the_same_bits(
    chunk: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = loaded(model)
    monkeypatch.setattr(load, "_CHUNK_ELEMENTS", chunk)
    assert same(loaded(model)[0], whole)


def test_a_stale_pack_is_packed_again(model: Path, tmp_path: Path) -> None:
    first, _ = loaded(model)
    loaded(model, cache_dir=tmp_path / "c")
    (pack,) = (tmp_path / "c" / "packed").iterdir()
    good = pack.read_bytes()
    for bad in (
        b"",
        good[:50],
        good[:-1],
        good[:8] + b"\x63" + good[9:],
        good[:200] + b"#" + good[201:],
    ):
        pack.write_bytes(bad)
        again, log = loaded(model, cache_dir=tmp_path / "c")
        assert same(again, first) and log[0].startswith("Packing the weights; of the packed file")
        assert pack.read_bytes() == good
    # Other rules for the same file: another key.
    rules = [*RULES[:-1], replace(RULES[-1], name="renamed")]
    assert "renamed" in load_weights(
        open_checkpoint(model), rules, CONFIG, cache_dir=tmp_path / "c"
    )


def test_a_changed_model_is_packed_again(model: Path, tmp_path: Path) -> None:
    loaded(model, cache_dir=tmp_path / "c")
    os.utime(model, (0, 0))
    assert "there is none" in loaded(model, cache_dir=tmp_path / "c")[1][0]


def test_cache_that_cannot_be_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    state, log = loaded(model, cache_dir=tmp_path / "file")
    assert "cannot be written; the packed weights stay in memory" in log[-1]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    other, log = loaded(model, cache_dir=tmp_path / "c")
    assert "stay in memory" in log[-1] and same(state, other)


def test_full_disk(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = atomic.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ModelError, match=r"c/packed has too little free space: [\d,]+ bytes"):
        loaded(model, cache_dir=tmp_path / "c")
    assert list((tmp_path / "c" / "packed").iterdir()) == []


def test_corrupt_scales_leave_nothing_behind(tmp_path: Path) -> None:
    raw = np.full((ROWS, K // 32 * 34), 0x7C, np.uint8)
    raw[:, ::34] = 0
    path = write_gguf(tmp_path / "m.gguf", {"w": ("Q8_0", raw)})
    with pytest.raises(ModelError, match="w holds scales that are not finite"):
        load_weights(
            open_checkpoint(path), [Rule("w", None, "w")], CONFIG, cache_dir=tmp_path / "c"
        )
    assert list((tmp_path / "c" / "packed").iterdir()) == []


@pytest.mark.parametrize("dtype", ["Q4_0", "Q8_0", "Q4_K", "IQ4_XS", "MXFP4"])
@pytest.mark.parametrize("format", ["auto", "f32"])
@pytest.mark.parametrize("turned", [False, True])
def test_scales_that_are_not_finite_in_every_form(
    turned: bool, format: str, dtype: str, tmp_path: Path
) -> None:
    """Also where blocks become floats because they are asked for, or because heads are turned."""
    raw = host_tensor(dtype, 64, 256).data.copy()
    raw[-1, :2] = 255  # of f16 a NaN, of exponents 2^128
    path = write_gguf(tmp_path / "m.gguf", {"w": (dtype, raw)})
    rule = Rule("w", None, "w", (64, 256))
    if turned:
        whole = Part((64, 256))
        rule = Rule("w", None, "w", (512, 32), gguf_fix=TransposeHeads(2), gguf_part=whole)
    with pytest.raises(ModelError, match="Tensor w holds scales that are not finite"):
        load_weights(open_checkpoint(path), [rule], CONFIG, format, tmp_path / "c")  # type: ignore[arg-type]
    assert list((tmp_path / "c" / "packed").iterdir()) == []


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Rule("a", None, "a.weight")], "lacks the tensor a.weight; it is not a complete llama"),
        (
            [Rule("layers.{i}.q", None, "blk.{i}.q"), Rule("b", None, "b")],
            "lacks the tensor blk.0.q and 2 more;",
        ),
        (
            [Rule("F32", None, "F32.weight", (ROWS, 7))],
            f"has shape [{ROWS}, {K}], and its configuration says [{ROWS}, 7]",
        ),
        ([Rule("gain", None, "gain.weight", (K, 1))], "has shape [256]"),
    ],
)
def test_tensors_that_do_not_fit_the_rules(rules: list[Rule], message: str, model: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load_weights(open_checkpoint(model), rules, CONFIG)
    assert message in str(caught.value)


def test_optional_tensors(model: Path) -> None:
    rules = [Rule("gain", None, "gain.weight"), Rule("head", None, "output.weight", optional=True)]
    assert list(load_weights(open_checkpoint(model), rules, CONFIG)) == ["gain"]


def test_a_bias_is_not_dropped_in_silence(tmp_path: Path) -> None:
    tensors = {
        "w.weight": ("F32", host_tensor("F32", 4, 8).data),
        "w.bias": ("F32", host_tensor("F32", 1, 4).data),
        "other.bias": ("F32", host_tensor("F32", 1, 4).data),
    }
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors))
    with pytest.raises(ModelError, match=r"holds the bias w\.bias"):
        load_weights(checkpoint, [Rule("w", None, "w.weight")], CONFIG)
    rules = [Rule("w", None, "w.weight"), Rule("b", None, "w.bias")]
    assert len(load_weights(checkpoint, rules, CONFIG)) == 2


def test_integers_and_cubes_are_refused_only_when_asked_for(tmp_path: Path) -> None:
    tensors = {
        "ids": ("I32", np.zeros((1, 4), np.int32)),
        "cube": ("F16", np.zeros((2, 3, 8), np.float16)),
    }
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors))
    assert load_weights(checkpoint, [], CONFIG) == {}
    with pytest.raises(ModelError, match="ids has type I32, which is not supported"):
        load_weights(checkpoint, [Rule("w", None, "ids")], CONFIG)
    with pytest.raises(ModelError, match=r"has shape \[2, 3, 8\], and .* a vector or a matrix"):
        load_weights(checkpoint, [Rule("w", None, "cube")], CONFIG)


def test_real_model(smollm2_gguf: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(smollm2_gguf)
    rules, config = plain_config(checkpoint)
    first = load_weights(checkpoint, rules, config, cache_dir=tmp_path)
    start = time.perf_counter()
    second = load_weights(checkpoint, rules, config, cache_dir=tmp_path)
    assert time.perf_counter() - start < 0.5  # measured: 3 ms
    assert same(first, second)
    for name in ("token_embd.weight", "blk.7.ffn_down.weight"):
        assert np.array_equal(
            unpack(second[name])[:512], dequantize(checkpoint.tensors[name])[:512]
        )


def test_what_a_killed_writer_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    left = tmp_path / ".a.pack.0.tmp"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    with atomic.atomic_file(tmp_path / "b", 1) as file:
        assert not left.exists()
        (own,) = tmp_path.glob(".b.*.tmp")
        os.utime(own, (0, 0))
        with atomic.atomic_file(tmp_path / "c", 1):
            assert own.exists()
        file.write(b"whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "c"]
