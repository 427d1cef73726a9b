"""`elinvar tune`: which configuration is chosen, by a clock that the test sets."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from elinvar.base.config import MoEConfig
from elinvar.base.errors import InputError
from elinvar.cli import app
from elinvar.cli.tune import tuned_path, write
from elinvar.engine.described import Described, experts, products
from elinvar.ops import Weight, load_provider
from elinvar.ops.layout import QUANTISED
from elinvar.ops.stored import STORED
from elinvar.ops.triton.configs import Config, Tile
from elinvar.ops.triton.sizes import ExpertShape, matrix_bytes
from elinvar.ops.triton.tuned import name
from elinvar.ops.triton.tuning import Choice, candidates, together, tune, tune_tile
from elinvar.weights.packfile import Entry
from engines import tiny_parts
from helpers import Span, make_batch, make_cache

torch = pytest.importorskip("torch")
WIDE = Config(128, 128, 64, 8, 3)
LOW = replace(WIDE, block_m=16)
DEEP = Config(64, 64, 128, 4, 4)
TIMES = {
    WIDE: {1: 10e-6, 32: 11e-6, 4096: 100e-6},
    LOW: {1: 4e-6, 32: 9e-6, 4096: 900e-6},
    DEEP: {1: 6e-6, 32: 6e-6, 4096: 150e-6},
}


def of_table(config: Config, rows: int) -> float:
    return TIMES[config][rows]


def yes(config: Config | Tile) -> bool:
    return True


def test_a_lower_tile_for_few_rows_is_taken_where_its_bits_are_equal() -> None:
    choice = tune(list(TIMES), (1, 32, 4096), of_table, yes)
    # WIDE with LOW below 17 rows loses 11 / 6 at 32; DEEP loses 1.5 at 1 and at 4,096.
    assert choice.config == DEEP and choice.worst == pytest.approx(1.5)
    asked = []

    def no(config: Config) -> bool:
        asked.append(config)
        return config.few is None

    choice = tune([WIDE, LOW], (1, 32, 4096), of_table, yes)
    assert choice.config == replace(WIDE, few=16)
    assert choice.seconds == {1: 4e-6, 32: 11e-6, 4096: 100e-6}
    choice = tune([WIDE, LOW], (1, 32, 4096), of_table, no)
    assert asked == [replace(WIDE, few=16), WIDE]
    assert choice.config == WIDE and choice.worst == pytest.approx(2.5)
    with pytest.raises(ValueError, match="the same bits"):
        tune([WIDE, LOW], (1, 32, 4096), of_table, lambda config: False)


def test_experts_have_few_rows_each() -> None:
    """8 of 128 experts a token: 32 tokens are 2 rows a tile."""
    choice = tune([WIDE, LOW], (1, 32, 4096), of_table, yes, lambda rows: -(-rows * 8 // 128))
    assert choice.seconds == {1: 4e-6, 32: 9e-6, 4096: 100e-6}


def test_taller_tiles_of_prompts_are_taken_where_their_bits_are_equal() -> None:
    low, tall, deep = Tile(64, 64, 64, 3), Tile(64, 128, 64, 3), Tile(64, 64, 32, 3)
    seen = []

    def time(tile: Tile, load: int) -> float:
        seen.append((tile, load))
        return {1: 1.0, 8192: 3.0 if tile.tall == 128 else 4.0}[load] + (tile is deep)

    loads = {1: True, 8192: False}
    choice = tune_tile([low, tall, deep], loads, time, yes)
    assert choice.config == tall and choice.worst == 1
    assert len(seen) == 5, "what decodes has one height: measured once"
    choice = tune_tile([low, tall, deep], loads, time, lambda tile: tile.tall == tile.rows)
    assert choice.config == low and choice.losses == pytest.approx({1: 1, 8192: 4 / 3})
    with pytest.raises(ValueError, match="launched"):
        tune_tile([low], loads, lambda tile, load: math.inf, yes)


def test_what_invariance_costs_a_forward() -> None:
    costs = [
        {"uses": 2, "microseconds": {"1": 3.0, "8": 4.0}, "losses": {"1": 1.5, "8": 1.0}},
        {"uses": 1, "microseconds": {"1": 6.0, "8": 2.0}, "losses": {"1": 1.0, "8": 2.0}},
    ]
    assert together(costs) == pytest.approx({"1": 12 / 10, "8": 10 / 9})


def test_the_cost_of_invariance_is_kept() -> None:
    choice = tune(list(TIMES), (1, 32, 4096), of_table, yes)
    assert choice.free == {1: 4e-6, 32: 6e-6, 4096: 100e-6}
    assert choice.losses == pytest.approx({1: 1.5, 32: 1.0, 4096: 1.5})
    assert choice.mean == pytest.approx((1.5 * 1.5) ** (1 / 3))
    told = choice.told()
    assert told["config"]["block_k"] == 128 and told["losses"]["1"] == pytest.approx(1.5)


def test_what_cannot_be_launched_is_left_out() -> None:
    def time(config: Config, rows: int) -> float:
        return math.inf if config == DEEP else of_table(config, rows)

    assert tune(list(TIMES), (1, 32, 4096), time, yes).config == replace(WIDE, few=16)
    with pytest.raises(ValueError, match="no configuration"):
        tune(list(TIMES), (1, 4096), lambda config, rows: math.inf, yes)


ALL = candidates("bf16", 4096, 4096)


@given(st.lists(st.sampled_from(ALL), min_size=1, max_size=30, unique=True), st.randoms())
def test_a_choice_is_never_worse_than_any_measured_configuration(configs, random) -> None:  # type: ignore[no-untyped-def]
    table = {(c, rows): random.uniform(1e-6, 1e-3) for c in configs for rows in (1, 64, 2048)}
    calls = []

    def time(config: Config, rows: int) -> float:
        calls.append((config, rows))
        return table[config, rows]

    choice = tune(configs, (1, 64, 2048), time, yes)
    assert len(calls) == len(set(calls))
    measured = [c for c in configs if (c, 64) in calls]
    for config in measured:
        alone = Choice(config, {rows: table[config, rows] for rows in (1, 64, 2048)}, choice.free)
        assert choice.worst <= alone.worst
    assert all(loss >= 1 - 1e-12 for loss in choice.losses.values())


@pytest.mark.parametrize("kind", ["bf16", "q4", "int8"])
@pytest.mark.parametrize("shape", [(4096, 14336), (64, 128), (128256, 4096)])
def test_candidates_can_be(kind: str, shape: tuple[int, int]) -> None:
    found = candidates(kind, *shape)
    assert found and len(set(found)) == len(found)
    for config in found:
        assert config.few is None and config.block_n <= max(64, shape[0])
        assert config.parts == 1 or -(-shape[1] // config.block_k) >= 4 * config.parts


def test_the_products_of_a_model() -> None:
    layer = [("q", 64), ("k", 32), ("v", 32), ("o", 64), ("gate", 128), ("up", 128)]
    entries = [Entry("embed", "q8", (300, 64)), Entry("norm", "vector", (64,))]
    entries += [Entry(f"layers.{i}.{name}", "q4", (n, 64)) for i in (0, 1) for name, n in layer]
    entries += [Entry("layers.2.q", "q4", (64, 64)), Entry("layers.2.k", "q8", (32, 64))]
    entries += [Entry("layers.2.experts.0.up", "q4", (16, 64))]
    assert products(entries) == {
        ("q8", (300, 64), False): 1,
        ("q4", (128, 64), False): 2,
        ("q4", (64, 64), False): 3,
        ("q4", (256, 64), True): 2,
        ("q8", (32, 64), False): 1,
    }
    untied = products([*entries, Entry("head", "bf16", (300, 64))])
    assert ("q8", (300, 64), False) not in untied and untied["bf16", (300, 64), False] == 1


def test_the_experts_of_a_model() -> None:
    def layer(i: int, *kinds: str) -> list[Entry]:
        return [
            Entry(f"layers.{i}.experts.{e}.{part}", kind, (32, 64))
            for e, kind in enumerate(kinds)
            for part in ("gate", "up", "down")
        ]

    config = replace(
        tiny_parts("qwen3_moe", "f32").config, moe=MoEConfig(2, 1, 32, (0, 1, 2)), dim=64
    )
    entries = [Entry("embed", "f16", (512, 64)), *layer(0, "q4", "q4"), *layer(1, "q4", "q8")]
    entries += layer(2, "bf16", "bf16")
    assert experts(Described(config, entries, True)) == {
        ExpertShape("q4", "q4", 2, 1, 64, 32): 1,
        ExpertShape("f16", "f16", 2, 1, 64, 32): 2,
    }


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe", "minicpm3", "gpt_oss", "olmo2"])
def test_what_is_tuned_is_what_a_forward_multiplies_by(family: str) -> None:
    """By the names that the provider looks for in the table."""
    parts, ops = tiny_parts(family, "q4"), load_provider("cuda")
    model: Any = parts.build(ops)
    batch = make_batch([Span([1, 2, 3], 0, 3, [0])], len(model.kv_specs("f16")))
    asked: set[str] = set()
    ops._matrices._fit = lambda w: asked.add(name(w)) or w  # type: ignore[attr-defined]
    model.forward(ops.upload(batch), make_cache(model, ops, 1, "f16"))
    entries = [
        Entry(key, w.kind if isinstance(w, Weight) else "vector", w.shape)
        for key, w in parts.weights.items()
    ]
    described = Described(model.config, entries, True)
    foreseen = {f"{kind}/{n}x{k}" for kind, (n, k), _ in products(entries)}
    for layer in experts(described):
        foreseen |= set(layer.names)
    assert asked and not asked - foreseen


def test_a_table_grows_and_one_of_another_device_is_begun_anew(tmp_path: Path) -> None:
    from elinvar.ops.triton.tuned import read

    path = tmp_path / "new" / "table.json"
    choice = Choice(WIDE, {1: 2e-6}, {1: 1e-6})
    write(path, "H200", "3.6.0", {"bf16/64x64": choice}, {"bf16/64x64": choice.told()})
    write(path, "H200", "3.6.0", {"q4/64x64": replace(choice, config=LOW)}, {})
    assert read(path).configs == {"bf16/64x64": WIDE, "q4/64x64": LOW}
    assert json.loads(path.read_text())["costs"]["bf16/64x64"]["worst"] == 2
    write(path, "H200", "3.9.0", {"q4/64x64": choice}, {})
    assert read(path).configs == {"q4/64x64": WIDE}
    assert tuned_path("NVIDIA H200").name == "nvidia-h200.json"


def test_without_a_gpu_one_sentence_says_so(tiny_gguf: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(InputError, match=r"^There is no GPU here that torch can use; tune where"):
        CliRunner().invoke(app, ["tune", str(tiny_gguf)], catch_exceptions=False)


@pytest.mark.parametrize("kind", ["f32", "bf16", *QUANTISED, *STORED])
@pytest.mark.parametrize("shape", [(64, 128), (80, 96), (48, 2880)])
def test_sizes_are_those_of_matrices_on_a_device(kind: Any, shape: tuple[int, int]) -> None:
    from elinvar.ops.triton.samples import random_matrix

    assert matrix_bytes(kind, shape) == random_matrix(kind, *shape, "cpu").nbytes


def test_bits_that_are_not_equal_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products, experts and attention as the tuner looks at them, under the interpreter; and what it says
    where tiles of another height sum in another order."""
    from elinvar.ops.triton import attention, linear, tuner
    from elinvar.ops.triton.matrices import stack
    from elinvar.ops.triton.moe import DeviceExperts
    from elinvar.ops.triton.samples import random_matrix
    from elinvar.ops.triton.tuner_heads import Filled, Heads, same_attention

    cpu = torch.device("cpu")
    monkeypatch.setattr(tuner, "LOOKED_AT", (1, 7))
    monkeypatch.setattr(tuner, "MANY", 19)
    cut = Config(16, 64, 64, 4, 3, parts=2)
    w = replace(random_matrix("bf16", 64, 256, cpu), tuned=replace(cut, few=8))
    assert tuner.same_bits(w)
    stacks = [stack([random_matrix("q4", 64, 64, cpu, e) for e in range(4)]) for _ in "ab"]
    assert tuner.same_experts(DeviceExperts(stacks[0], replace(stacks[1], shape=(64, 32))), 2)
    monkeypatch.setattr(attention, "ATTENTION_SPLIT", 64)
    monkeypatch.setattr(attention, "_SPLIT", attention.tl.constexpr(64))
    filled = Filled(Heads(4, 2, 16, "int8"), 2, 80, 2, cpu)
    assert same_attention(filled, Tile(16, 32, 32, 1))

    given = linear._launch

    def other(x: Any, w: Any, y: Any, **more: Any) -> None:
        given(x, w, y, **more)
        y += 1e-3 * (len(x) == 1)

    monkeypatch.setattr(linear, "_launch", other)
    assert not tuner.same_bits(w)
    monkeypatch.setattr(attention, "merge_splits", lambda *given: None)
    assert not same_attention(filled, None)


