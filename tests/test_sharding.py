"""Parts of weights for ranks: joined they are the whole to the bit, for every family, and a rank reads
no more of the files than its part."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from elinvar.base.config import ModelConfig, MoEConfig
from elinvar.base.errors import ModelError
from elinvar.models.registry import FAMILIES
from elinvar.models.sharding import SPLITS, shard, split_of
from elinvar.weights.checkpoint import Checkpoint, open_checkpoint
from elinvar.weights.load import load_weights
from elinvar.weights.rules import Cut, Rule, State, bind
from elinvar.weights.safetensors import SINGLE, write_safetensors
from elinvar.weights.shards import unshard
from families import ENGINES
from families.base import LLAMA
from model_files import random_blocks, write_gguf
from test_load import same

BY_NAME = {family.name: family for family in FAMILIES}


def random_folder(folder: Path, rules: Sequence[Rule], config: ModelConfig, dtype: str) -> Path:
    """Every tensor that the rules name, of the shape they expect."""
    shapes = {b.source: b.stored_shape for b in bind(rules, "safetensors", config.num_layers)}
    entries = [(name, dtype, shape) for name, shape in shapes.items() if shape is not None]
    assert len(entries) == len(shapes)

    def data(name: str) -> np.ndarray:
        k = math.prod(shapes[name] or ())
        return random_blocks(dtype, 1, k, seed=len(name) + k)

    folder.mkdir(exist_ok=True)
    write_safetensors(folder / SINGLE, entries, data)
    (folder / "config.json").write_text(json.dumps({"architectures": ["Tiny"]}))
    return folder


def in_parts(
    checkpoint: Checkpoint, rules: list[Rule], config: ModelConfig, size: int, **options: str
) -> tuple[list[State], State]:
    """The states of the ranks, and what they join to."""
    ranks = [shard(rules, config, rank, size, **options) for rank in range(size)]  # type: ignore[arg-type]
    states = [load_weights(checkpoint, one, config) for one in ranks]
    return states, unshard(states, ranks, config.num_layers)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", BY_NAME)
def test_the_parts_of_every_family_join_to_the_whole(
    family: str, size: int, tmp_path: Path
) -> None:
    config = ENGINES[family]
    rules = BY_NAME[family].rules(config)
    checkpoint = open_checkpoint(random_folder(tmp_path, rules, config, "BF16"))
    whole = load_weights(checkpoint, rules, config)
    states, joined = in_parts(checkpoint, rules, config, size)
    assert same({name: joined[name] for name in whole}, whole)
    whole_bytes = sum(value.nbytes for value in whole.values())
    for state in states:
        assert list(state) == list(whole)
        assert sum(value.nbytes for value in state.values()) < 0.8 * whole_bytes
    if config.moe is not None:
        states, joined = in_parts(checkpoint, rules, config, 2, experts="whole")
        assert same({name: joined[name] for name in whole}, whole)
        num = config.moe.num_experts
        assert (
            "layers.1.experts.0.up" in states[0] and f"layers.1.experts.{num - 1}.up" in states[1]
        )
        assert not {n for n in states[0] if "experts" in n} & {
            n for n in states[1] if "experts" in n
        }


def test_every_name_has_its_split() -> None:
    """A new family whose weights have names of their own says here how ranks share them."""
    for family in FAMILIES:
        config = ENGINES[family.name]
        for rule in family.rules(config):
            split_of(rule, config)
    with pytest.raises(ModelError, match=r"share layers\.0\.strange is not known; add strange to"):
        split_of(Rule("layers.0.strange", None, None), LLAMA)
    assert all(name == name.lower() for name in SPLITS)


WIDE = replace(LLAMA, dim=128, head_dim=32, ff_dim=256, vocab_size=100)
MIXTURE = replace(WIDE, family="mixtral", moe=MoEConfig(4, 2, 128, (0, 1), renormalise=True))


@pytest.mark.parametrize("config", [WIDE, MIXTURE], ids=["llama", "mixtral"])
@pytest.mark.parametrize("dtype", ["Q4_1", "Q5_0", "Q8_0", "F16"])
def test_quantised_parts(dtype: str, config: ModelConfig, tmp_path: Path) -> None:
    """Of blocks that ranks share by columns, too; rotary pairs are reordered, experts stacked."""
    rules = BY_NAME[config.family].rules(config)
    tensors = {}
    for at, binding in enumerate(bind(rules, "gguf", config.num_layers)):
        shape = binding.stored_shape or ()
        kind = dtype if len(shape) > 1 else "F32"
        raw = random_blocks(kind, math.prod(shape[:-1]), shape[-1], seed=at)
        raw = raw.view(np.float16) if kind == "F16" else raw
        tensors[binding.source] = (kind, raw.reshape(*shape[:-1], -1) if shape[1:] else raw)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors))
    whole = load_weights(checkpoint, rules, config)
    for size in (2, 4):
        states, joined = in_parts(checkpoint, rules, config, size)
        assert same({name: joined[name] for name in whole}, whole)
        assert states[0]["layers.0.k"].shape == (max(1, 2 // size) * 32, 128)
        assert np.array_equal(
            states[0]["layers.1.k"].data, states[size // 2 - 1]["layers.1.k"].data
        )


def test_groups_of_codes_are_not_torn(tmp_path: Path) -> None:
    tensors = {"blk.0.ffn_down.weight": ("Q8_0", random_blocks("Q8_0", 32, 192))}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors))
    config = replace(LLAMA, num_layers=1, ff_dim=192)
    rules = [Rule("layers.{i}.down", None, "blk.{i}.ffn_down.weight", (32, 192))]
    _, joined = in_parts(checkpoint, rules, config, 3)
    assert same(joined, load_weights(checkpoint, rules, config))
    with pytest.raises(ModelError) as caught:
        in_parts(checkpoint, rules, config, 4)
    assert str(caught.value) == (
        "The matrix layers.0.down has 192 inputs, quantised in groups of 32, which a part from 0 to "
        "48 would tear; share it among 1, 2, 3, 6 ranks."
    )


@pytest.mark.parametrize(
    "scheme",
    ["gptq", "gptq-act-order", "awq", "w4a16", "fp8-blocks", "nvfp4", "mxfp4", "nf4", "hqq"],
)
@pytest.mark.parametrize("axis", [0, 1])
def test_parts_of_published_quantisations(axis: Literal[0, 1], scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import test_schemes

    checkpoint = test_schemes.folder_of(tmp_path, *test_schemes.matrix(scheme))
    ((name, tensor),) = checkpoint.tensors.items()
    rule, half = Rule("w", name, None, tensor.shape), tensor.shape[axis] // 2
    ranks = [[replace(rule, cut=Cut(axis, at, at + half))] for at in (0, half)]
    states = [load_weights(checkpoint, rules, LLAMA) for rules in ranks]
    assert same(unshard(states, ranks, 1), load_weights(checkpoint, [rule], LLAMA))


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({"num_heads": 6}, 4, "{i}.q has 6 heads, which 4 ranks cannot share evenly; 1, 2, 3, 6 r"),
        ({"num_heads": 12, "num_kv_heads": 3}, 2, "{i}.k has 3 key-value heads, which 2 ranks"),
        ({"num_heads": 12, "num_kv_heads": 3}, 4, "; 1, 3, 6, 9, 12,"),
        ({"ff_dim": 97}, 2, "{i}.gate has 97 rows, which 2 ranks cannot share evenly; 1 ranks can"),
        ({"num_heads": 64, "num_kv_heads": 64, "vocab_size": 9, "ff_dim": 64}, 16, "embed has 9 r"),
    ],
)
def test_sizes_that_do_not_divide(changes: dict[str, int], size: int, message: str) -> None:
    config = replace(LLAMA, **changes)  # type: ignore[arg-type]
    with pytest.raises(ModelError) as caught:
        shard(BY_NAME["llama"].rules(config), config, 0, size)
    assert message in str(caught.value)


def test_norms_of_all_heads_together_are_shared_like_the_heads() -> None:
    one, all_heads = (Rule("layers.{i}.k_norm", "k", None, (n,)) for n in (16, 32))
    assert [rule.cut for rule in shard([one, all_heads], LLAMA, 1, 2)] == [None, Cut(0, 16, 32)]
    latent = ENGINES["deepseek"]
    assert split_of(Rule("layers.{i}.q_norm", "q", None, (32,)), latent) is None


class Counted(np.ndarray):
    """Counts what is taken of the whole."""

    whole = 0
    taken = 0

    def __getitem__(self, key: object) -> np.ndarray:
        found = np.asarray(super().__getitem__(key))  # type: ignore[call-overload]
        if self.nbytes == Counted.whole:
            Counted.taken += found.nbytes
        return found


@pytest.mark.parametrize("family", ["qwen3", "glm", "phi3", "gpt2"])
def test_a_rank_reads_its_rows_alone(family: str, tmp_path: Path) -> None:
    """Also of rows that are reordered, merged with others, or stored as columns."""
    config = replace(LLAMA, dim=256, num_heads=16, num_kv_heads=16, num_layers=1)
    rules = [r for r in BY_NAME[family].rules(config) if r.name == "layers.{i}.q"]
    folder = random_folder(tmp_path, rules, config, "BF16")
    for size in (1, 4):
        checkpoint = open_checkpoint(folder)
        ((name, tensor),) = checkpoint.tensors.items()
        Counted.whole, Counted.taken = tensor.nbytes, 0
        checkpoint.tensors[name] = replace(tensor, data=tensor.data.view(Counted))
        load_weights(checkpoint, shard(rules, config, size // 2, size), config)
        assert Counted.taken == 256 * 256 * 2 // size
