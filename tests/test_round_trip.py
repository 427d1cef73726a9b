"""Load, save, load: the same bits, for every family of the registry, from either format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elinvar.models.registry import FAMILIES, find_family, read_config
from elinvar.ops.layout import Weight
from elinvar.weights.checkpoint import open_checkpoint
from elinvar.weights.fixes import AddOne
from elinvar.weights.load import load_weights
from elinvar.weights.rules import Binding, Rule, State, as_published, bind
from elinvar.weights.save import save_state, stored_tensor
from elinvar.weights.tensor import HostTensor
from engines import tiny_weights
from families import CASES, ENGINES
from model_files import write_gguf
from test_load import same

BY_NAME = {family.name: family for family in FAMILIES}
CONFIG = {"architectures": ["Tiny"]}


def by_source(rules: list[Rule], format: str, num_layers: int) -> dict[str, list[Binding]]:
    found: dict[str, list[Binding]] = {}
    for binding in bind(rules, format, num_layers):
        found.setdefault(binding.source, []).append(binding)
    return found


def bits(tensor: HostTensor) -> tuple[str, tuple[int, ...], bytes]:
    return tensor.dtype, tensor.shape, tensor.data.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_what_transformers_writes(case: str, dtype: str, tmp_path: Path) -> None:
    """Every tensor that the rules take comes out as it went in: name, shape, bits, and of matrices the
    type (vectors are float32 here)."""
    torch = pytest.importorskip("torch")
    from test_models_tiny import make_reference, save

    save(case, make_reference(case, getattr(torch, dtype)), tmp_path / "a")
    first = open_checkpoint(tmp_path / "a")
    family, config = find_family(first), read_config(first)
    assert config.family == family.name
    rules = as_published(family.rules(config), first.tensors)
    state = load_weights(first, rules, config)
    save_state(state, rules, config.num_layers, tmp_path / "b", first.metadata)
    second = open_checkpoint(tmp_path / "b")
    assert read_config(second) == config
    assert same(load_weights(second, rules, config), state)
    sources = by_source(rules, "safetensors", config.num_layers)
    assert set(second.tensors) == set(sources) & set(first.tensors)
    for name, tensor in second.tensors.items():
        before = first.tensors[name]
        if tensor.dtype == before.dtype:
            # A gain of 1 + g is rounded once; where g is written again, it has no more bits.
            exact = not any(isinstance(b.fix, AddOne) for b in sources[name])
            assert not exact or bits(tensor) == bits(before), name
        else:
            vectors = all(len(b.shape or tensor.shape) == 1 for b in sources[name])
            assert vectors and tensor.dtype == "F32"


def gguf_of(family: str, weights: State, path: Path) -> Path:
    """The tiny weights as the rules say that llama.cpp's converter lays them."""
    config = ENGINES[family]
    tensors = {}
    for source, bindings in by_source(
        BY_NAME[family].rules(config), "gguf", config.num_layers
    ).items():
        tensor = stored_tensor(bindings, weights)
        dtype = {"F32": np.float32, "F16": np.float16}.get(tensor.dtype, np.uint8)
        raw = tensor.data.view(dtype).reshape(*tensor.shape[:-1], -1)
        tensors[source] = (tensor.dtype, raw if raw.ndim > 1 else raw[None])
    return write_gguf(path, tensors)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("family", [f.name for f in FAMILIES if f.gguf_architectures])
def test_from_gguf_to_hugging_face(family: str, kind: str, tmp_path: Path) -> None:
    config, rules = ENGINES[family], BY_NAME[family].rules(ENGINES[family])
    weights = tiny_weights(family, kind)
    path = gguf_of(family, weights, tmp_path / "m.gguf")
    first = load_weights(open_checkpoint(path), rules, config)
    assert same({name: first[name] for name in weights}, weights)
    save_state(first, rules, config.num_layers, tmp_path / "hf", CONFIG)
    second = load_weights(open_checkpoint(tmp_path / "hf"), rules, config)
    save_state(second, rules, config.num_layers, tmp_path / "again", CONFIG)
    third = load_weights(open_checkpoint(tmp_path / "again"), rules, config)
    assert same(third, second)
    # Gains that are stored as g - 1 have other bits when they did not come so.
    fixed = {
        b.name for b in bind(rules, "safetensors", config.num_layers) if isinstance(b.fix, AddOne)
    }
    assert same(*({n: s[n] for n in first if n not in fixed} for s in (first, second)))


@pytest.mark.parametrize("family", BY_NAME)
def test_quantised_weights_are_saved_as_what_they_stand_for(family: str, tmp_path: Path) -> None:
    config, rules = ENGINES[family], BY_NAME[family].rules(ENGINES[family])
    weights: dict[str, Any] = tiny_weights(family, "q8")
    save_state(weights, rules, config.num_layers, tmp_path, CONFIG)
    checkpoint = open_checkpoint(tmp_path)
    state = load_weights(checkpoint, rules, config)
    assert list(state) == list(weights)
    for name, value in state.items():
        assert not isinstance(value, Weight) or value.kind == "f32", name
