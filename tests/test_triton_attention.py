"""Attention of the provider `triton` under Triton's interpreter: close to the oracle, and a row's bits
are its own. Sizes are small: a program takes milliseconds a tile here."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are made, at their import

import numpy as np
import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from elinvar.base.config import KVSpec  # noqa: E402
from elinvar.ops import ref_attention  # noqa: E402
from elinvar.ops.triton import attention as kernels  # noqa: E402
from elinvar.ops.triton import latent, numbers  # noqa: E402
from elinvar.ops.triton.caches import kv_layers  # noqa: E402
from gpu_caches import random_caches, random_tables, torched  # noqa: E402
from sweeps import REF, normal  # noqa: E402

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 0.02}


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of 64 keys, so that short sequences have many."""
    for module in (kernels, latent):
        monkeypatch.setattr(module, "ATTENTION_SPLIT", 64)
        monkeypatch.setattr(module, "_SPLIT", tl.constexpr(64))


class Case:
    """Sequences in a cache, and queries of their last tokens."""

    def __init__(
        self, spec: KVSpec, heads: int, lengths: list[int], counts: list[int], dtype: torch.dtype
    ) -> None:
        rng = np.random.default_rng(7)
        self.tables, num_blocks = random_tables(rng, lengths)
        self.host, self.kv = random_caches(rng, spec, num_blocks)
        self.lengths = np.array(lengths, np.int32)
        self.starts = np.cumsum([0, *counts]).astype(np.int32)
        spans = [np.arange(n - c, n) for n, c in zip(lengths, counts, strict=True)]
        self.positions = np.concatenate(spans).astype(np.int32)
        q = normal(rng, len(self.positions), heads, spec.head_dim)
        self.q = torched(q)[0].to(dtype)
        self.scale, self.window = spec.head_dim**-0.5, spec.window
        self.switches: dict[str, object] = {}

    def expected(self) -> np.ndarray:
        q, args = self.q.float().numpy(), (self.host, self.starts, self.lengths, self.tables)
        out = REF.attention(q, *args, self.positions, self.scale, self.window, **self.switches)
        return out.reshape(*q.shape[:2], -1)

    def rows(self, r: int, first: int, stop: int) -> torch.Tensor:
        """Queries first .. stop of sequence r, alone in a batch."""
        own = slice(self.starts[r] + first, self.starts[r] + stop)
        starts = np.array([0, stop - first], np.int32)
        return self.run(self.q[own], starts, self.tables[r : r + 1], self.positions[own])

    def all(self) -> torch.Tensor:
        return self.run(self.q, self.starts, self.tables, self.positions)

    def run(self, q: torch.Tensor, *where: np.ndarray) -> torch.Tensor:
        starts, tables, positions = torched(*where)
        switches = {
            name: torched(x)[0] if isinstance(x, np.ndarray) else x
            for name, x in self.switches.items()
        }
        where_T = starts, tables, positions
        return kernels.attention(q, self.kv, *where_T, self.scale, self.window, **switches)


def spec(dim: int, dtype: str, window: int | None = None) -> KVSpec:
    return KVSpec("full", (0,), 2, dim, dtype, window)  # type: ignore[arg-type]


SWITCHES: dict[str, dict[str, object]] = {
    "none": {},
    "all": {"softcap": 3.0, "sinks_H": np.linspace(-9, 9, 6).astype(np.float32), "chunk": 50},
    "first": {"first": 41},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["f16", "bf16", "int8"])