def test_all_that_a_model_has_is_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention, products and experts, by a clock that stands still; and the provider finds the table."""
    from elinvar.cli import tune as command
    from elinvar.ops.triton import tuner, tuner_heads
    from elinvar.ops.triton.tuned import read

    shapes = Path(__file__).parents[1] / "benchmarks/gpu_parts/models.json"
    both = json.loads(shapes.read_text())["qwen3-moe"]
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**both["config"], "num_hidden_layers": 1}))

    def chosen(config: Config | Tile) -> Choice:
        return Choice(config, {1: 2e-6, 8: 3e-6}, {1: 2e-6, 8: 2e-6})

    monkeypatch.setattr(command, "_gpu", lambda: ("gpu", "Some GPU", "9.9"))
    monkeypatch.setattr(tuner, "tune_matrix", lambda *given, progress: chosen(WIDE))
    monkeypatch.setattr(tuner, "tune_experts", lambda *given, progress: (chosen(LOW), chosen(DEEP)))
    tile = Tile(64, 128, 64, 3)
    monkeypatch.setattr(tuner_heads, "tune_attention", lambda *given, progress: chosen(tile))
    out = tmp_path / "table.json"
    arguments = ["tune", str(config), "--out", str(out), "--kv-dtype", "bf16"]
    told = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert told.exit_code == 0
    table = read(out)
    assert table.attention == {"bfloat16/bf16/128": tile}
    assert table.configs["experts/128/bf16/1536x2048"] == LOW
    assert table.configs["experts/128/bf16/2048x768"] == DEEP
    assert table.configs["bf16/5120x2048"] == table.configs["bf16/151936x2048"] == WIDE
    assert json.loads(out.read_text())["costs"]["bf16/2048x4096"]["uses"] == 1
    assert "all products: at most 1.500 times the best (8 rows)" in told.output
