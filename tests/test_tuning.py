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

from elinvar.base.errors import InputError
from elinvar.cli import app
from elinvar.cli.tune import tuned_path, write
from elinvar.engine.described import products
from elinvar.ops.triton.configs import Config
from elinvar.ops.triton.sizes import matrix_bytes
from elinvar.ops.triton.tuning import Choice, candidates, tune
from elinvar.weights.packfile import Entry

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


def yes(one: Config, other: Config) -> bool:
    return True


def test_a_lower_tile_for_few_rows_is_taken_where_its_bits_are_equal() -> None:
    choice = tune(list(TIMES), (1, 32, 4096), of_table, yes)
    # WIDE with LOW below 17 rows loses 11 / 6 at 32; DEEP loses 1.5 at 1 and at 4,096.
    assert choice.config == DEEP and choice.worst == pytest.approx(1.5)
    asked = []

    def no(one: Config, other: Config) -> bool:
        asked.append((one, other))
        return False

    choice = tune([WIDE, LOW], (1, 32, 4096), of_table, yes)
    assert choice.config == replace(WIDE, few=16)
    assert choice.seconds == {1: 4e-6, 32: 11e-6, 4096: 100e-6}
    choice = tune([WIDE, LOW], (1, 32, 4096), of_table, no)
    assert asked == [(WIDE, replace(WIDE, few=16))]
    assert choice.config == WIDE and choice.worst == pytest.approx(2.5)


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


@pytest.mark.parametrize("kind", ["f32", "bf16", "q4", "q5", "q8"])
@pytest.mark.parametrize("shape", [(64, 128), (80, 96), (48, 2880)])
def test_sizes_are_those_of_matrices_on_a_device(kind: Any, shape: tuple[int, int]) -> None:
    from elinvar.ops.triton.samples import random_matrix

    assert matrix_bytes(kind, shape) == random_matrix(kind, *shape, "cpu").nbytes