def test_formats(kind: str, dtype: torch.dtype) -> None:
    case = Case(spec(64, kind), 6, [70, 1, 37], [3, 1, 7], dtype)
    error = np.abs(case.all().float().numpy() - case.expected()).max()
    assert error < (TOLERANCE[dtype] if kind != "int8" else 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("dim", [8, 24, 80, 192])
def test_head_dims(dim: int) -> None:
    case = Case(spec(dim, "f16"), 2, [70, 33], [2, 5], torch.float32)
    assert np.abs(case.all().numpy() - case.expected()).max() < 2e-6


@pytest.mark.parametrize(
    ("switches", "window", "walks"),
    [
        ("none", None, "shared"),
        ("all", None, "shared"),
        ("all", 40, "alone"),
        ("first", None, "alone"),
        ("first", 100, "shared"),
    ],
)
@pytest.mark.usefixtures("short_splits")
def test_switches(
    switches: str, window: int | None, walks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if walks == "alone":
        monkeypatch.setattr(kernels, "_WORKSPACE", 0)
    case = Case(spec(16, "f32", window), 6, [200, 45, 130], [9, 1, 4], torch.float32)
    case.switches = SWITCHES[switches]
    if switches == "first":  # nothing before it may be seen
        case.kv.v[case.tables[0, 0], :, :] = 1e30
    assert np.abs(case.all().numpy() - case.expected()).max() < 2e-6


@pytest.mark.parametrize(("kind", "window"), [("bf16", None), ("int8", 70)])
@pytest.mark.usefixtures("short_splits")
def test_a_row_has_its_own_bits(
    kind: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a prompt's chunks, decoded, with others; its splits walked by one program or by several."""
    case = Case(spec(32, kind, window), 4, [190, 80, 1], [36, 2, 1], torch.bfloat16)
    case.switches = {"sinks_H": np.float32([-3, 0, 1, 2])}
    whole = case.all()
    assert torch.equal(whole[:36], torch.cat([case.rows(0, 0, 33), case.rows(0, 33, 36)]))
    for row in (0, 35):
        assert torch.equal(whole[row], case.rows(0, row, row + 1)[0])
    assert torch.equal(whole[36:38], case.rows(1, 0, 2))
    assert torch.equal(whole[38], case.rows(2, 0, 1)[0])
    monkeypatch.setattr(kernels, "_PROGRAMS", 1)
    assert torch.equal(whole, case.all())
    monkeypatch.setattr(kernels, "_WORKSPACE", 0)
    assert torch.equal(whole, case.all())


def test_splits_have_the_length_that_the_api_says() -> None:
    case = Case(spec(16, "f16"), 2, [1070], [2], torch.float32)
    assert np.abs(case.all().numpy() - case.expected()).max() < 1e-6


def test_what_a_row_does_not_see_may_hold_anything() -> None:
    case = Case(spec(16, "f16"), 4, [75], [9], torch.float32)
    before = case.all()
    block = int(case.tables[0, 2])
    case.kv.v[block, :, 11:], case.kv.k[block, :, 11:] = 65504, -65504
    assert torch.equal(before, case.all())


def test_rows_that_fill_a_batch_up_change_nothing() -> None:
    case = Case(spec(16, "f16"), 4, [75, 40], [9, 1], torch.float32)
    before = case.all()
    q = torch.cat([case.q, torch.full_like(case.q, torch.nan)])
    starts = np.concatenate([case.starts, [10, 10]]).astype(np.int32)
    tables = np.concatenate([case.tables, case.tables])
    positions = np.concatenate([case.positions, case.positions])
    assert torch.equal(before, case.run(q, starts, tables, positions)[:10])


def test_more_heads_share_keys_than_a_tile_has_rows() -> None:
    case = Case(spec(16, "f16"), 44, [75, 40], [3, 1], torch.float32)
    assert np.abs(case.all().numpy() - case.expected()).max() < 1e-6


def test_encoders_see_all_keys() -> None:
    case = Case(spec(16, "f32"), 2, [40], [40], torch.float32)
    case.positions[:] = 39
    assert np.abs(case.all().numpy() - case.expected()).max() < 1e-6


def test_fp8_is_e4m3() -> None:
    """Every code there and back, and what lies between codes as torch rounds it."""

    @triton.jit
    def there_and_back(x, codes, back, N: tl.constexpr):
        i = tl.arange(0, N)
        code = numbers.to_cache(tl.load(x + i), "fp8")
        tl.store(codes + i, code)
        tl.store(back + i, numbers.from_e4m3(code).to(tl.float32))

    exact = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    wild = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e9, 460.0, 2e-3, -1e-3, 9.7e-4])
    x = torch.cat([exact.nan_to_num(448.0), torch.randn(760) * 3, wild])
    codes, back = torch.empty(1024, dtype=torch.uint8), torch.empty(1024)
    there_and_back[(1,)](x, codes, back, 1024)
    expected = x.nan_to_num(-448.0).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(codes, expected.view(torch.uint8)) and torch.equal(back, expected.float())


def test_attention_over_fp8() -> None:
    case = Case(spec(32, "f16"), 4, [70], [5], torch.float32)
    [kv] = kv_layers(spec(32, "fp8"), len(case.kv.k), "cpu")
    for mine, theirs in ((kv.k, case.kv.k), (kv.v, case.kv.v)):
        rounded = theirs.to(torch.float8_e4m3fn)
        mine.copy_(rounded.view(torch.uint8))
        theirs.copy_(rounded.to(torch.float16))
    expected, case.kv = case.all(), kv
    assert torch.equal(expected, case.all())  # e4m3 fits into f16


# ---- latents ------------------------------------------------------------------------------------


class LatentCase(Case):
    """As Case, of a cache of latents of 40 dims and 12 that are rotated."""

    def __init__(
        self, kind: str, lengths: list[int], counts: list[int], dtype: torch.dtype
    ) -> None:
        spec = KVSpec("full", (0,), 1, 52, kind, latent_dim=40)  # type: ignore[arg-type]
        super().__init__(spec, 4, lengths, counts, dtype)

    def run(self, q: torch.Tensor, *where: np.ndarray) -> torch.Tensor:
        first = int(self.switches.get("first", 0))  # type: ignore[call-overload]
        return latent.latent_attention(q, self.kv, *torched(*where), self.scale, first)


@pytest.mark.parametrize("kind", ["f16", "int8"])
@pytest.mark.parametrize("first", [0, 41])
@pytest.mark.usefixtures("short_splits")
def test_latent_attention(kind: str, first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = LatentCase(kind, [150, 45], [5, 1], torch.float32)
    case.switches = {"first": first}
    whole = case.all()
    assert np.abs(whole.numpy() - case.expected()).max() < 2e-6
    assert torch.equal(whole[3], case.rows(0, 3, 4)[0])
    monkeypatch.setattr(kernels, "_WORKSPACE", 0)
    assert torch.equal(whole, case.all())


@pytest.mark.parametrize("kind", ["f16", "int8"])
def test_latent_write_and_query(kind: str) -> None:
    rng = np.random.default_rng(2)
    spec = KVSpec("full", (0,), 1, 52, kind, latent_dim=40)  # type: ignore[arg-type]
    [host], [kv] = REF.kv_layers(spec, 2), kv_layers(spec, 2, "cpu")
    x, gain, slots = normal(rng, 5, 60), normal(rng, 40), np.int32([3, 40, 63, 7, 31])
    x[2, 50] = 1e9
    angles = np.arange(9)[:, None] * np.geomspace(1, 0.01, 6)
    rope = np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    positions = np.int32([8, 0, 3, 3, 5])
    REF.latent_write(x[:, :52], positions, rope, host, slots, gain, 1e-6)
    x_T, *where, slots_T, gain_T = torched(x, positions, rope, slots, gain)
    latent.latent_write(x_T[:, :52], *where, kv, slots_T, gain_T, 1e-6)  # type: ignore[arg-type]
    mine = kv.k[:, :, :, :52].float().numpy()
    theirs = host.k.swapaxes(-1, -2).astype(np.float32)
    assert np.abs(mine - theirs).max() <= (1 if kind == "int8" else 2e-3)
    q, products = normal(rng, 5, 3 * (16 + 12)), normal(rng, 5, 3 * 40)
    found = latent.latent_query(*torched(q, products), *where, 3)
    turned = ref_attention._rotate(q.reshape(5, 3, 28)[..., 16:], rope[positions].astype(float))
    expected = np.concatenate([products.reshape(5, 3, 40), turned], -1)
    assert np.abs(found.numpy() - expected).max() < 1e-6
