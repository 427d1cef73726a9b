"""Everything that wants to be known on a machine with a GPU, in one go of less than eight minutes:
whether the kernels are right and keep the contract there, how near each is to what the chip reaches,
and what whole models do. Offline, with random weights in the shapes of real models.

    .venv/bin/python benchmarks/gpu.py                      # writes benchmarks/results/gpu/<chip>.json
    .venv/bin/python benchmarks/gpu.py --only products,llama
    .venv/bin/python benchmarks/gpu.py --small              # no GPU: tiny shapes under the interpreter

Each part is a process, so that one that crashes takes no other along; what it measured until then is
kept. Parts that the time does not suffice for are named in the file. --small shows that the script's
ways can be gone; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gpu_parts.targets import reached

PARTS = {
    "bits": 80, "ceilings": 20, "products": 60, "rows": 20, "attention": 55, "cost": 70,
    "llama": 80, "transformers": 60, "experts": 45, "qwen3-moe": 60, "gpt-oss": 50, "sampling": 20,
    "recurrent": 25, "texts": 20, "deepseek": 50, "chosen": 40,
}  # fmt: skip
"""Seconds that each may take at most, in the order in which they are wanted: bits before all else."""
RESULTS = Path(__file__).parent / "results/gpu"


def run_part(name: str, folder: Path, seconds: float, small: bool) -> dict[str, Any]:
    """In a process of its own; what it wrote before it ended, however it ended."""
    out = folder / f"{name}.json"
    command = [sys.executable, __file__, "--part", name, "--out", str(out)]
    command += ["--small"] if small else []
    environment = dict(os.environ, ELINVAR_PART_SECONDS=str(seconds))
    environment["TRITON_INTERPRET"] = "1" if small else "0"
    begun, error = time.monotonic(), None
    try:
        done = subprocess.run(
            command, env=environment, timeout=seconds + 10, capture_output=True, text=True
        )
        if done.returncode:
            error = (done.stderr or done.stdout)[-1500:] or f"ended with {done.returncode}"
    except subprocess.TimeoutExpired:
        error = f"stopped after {seconds:.0f} s"
    found = json.loads(out.read_text()) if out.exists() else {}
    return {**found, "seconds": round(time.monotonic() - begun, 1)} | (
        {"error": error} if error else {}
    )


def errors(found: Any, at: str = "") -> list[str]:
    """Where something failed or was not equal, and why."""
    if not isinstance(found, dict):
        return []
    told = [f"{at}: {found['error'].strip().splitlines()[-1]}"] if found.get("error") else []
    told += [f"{at}: {key} is false" for key, value in found.items() if value is False]
    return told + [line for key, value in found.items() for line in errors(value, f"{at}/{key}")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--small", action="store_true", help="tiny shapes, Triton's interpreter")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--minutes", type=float, default=7.75, help="for all of it")
    parser.add_argument("--out", type=Path, help="file to write")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        from gpu_parts.base import run

        run(args.part, args.out, args.small)
        return 0
    if unknown := set(args.only.split(",")) - PARTS.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    asked = {*args.only.split(","), "ceilings"}  # what the others are compared with
    wanted = [name for name in PARTS if name in asked]
    until = time.monotonic() + args.minutes * 60
    report: dict[str, Any] = {"small": args.small, "parts": {}}
    out = args.out
    with TemporaryDirectory(prefix="elinvar-gpu-") as name:
        for part in wanted:
            left = until - time.monotonic()
            if left < 15:
                report["parts"][part] = {"skipped": "no time was left"}
                continue
            longest = PARTS[part] * (4 if args.small else 1)  # the interpreter takes its time
            found = run_part(part, Path(name), min(longest, left), args.small)
            report["parts"][part] = found
            report |= found.pop("about", {})
            report["reach"] = list(reached(report["parts"]))
            chip = re.sub(r"[^a-z0-9]+", "-", str(report.get("device", "none")).lower())
            out = out or RESULTS / f"{chip}.json"
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(report, indent=1) + "\n")
            print(f"{part}: {found['seconds']} s", *errors(found), sep="\n  ", flush=True)
    for row in [] if args.small else report["reach"]:
        print(f"{row['what']:<64} {row['wanted']:>16} {row['measured']:>16} {row['reached']:>4}")
    print(out)
    return 1 if errors(report) else 0


if __name__ == "__main__":
    sys.exit(main())
