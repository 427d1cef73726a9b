"""What the compilers make of the kernels for GPUs, without a GPU: registers, spills, shared memory,
matrix instructions, for each case that the modules of ops/triton name as COMPILED.

    .venv/bin/python benchmarks/kernels/compile.py                        # all chips
    .venv/bin/python benchmarks/kernels/compile.py --targets sm_90,gfx942 --brief
    .venv/bin/python benchmarks/kernels/compile.py --update               # after a change that was meant

It fails where a kernel spills, lost the matrix instructions that its case wants, or takes more
shared memory than the chip has. benchmarks/kernels/compiled.json keeps the figures by version of
Triton, so that a change of a kernel shows what it did to them. What was compiled once is looked up
in the cache folder by the hash of its source.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from elinvar.ops.triton.cases import TARGETS, KernelCase, Target, collect, source_of
from elinvar.weights.cache import cache_root

COMMITTED = Path(__file__).with_name("compiled.json")
READER = 1
"""Version of `read`: what an older one read is compiled again."""

Figures = dict[str, Any]
"""Of one case on one chip, as `read` returns them; or {"error": ...}."""
Table = dict[str, dict[str, Figures]]
"""By case and chip."""

MATRIX = {
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma\b",
    "mma": r"\bmma\.sync",
    "mfma": r"\bv_s?mfmac?_",
}
BEST = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
"""What `wants="wgmma"` asks for."""


def read(target: Target, asm: dict[str, Any], shared: int, log: str) -> Figures:
    """Figures of what a compiler made; `log` is what ptxas said."""
    text = asm["ptx" if target.backend == "cuda" else "amdgcn"]
    counts = {name: len(re.findall(pattern, text)) for name, pattern in MATRIX.items()}
    found: Figures = {"shared": shared} | {name: n for name, n in counts.items() if n}
    if target.backend == "hip":
        found["registers"] = _last(r"\.vgpr_count:\s+(\d+)", text)
        found["spills"] = 4 * _last(r"\.vgpr_spill_count:\s+(\d+)", text)
        found["scratch"] = _last(r"\.private_segment_fixed_size:\s+(\d+)", text)
        found["loads"] = _widths(r"\b(?:global|buffer)_load_(\w+)", text, _amd_bytes)
    else:
        found["registers"] = _last(r"Used (\d+) registers", log)
        stores, loads = (_last(rf"(\d+) bytes spill {what}", log) for what in ("stores", "loads"))
        found["spills"] = max(stores, loads)
        found["loads"] = _widths(r"\bld\.global\S*?((?:\.v\d)?\.[bfus]\d+)", text, _ptx_bytes)
        copies = _widths(
            r"\bcp\.async\.c[ag]\.shared\.global[^\n]*?, (0x\w+|\d+)",
            text,
            lambda word: int(word, 0),
        )
        if copies:
            found["copies"] = copies
        if "wgmma.mma_async instructions are serialized" in log:
            found["serialized"] = True
    return dict(sorted(found.items()))


def problems(case: KernelCase, target: Target, figures: Figures) -> Iterator[str]:
    """A sentence for each thing that may not be."""
    at = f"{case.name} on {target.name}"
    if "error" in figures:
        yield f"{at} is not compiled: {figures['error']}"
        return
    if figures["spills"] > case.max_spills:
        yield f"{at} spills {figures['spills']} bytes a thread."
    if figures["shared"] > target.max_shared:
        yield f"{at} takes {figures['shared']:,} bytes of shared memory of {target.max_shared:,}."
    if case.wants == "wgmma" and BEST[target.name] not in figures:
        yield f"{at} lost its {BEST[target.name]} instructions."
    if case.wants == "mma" and not figures.keys() & MATRIX.keys():
        yield f"{at} has no matrix instructions."
    if figures.get("serialized"):
        yield f"{at} waits for each of its wgmma instructions: they are serialized."


def changes(old: Table, new: Table) -> list[str]:
    """What differs of what was measured before in registers, shared memory and matrix instructions."""
    return [
        f"{name} on {chip}: {key} {before.get(key, 0)} -> {figures.get(key, 0)}"
        for name, chips in new.items()
        for chip, figures in chips.items()
        for key in ("registers", "shared", "spills", *MATRIX)
        if (before := old.get(name, {}).get(chip)) and before.get(key, 0) != figures.get(key, 0)
    ]


def compile_all(
    cases: Iterable[KernelCase], chips: Sequence[str], jobs: int, brief: bool = False
) -> Table:
    """Figures of each case on each of the chips that it is for, by processes of their own. brief: on
    all chips but the first only of one case a kernel."""
    import triton

    path = cache_root() / "kernels" / f"compiled-{triton.__version__}.json"
    known: dict[str, Figures] = {}
    if path.exists():
        with contextlib.suppress(ValueError, OSError):
            known = json.loads(path.read_text())
    table: Table = {}
    work: list[tuple[str, str, str]] = []
    seen = set()
    for case in cases:
        for chip in chips:
            if chip in case.targets:
                if brief and chip != chips[0]:
                    if (case.kernel, chip) in seen:
                        continue
                    seen.add((case.kernel, chip))
                key = f"{READER} {source_of(case, TARGETS[chip]).key(triton.__version__)}"
                table.setdefault(case.name, {})[chip] = known.get(key, {})
                if key not in known:
                    work.append((case.name, chip, key))
    if work:
        # A process that was forked would share the state of LLVM's threads.
        spawn = get_context("spawn")
        with (
            TemporaryDirectory(prefix="elinvar-kernels-") as scratch,
            ProcessPoolExecutor(jobs, spawn, _begin, (scratch,)) as pool,
        ):
            for (name, chip, key), figures in zip(work, pool.map(_work, work), strict=True):
                table[name][chip] = figures
                if "error" not in figures:
                    known[key] = figures
                    _keep(path, known)  # each: who stops this need not begin anew
    return table


def _keep(path: Path, known: dict[str, Figures]) -> None:
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(known))
        new.replace(path)


def _begin(scratch: str) -> None:
    """In each process: Triton prints the log of a compiler that ran, not of one whose result it kept."""
    os.environ |= {
        "TRITON_CACHE_DIR": scratch,
        "TRITON_DUMP_PTXAS_LOG": "1",
        "TRITON_ALWAYS_COMPILE": "1",
    }
    _CASES.update({case.name: case for case in collect()})


def _work(item: tuple[str, str, str]) -> Figures:
    name, chip, _ = item
    return figures_of(_CASES[name], TARGETS[chip])


_CASES: dict[str, KernelCase] = {}


def figures_of(case: KernelCase, target: Target) -> Figures:
    from triton.compiler import compile

    made, printed = source_of(case, target), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            done = compile(made.source, target=made.gpu, options=made.options)
        return read(target, done.asm, done.metadata.shared, printed.getvalue())
    except Exception as error:  # each kernel's own: the others are compiled all the same
        lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
        return {"error": f"{type(error).__name__}: {' '.join(lines[-2:])[-300:]}"}


def _last(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    return int(found[-1]) if found else 0


def _widths(pattern: str, text: str, num_bytes: Callable[[str], int]) -> dict[str, int]:
    """How many instructions by the bytes that each moves for a thread, the widest first."""
    counts = Counter(num_bytes(word) for word in re.findall(pattern, text))
    return {str(width): counts[width] for width in sorted(counts, reverse=True)}


def _ptx_bytes(word: str) -> int:
    """Of ".v4.b32" 16."""
    vector, _, bits = word.lstrip(".").rpartition(".")
    return int(vector.removeprefix("v") or 1) * int(bits[1:]) // 8


def _amd_bytes(word: str) -> int:
    """Of "dwordx4" 16, of "ushort" 2."""
    if word.startswith("dword"):
        return 4 * int(word.removeprefix("dwordx").removeprefix("dword")[:1] or 1)
    return 2 if "short" in word or "16" in word else 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="chips, separated by commas")
    parser.add_argument(
        "--brief", action="store_true", help="one case a kernel on all chips but the first"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with this in their name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--update", action="store_true", help="commit what is measured now")
    parser.add_argument("--json", action="store_true", help="the figures on stdout")
    args = parser.parse_args()
    cases = [case for case in collect() if args.only in case.name]
    begun = time.monotonic()
    table = compile_all(cases, args.targets.split(","), args.jobs, args.brief)
    wrong = [
        line
        for case in cases
        for chip, figures in table.get(case.name, {}).items()
        for line in problems(case, TARGETS[chip], figures)
    ]
    import triton

    committed: dict[str, Table] = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}
    before = committed.get(triton.__version__, {})
    told = changes(before, table)
    if args.json:
        print(json.dumps({"figures": table, "problems": wrong, "changes": told}))
    else:
        print(*told, *wrong, sep="\n", end="\n" if told or wrong else "")
        print(f"{sum(map(len, table.values()))} of {len(cases)} kernels' cases by chip, "
              f"{len(wrong)} problems, {time.monotonic() - begun:.0f} s.")  # fmt: skip
    if args.update:
        there = {case.name for case in collect()}
        kept = {name: chips for name, chips in before.items() if name in there}
        for name, chips in table.items():
            kept[name] = {**kept.get(name, {}), **chips}
        committed[triton.__version__] = kept
        COMMITTED.write_text(written(committed))
    elif wrong:
        sys.exit(1)


def written(committed: dict[str, Table]) -> str:
    """JSON with a line for each case and chip, so that what changes is seen."""
    versions = []
    for version, table in sorted(committed.items()):
        lines = [
            f" {json.dumps(name)}: {{\n"
            + ",\n".join(f"  {json.dumps(chip)}: {json.dumps(f)}" for chip, f in chips.items())
            + "\n }"
            for name, chips in sorted(table.items())
        ]
        versions.append(f"{json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n}")
    return "{" + ",\n".join(versions) + "}\n"


if __name__ == "__main__":
    main()
