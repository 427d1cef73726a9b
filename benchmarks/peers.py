"""Elinvar and llama.cpp in turn (A B A B ...) on one GGUF file: prefill 512, decode at batch 1, 4,
16 and 32, median ratio with its spread. Absolute numbers move with the machine and its neighbours;
ratios taken within one round move far less.

    .venv/bin/python benchmarks/peers.py --llama-cpp path/to/llama.cpp/build/bin

The folder holds llama-bench and llama-batched-bench, built for this machine (-DGGML_NATIVE=ON
-DCMAKE_BUILD_TYPE=Release). Writes benchmarks/results/DATE-CPU-MODEL.json. Run it on an idle
machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from elinvar.weights.sources import resolve

PROMPT = 512
BATCHES = (1, 4, 16, 32)
LENGTH = 128
"""Tokens of each prompt before decode, and steps that are timed after it."""
RESULTS = Path(__file__).parent / "results"

Rates = dict[str, float]
"""Tokens/s over all rows by "prefill 512", "decode 1", ..."""


def run(command: list[str], what: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{what} failed ({done.returncode}): {done.stderr.strip()[-500:]}")
    return done.stdout


def measure_elinvar(model: Path, threads: int) -> tuple[Rates, dict[str, Any]]:
    command = [str(Path(sys.executable).with_name("elinvar")), "bench", str(model), "--json"]
    command += ["--repeats=1", f"--threads={threads}", f"--prefill={PROMPT}"]
    command += [f"--prompt-tokens={LENGTH}", f"--decode-tokens={LENGTH}"]
    command += [f"--batch={','.join(map(str, BATCHES))}"]
    found = json.loads(run(command, "elinvar bench"))
    rates = {f"prefill {n}": rate for n, rate in found["prefill"].items()}
    return rates | {f"decode {n}": rate for n, rate in found["decode"].items()}, found


def measure_llama_cpp(folder: Path, model: Path, threads: int) -> tuple[Rates, dict[str, Any]]:
    """llama-bench for the prompt; llama-batched-bench for decode, its prompts shared (-pps)."""
    bench = [str(folder / "llama-bench"), "-m", str(model), "-t", str(threads)]
    bench += ["-p", str(PROMPT), "-n", "0", "-r", "1", "-o", "jsonl"]
    prefill = json.loads(run(bench, "llama-bench").splitlines()[0])
    context = max(BATCHES) * 2 * LENGTH + 256
    batched = [str(folder / "llama-batched-bench"), "-m", str(model), "-c", str(context)]
    batched += ["-b", "2048", "-ub", "512", "-t", str(threads), "-tb", str(threads)]
    batched += ["-npp", str(LENGTH), "-ntg", str(LENGTH), "-npl", ",".join(map(str, BATCHES))]
    batched += ["-pps", "--output-format", "jsonl"]
    lines = run(batched, "llama-batched-bench").splitlines()
    decode = [json.loads(line) for line in lines if line.startswith("{")]
    rates = {f"prefill {PROMPT}": prefill["avg_ts"]}
    return rates | {f"decode {row['pl']}": row["speed_tg"] for row in decode}, prefill


def llama_cpp_version(folder: Path) -> str:
    done = subprocess.run([folder / "llama-bench", "--version"], capture_output=True, text=True)
    lines = (done.stdout + done.stderr).strip().splitlines()
    # Archives without git history build as number 0: then the folder's name says which it is.
    return " ".join([*lines[:2], f"({'/'.join(folder.resolve().parts[-4:-2])})"])


def summary(ours: list[Rates], theirs: list[Rates]) -> dict[str, Any]:
    """Per measurement: both medians, and the median and range of the rounds' ratios."""
    found = {}
    for name in ours[0]:
        ratios = [a[name] / b[name] for a, b in zip(ours, theirs, strict=True)]
        found[name] = {
            "elinvar": round(statistics.median(r[name] for r in ours), 1),
            "llama.cpp": round(statistics.median(r[name] for r in theirs), 1),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        }
    return found


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def git_commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--llama-cpp", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--model", default="smollm2-135m", help="a GGUF model that elinvar knows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="where to write (default: benchmarks/results/)")
    args = parser.parse_args()
    for name in ("llama-bench", "llama-batched-bench"):
        if not os.access(args.llama_cpp / name, os.X_OK):
            sys.exit(f"{args.llama_cpp} holds no {name}; build that target of llama.cpp first.")
    model = resolve(args.model)
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"The machine is busy (load {load:.1f}): expect noise.", file=sys.stderr)

    ours: list[Rates] = []
    theirs: list[Rates] = []
    about: dict[str, Any] = {}
    for round_ in range(args.rounds):
        print(f"round {round_ + 1} of {args.rounds}", file=sys.stderr)
        rates, about = measure_elinvar(model, args.threads)
        ours.append(rates)
        theirs.append(measure_llama_cpp(args.llama_cpp, model, args.threads)[0])
    table = summary(ours, theirs)

    print(f"{'tokens/s':<14}{'elinvar':>10}{'llama.cpp':>11}   ratio")
    for name, row in table.items():
        low, high = row["ratio_range"]
        print(
            f"{name:<14}{row['elinvar']:>10,.1f}{row['llama.cpp']:>11,.1f}   "
            f"{row['ratio']:.2f} [{low:.2f} - {high:.2f}]"
        )

    now = datetime.now(UTC)
    report = {
        "date": now.isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "threads": args.threads,
        "load_at_start": round(load, 2),
        "model": model.name,
        "versions": {
            "elinvar": f"{version('elinvar')} ({git_commit()})",
            "simd": about["simd"],
            "llama.cpp": llama_cpp_version(args.llama_cpp),
            "python": platform.python_version(),
            "kernel": platform.release(),
        },
        "summary": table,
        "rounds": {"elinvar": ours, "llama.cpp": theirs},
    }
    slug = re.sub(r"[^a-z0-9]+", "-", f"{cpu_name()} {model.stem}".lower()).strip("-")
    out = args.out or RESULTS / f"{now:%Y-%m-%d}-{slug}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
