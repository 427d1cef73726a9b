"""The ceilings of this machine, measured once and kept in the cache folder."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import TYPE_CHECKING

from elinvar import __version__
from elinvar.base.cpus import cpu_name
from elinvar.base.errors import ModelError
from elinvar.cli.command import option
from elinvar.cli.terminal import note

if TYPE_CHECKING:
    from elinvar.ops.ceilings import Ceilings

remeasure_option = option(
    "--remeasure", is_flag=True, help="Measure the machine's ceilings anew (a second)."
)


def ceilings(num_threads: int, simd: str, remeasure: bool = False) -> Ceilings:
    """From the cache folder, or measured now. Another CPU, number of threads or version of Elinvar
    has its own."""
    from elinvar.ops.ceilings import Ceilings, measure_ceilings
    from elinvar.weights.atomic import atomic_file
    from elinvar.weights.cache import cache_root

    name = f"{cpu_name()} {num_threads} threads {simd} {__version__}"
    path = cache_root() / "ceilings" / f"{re.sub(r'[^a-z0-9.]+', '-', name.lower())}.json"
    if not remeasure:
        try:
            return Ceilings(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            pass  # not there, or written by somebody else
    note("measuring what this machine can reach")
    found = measure_ceilings(num_threads, simd)
    text = json.dumps(asdict(found)).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, len(text)) as file:
            file.write(text)
    except (OSError, ModelError):
        note(f"{path.parent} cannot be written: the next run measures again")
    return found


def shares(
    streamed: float, moved: float, ops: float, unit: str, roof: Ceilings, cached: bool
) -> dict[str, float]:
    """How near this machine's ceilings a rate comes: percent of each that applies.

    Bytes and operations are a second's. What streams comes from memory, or from the last cache
    where it fits (`cached`); ops that stream nothing work on what the op before left in a cache.
    """
    found = {}
    if not streamed or cached:
        found["cache"] = moved / roof.read_cached
    else:
        found["read"] = streamed / roof.read
    if unit == "f32":
        found["fma"] = ops / roof.fma
    else:
        found |= {
            name: ops / rate
            for name, rate in (("dot", roof.dot), ("maddubs", roof.maddubs))
            if rate
        }
    return {name: 100 * share for name, share in found.items()}


def describe(found: Ceilings) -> str:
    """One line for the head of a table."""
    parts = [
        f"read {found.read / 1e9:,.0f} GB/s",
        f"from cache {found.read_cached / 1e9:,.0f} GB/s",
        f"f32 FMA {found.fma / 1e9:,.0f} GFLOP/s",
    ]
    for name, rate in (("8-bit maddubs", found.maddubs), ("8-bit dot", found.dot)):
        parts += [f"{name} {rate / 1e9:,.0f} GOP/s"] if rate else []
    return "this machine at most: " + ", ".join(parts)
