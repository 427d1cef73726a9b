"""Elinvar and its peers in turn (A B A B ...) on one model: prompt and decode speed, process start
to first token, peak memory; medians, and Elinvar's ratio to each peer with its spread. Absolute
numbers move with the machine and its neighbours; ratios taken within one round move far less.

    .venv/bin/python benchmarks/peers.py --llama-cpp path/to/llama.cpp/build \\
        --peer openvino-genai=path/to/venv --peer onnxruntime-genai=path/to/venv \\
        --model smollm2-135m --model path/to/another.gguf

Peers are installed apart, each in a virtual environment of its own; docs/performance.md says how.
Their weights, where they cannot read the GGUF file, come from benchmarks/convert.py. Each model's
result goes to benchmarks/results/; benchmarks/report.py makes the page of them. Run it on an idle
machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path

from sidebyside import results
from sidebyside.finding import CONVERTED, find_llama_cpp, peers, python_peers
from sidebyside.processes import PeerError
from sidebyside.results import Report, Rounds
from sidebyside.rows import QUICK, Job, chosen, unit
from sidebyside.sides import Elinvar, Side


def warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def compare(sides: list[Side], jobs: tuple[Job, ...], rounds: int) -> tuple[Rounds, dict[str, str]]:
    """Each round does each job on each side in turn. A peer that fails is out, and why is told."""
    found: Rounds = {side.name: [] for side in sides}
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        for side in sides:
            stack.callback(side.close)
        for round_ in range(rounds):
            for values in found.values():
                values.append({})
            for job in jobs:
                warn(f"round {round_ + 1} of {rounds}: {job.rows[0]}")
                for side in sides:
                    if side.name in failed:
                        continue
                    try:
                        found[side.name][-1] |= side.measure(job)
                    except PeerError as error:
                        if side.name == "elinvar":
                            raise SystemExit(str(error)) from None
                        failed[side.name] = str(error)
                        warn(f"{side.name} is out: {error}")
            for side in sides:
                side.end_round()
    return found, failed


def warm_up(sides: list[Side]) -> None:
    """Fills the caches on disk: Elinvar's packed weights, compiled graphs, the files themselves."""
    for side in sides:
        with suppress(PeerError):  # it will say so again in the first round
            side.measure(Job("start"))
        side.close()  # even a slow one: its first start may have filled the caches


def report_of(model: Path, sides: list[Side], found: Rounds, failed: dict[str, str]) -> Report:
    return {
        "model": model.name,
        "versions": {"python": platform.python_version(), "kernel": platform.release()},
        "sides": {
            side.name: {
                **side.describe(),
                "weights": "the same file" if side.weights == model else side.weights.name,
                "four_bit": side.four_bit,
            }
            for side in sides
            if any(found[side.name])
        },
        "failed": failed,
        "summary": results.summary(found),
        "rounds": found,
    }


def print_table(report: Report) -> None:
    print(f"\n{report['model']}, {report['threads']} threads, {report['cpu']}")
    for row, line in report["summary"].items():
        elinvar = line["median"]["elinvar"]
        print(f"{row:<16}{'elinvar':<22}{elinvar:>10,.4g} {unit(row)}")
        for side, (middle, low, high) in line["ratio"].items():
            value = f"{line['median'][side]:>10,.4g} {unit(row):<6}"
            print(f"{'':<16}{side:<22}{value} elinvar / it {middle:.2f} [{low:.2f} - {high:.2f}]")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--model", action="append", help="a GGUF model that elinvar knows; may be repeated")
    add("--llama-cpp", type=Path, metavar="FOLDER", help="a build of it (default: $LLAMA_CPP)")
    add("--peer", action="append", default=[], metavar="NAME=PYTHON", help="may be repeated")
    add("--converted", type=Path, default=CONVERTED, help="where convert.py put peers' weights")
    add("--sides", help="these peers alone, with commas")
    add(
        "--only",
        action="append",
        default=[],
        metavar="ROW",
        help='such as "decode 1" or decode; repeatable',
    )
    add("--rounds", type=int, help="default: 5")
    add("--quick", action="store_true", help="one round of few rows; writes no file unless --out")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--json", action="store_true", help="the reports on stdout instead of tables")
    add("--out", type=Path, help="the file to write (default: a new one in benchmarks/results/)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    models = args.model or ["smollm2-135m"]
    if args.out and len(models) > 1:
        sys.exit("--out takes one model's report: give one --model.")
    rounds = args.rounds or (1 if args.quick else 5)
    jobs = QUICK if args.quick and not args.only else chosen(args.only)
    llama_cpp = find_llama_cpp(args.llama_cpp)
    pythons = python_peers(args.peer)

    from elinvar.weights.sources import resolve

    for name in models:
        model = resolve(name)
        load = os.getloadavg()[0]
        if load > 0.5:
            warn(f"The machine is busy (load {load:.1f}): expect noise.")
        sides: list[Side] = [Elinvar(model, args.threads)]
        sides += peers(model, args.converted, llama_cpp, pythons, args.threads, warn)
        if args.sides:
            wanted = ["elinvar", *args.sides.split(",")]
            if unknown := set(wanted) - {side.name for side in sides}:
                sys.exit(f"--sides: {', '.join(sorted(unknown))} was not found here.")
            sides = [side for side in sides if side.name in wanted]
        warn(f"{model.name}: {', '.join(side.name for side in sides)}")
        begun = datetime.now(UTC).isoformat(timespec="seconds")
        if not args.quick:
            warm_up(sides)
        found, failed = compare(sides, jobs, rounds)
        report = {
            "date": begun,
            "cpu": results.cpu_name(),
            "threads": args.threads,
            "load_at_start": round(load, 2),
            **report_of(model, sides, found, failed),
        }
        print(json.dumps(report, indent=1)) if args.json else print_table(report)
        for line in results.regressions(report, results.load_all()):
            warn(f"Slower than last time: {line}")
        if args.out or not args.quick:
            warn(f"written to {results.write(report, args.out)}")


if __name__ == "__main__":
    main()
