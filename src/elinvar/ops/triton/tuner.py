"""Tunes products and experts on the GPU that is here (tuning.py says how it is chosen)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from elinvar.ops.layout import WeightKind
from elinvar.ops.triton.configs import Config
from elinvar.ops.triton.linear import gated_linear, linear
from elinvar.ops.triton.matrices import Matrix, stack
from elinvar.ops.triton.moe import DeviceExperts, moe
from elinvar.ops.triton.samples import random_matrix
from elinvar.ops.triton.sizes import ExpertShape
from elinvar.ops.triton.timing import copies, seconds
from elinvar.ops.triton.tuning import ROWS, Choice, candidates, tune

Progress = Callable[[float, str], None]
LOOKED_AT = (1, 2, 3, 7, 16, 17, 33, 64, 65, 129)
"""Numbers of rows whose bits are compared with those in a product with many."""
MANY = 259


def quiet(done: float, right: str) -> None:
    """Nobody is told."""


def tune_matrix(
    kind: WeightKind,
    shape: tuple[int, int],
    gated: bool,
    device: torch.device,
    rows: Sequence[int] = ROWS,
    progress: Progress = quiet,
    configs: Sequence[Config] = (),
) -> Choice:
    """Of all products with a matrix like this; gated: gate above up, as `gated_linear` takes it.
    progress: told how many of the candidates were looked at. configs: those, where not all."""
    n, k = shape
    first = random_matrix(kind, n, k, device)
    ws = [first, *(random_matrix(kind, n, k, device, i) for i in range(1, copies(first.nbytes)))]
    times = Watched(progress)

    def time(config: Config, count: int) -> float:
        tuned = [replace(w, tuned=config) for w in ws]
        return times(config, [product(w, count, gated) for w in tuned])

    def holds(config: Config) -> bool:
        return same_bits(replace(first, tuned=config), gated)

    return tune(configs or candidates(kind, n, k), rows, time, holds)


def same_bits(w: Matrix, gated: bool = False) -> bool:
    """Whether rows have the bits in products of few rows that they have in one of many: by tiles of
    another height, by programs that share the parts of K."""
    whole = product(w, MANY, gated)()
    return all(torch.equal(product(w, n, gated)(), whole[:n]) for n in LOOKED_AT)


def product(w: Matrix, rows: int, gated: bool) -> Callable[[], torch.Tensor]:
    """A call of it, in f32 where it is not gated."""
    x = inputs(w, rows)
    return lambda: gated_linear(x, w, "silu") if gated else linear(x, [w], dtype=torch.float32)


def inputs(w: Matrix, rows: int) -> torch.Tensor:
    """As a model with such a matrix has them."""
    floats = {"f32": torch.float32, "f16": torch.float16}
    return _randn(rows, w.shape[1], w.codes.device).to(floats.get(w.kind, torch.bfloat16))


def _randn(rows: int, dims: int, device: torch.device) -> torch.Tensor:
    """The first rows are the same, however many there are."""
    generator = torch.Generator(device).manual_seed(dims)
    some = torch.randn((64, dims), generator=generator, device=device)
    scales = 1 + torch.arange(-(-rows // 64), device=device) / 7
    return (scales[:, None, None] * some).flatten(0, 1)[:rows]


class Watched:
    """A clock that tells how many cuts it has seen, and infinity of what cannot be launched."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._seen: set[Any] = set()

    def __call__(self, cut: Any, calls: Sequence[Callable[[], object]]) -> float:
        self._seen.add(cut)
        self._progress(len(self._seen), "")
        try:
            return seconds(calls)
        except Exception:  # too much shared memory, too many registers, no such instruction
            return math.inf


def tune_experts(
    shape: ExpertShape,
    device: torch.device,
    rows: Sequence[int] = ROWS,
    progress: Progress = quiet,
    configs: Sequence[Config] = (),
) -> tuple[Choice, Choice]:
    """Of gates and ups, and then of downs, whose tiles have the rows that the first have."""
    e, d, f = shape.count, shape.dim, shape.ff_dim
    both = stack([random_matrix(shape.kind, 2 * f, d, device, i) for i in range(e)])
    downs = stack([random_matrix(shape.down_kind, d, f, device, e + i) for i in range(e)])
    times = Watched(progress)

    def filled(count: int) -> int:
        return -(-count * shape.top // e)

    def timer(first: Config | None) -> Callable[[Config, int], float]:
        def time(config: Config, count: int) -> float:
            up, down = (first or config, config)
            experts = DeviceExperts(replace(both, tuned=up), replace(downs, tuned=down))
            return times((up, down), [routed(experts, count, shape.top)])

        return time

    def holder(first: Config | None) -> Callable[[Config], bool]:
        def holds(config: Config) -> bool:
            tuned = replace(both, tuned=first or config), replace(downs, tuned=config)
            return same_experts(DeviceExperts(*tuned), shape.top)

        return holds

    some = configs or of_one_part(shape.kind, 2 * f, d)
    up = tune(some, rows, timer(None), holder(None), filled)
    assert isinstance(up.config, Config)
    height, few = up.config.block_m, up.config.few
    below = configs or of_one_part(shape.down_kind, d, f)
    below = [replace(c, few=few) for c in below if c.block_m == height]
    return up, tune(below, rows, timer(up.config), holder(up.config), filled)


def of_one_part(kind: str, n: int, k: int) -> list[Config]:
    """A program has all of an expert's K: their number fills a GPU."""
    return [config for config in candidates(kind, n, k) if config.parts == 1]


def looks(shape: ExpertShape) -> int:
    """How many candidates `tune_experts` has at most."""
    d, f = shape.dim, shape.ff_dim
    return len(of_one_part(shape.kind, 2 * f, d)) + len(of_one_part(shape.down_kind, d, f))


def same_experts(experts: DeviceExperts, top: int) -> bool:
    whole = routed(experts, MANY, top)()
    return all(torch.equal(routed(experts, n, top)(), whole[:n]) for n in LOOKED_AT)


def routed(experts: DeviceExperts, rows: int, top: int) -> Callable[[], torch.Tensor]:
    device, count = experts.both.codes.device, experts.both.experts
    assert count is not None
    x = _randn(rows, experts.both.shape[1], device).to(torch.bfloat16)
    order = torch.rand((rows, count), generator=torch.Generator().manual_seed(0))
    ids = order.topk(top, 1).indices.sort(1).values.to(device, torch.int32)
    weights = torch.full((rows, top), 1 / top, device=device)
    return lambda: moe(x, ids, weights, experts, "silu")
