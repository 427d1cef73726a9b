"""`elinvar bench kernels`: the matrix kernels alone, against what this machine reaches at most.

Weights are random and come from memory, as they do in a model larger than the cache: calls go
round over as many copies as make up several times the last cache. With --warm there is one copy.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import cycle
from typing import TYPE_CHECKING, Any

import click

from elinvar.cli import options as opt
from elinvar.cli.bench.arguments import numbers
from elinvar.cli.ceilings import ceilings, describe, remeasure_option, shares
from elinvar.cli.command import command, option
from elinvar.cli.terminal import bar

if TYPE_CHECKING:
    from elinvar.ops import Weight
    from elinvar.ops.ceilings import Ceilings

KINDS = ("q4", "q5", "q8", "f16", "bf16", "f32")
SHAPES = ("576,576", "1536,576", "576,1536", "49152,576")
"""Of SmolLM2-135M: attention's output, the MLP's gate and down, the head."""
SECONDS = 0.05
ROUNDS = 10
"""The quickest counts, as it does for the ceilings: what disturbs a machine only makes it slower."""


@command
@option(
    "--shape",
    multiple=True,
    metavar="N,K",
    help="Outputs and inputs of the matrix; may be given several times "
    "(default: those of a 135M model).",
)
@option("--rows", "-m", default="1,4,16,512", help="Rows of activations, with commas.")
@option("--kinds", default=",".join(KINDS), help="Kinds of weights, with commas.")
@option("--warm", is_flag=True, help="One copy of the weights, which a cache may hold.")
@option("--simd", help="Instruction set (default: the widest here).")
@opt.as_json
@remeasure_option
@opt.threads
def kernels(
    shape: tuple[str, ...],
    rows: str,
    kinds: str,
    warm: bool,
    simd: str | None,
    as_json: bool,
    remeasure: bool,
    threads: int | None,
) -> None:
    """Measure the matrix kernels (no model): GB/s, GOP/s, share of this machine's ceilings."""
    shapes = [_shape(text) for text in shape or SHAPES]
    sizes = numbers(rows, "--rows")
    names = [name.strip() for name in kinds.split(",") if name.strip()]
    for name in names:
        if name not in KINDS:
            raise click.BadParameter(
                f"{name!r} is not one of {', '.join(KINDS)}", param_hint="--kinds"
            )

    from elinvar.ops import load_provider

    ops: Any = load_provider("cpu", threads, simd)
    roof = ceilings(ops.num_threads, ops.simd, remeasure)
    results: list[dict[str, Any]] = []
    with bar("kernels", len(names) * len(shapes) * len(sizes)) as update:
        for name in names:
            for n, k in shapes:
                weights = _weights(name, n, k, 1 if warm else 3 * roof.cache_bytes)
                for m in sizes:
                    update(len(results), f"{name} {n}x{k}, {m} rows")
                    results.append(_measure(ops, weights, m, roof, warm))
    about = {"threads": ops.num_threads, "simd": ops.simd, "warm": warm}
    if as_json:
        print(json.dumps({**about, "ceilings": asdict(roof), "results": results}))
    else:
        _print(results, about, roof)


def _shape(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"\s*(\d+)\s*[,x]\s*(\d+)\s*", text)
    n, k = (int(found[1]), int(found[2])) if found else (0, 0)
    if not n or not k or k % 32:
        raise click.BadParameter(
            f"{text!r} is not N,K with K a multiple of 32", param_hint="--shape"
        )
    return n, k


def _weights(kind: str, n: int, k: int, at_least: int) -> list[Weight]:
    """Copies of a random matrix that fill `at_least` bytes. All panels hold the same values: no
    kernel is quicker for that."""
    import numpy as np

    from elinvar.ops import layout

    rng = np.random.default_rng(1)
    panel: Weight
    if kind in layout.QUANTISED:
        scales = np.full((layout.PANEL, k // layout.GROUP), 0.01, np.float16)
        codes = rng.integers(0, 16, (layout.PANEL, k))
        if kind == "q8":
            panel = layout.pack_q8((codes - 8).astype(np.int8), scales)
        else:
            pack = layout.pack_q4 if kind == "q4" else layout.pack_q5
            panel = pack(codes.astype(np.uint8), scales, scales)
    else:
        values = rng.standard_normal((layout.PANEL, k), np.float32)
        bits = {"f16": values.astype(np.float16), "bf16": values.view(np.uint32) >> 16}
        panel = layout.pack_float(kind, bits.get(kind, values))  # type: ignore[arg-type]
    panels = layout.num_panels(n)
    copies: list[Weight] = []
    while not copies or len(copies) * copies[0].nbytes < at_least:
        data = layout.aligned_empty(panels * panel.nbytes)
        data.reshape(panels, -1)[:] = panel.data
        copies.append(layout.Weight(panel.kind, (n, k), data))
    return copies


def _measure(
    ops: Any, weights: list[Weight], rows: int, roof: Ceilings, warm: bool
) -> dict[str, Any]:
    import numpy as np

    from elinvar.ops import cost

    first = weights[0]
    x = np.random.default_rng(2).standard_normal((rows, first.shape[1]), np.float32)
    turn: Iterator[Weight] = cycle(weights)
    calls, seconds = 1, list[float]()
    while len(seconds) < ROUNDS:
        start = time.perf_counter()
        for _ in range(calls):
            ops.linear(x, (next(turn),))
        taken = time.perf_counter() - start
        if taken < SECONDS / 2 and not seconds:  # still learning how many calls make a round
            calls = max(calls + 1, int(calls * min(16, 1.2 * SECONDS / max(taken, 1e-6))))
        else:
            seconds.append(taken / calls)
    best, done = min(seconds), cost.linear(x, (first,))
    cached = warm and first.nbytes < roof.cache_bytes
    streamed, moved, ops_done = (n / best for n in (done.streamed, done.moved, done.ops))
    return {
        "kind": first.kind,
        "shape": list(first.shape),
        "rows": rows,
        "seconds": best,
        "seconds_range": [best, max(seconds)],
        "gb_per_s": moved / 1e9,
        "gop_per_s": ops_done / 1e9,
        "percent": shares(streamed, moved, ops_done, done.unit, roof, cached),
    }


def _print(results: list[dict[str, Any]], about: dict[str, Any], roof: Ceilings) -> None:
    where = "one copy of the weights" if about["warm"] else "weights from memory"
    print(f"{about['threads']} threads, {about['simd']}, {where}")
    print(describe(roof))
    print(f"  {'weights':<18}{'rows':>5}{'us':>11}{'GB/s':>8}{'GOP/s':>9}   of the ceilings")
    for found in results:
        n, k = found["shape"]
        shares = ", ".join(f"{name} {value:.0f} %" for name, value in found["percent"].items())
        print(
            f"  {found['kind'] + f' {n}x{k}':<18}{found['rows']:>5}{found['seconds'] * 1e6:>11,.1f}"
            f"{found['gb_per_s']:>8.1f}{found['gop_per_s']:>9,.1f}   {shares}"
        )
