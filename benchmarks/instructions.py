"""Instruction counts of the main kernels under callgrind, against the committed ones: a check for
regressions that no neighbour on the machine can disturb.

    .venv/bin/python benchmarks/instructions.py            # compare
    .venv/bin/python benchmarks/instructions.py --update   # after a change that was meant

Counts depend on the compiler, so benchmarks/instructions.json keeps a set for each version that
somebody measured with. They are no times: a kernel may get quicker with more instructions, and then
--update is right. valgrind knows AVX2 and no AVX-512.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
COUNTS = ROOT / "benchmarks/instructions.json"
LEVELS = ("avx2", "scalar")
TOLERANCE = 0.02

Counts = dict[str, dict[str, int]]
"""Instructions by instruction set and kernel."""


def compiler() -> str:
    return os.environ.get("CXX") or "g++"


def compiler_key() -> str | None:
    """Which compiler makes the counts, or None where there is none."""
    if shutil.which(compiler()) is None:
        return None
    done = subprocess.run([compiler(), "--version"], capture_output=True, text=True)
    name = "clang++" if "clang" in done.stdout else "g++"
    found = re.search(r"\d+\.\d+\.\d+", done.stdout.splitlines()[0])
    return f"{name} {found[0] if found else '?'} {platform.machine()}"


def why_not() -> str | None:
    """What this machine lacks to count, one sentence."""
    if platform.machine() != "x86_64":
        return "instructions are counted on x86-64"
    if shutil.which("valgrind") is None:
        return "valgrind is not installed (Debian and Ubuntu: apt-get install valgrind)"
    if compiler_key() is None:
        return f"there is no compiler {compiler()}"
    return None


def flags(level: str) -> list[str]:
    """As CMakeLists.txt compiles the kernels of an instruction set."""
    text = (ROOT / "CMakeLists.txt").read_text()
    exact = re.search(r"set\(EXACT ([^)]*)\)", text)
    own = re.search(rf"add_level\({level}\b([^)]*)\)", text)
    assert exact and own, "CMakeLists.txt does not look as expected"
    return ["-std=c++20", "-w", *exact[1].split(), *own[1].split()]


def build(folder: Path) -> None:
    """A program for each level, two compilers at a time."""
    include = f"-I{ROOT / 'csrc'}"
    skipped = re.compile(r"(kernels|bind.*|dispatch|ceilings)\.cpp")
    shared = [p for p in (ROOT / "csrc").glob("*.cpp") if not skipped.fullmatch(p.name)]
    commands = []
    for level in LEVELS:
        define = [f"-DELINVAR_{level.upper()}=1", f"-DELINVAR_LEVEL={level}"]
        define += [f"-DELINVAR_ISA=elinvar::{level}", "-c", f"-o{folder / f'{level}.o'}"]
        commands.append([*flags(level), *define, ROOT / "csrc/kernels.cpp"])
    # The code around the kernels is compiled as the extension's: for any machine.
    plain = [*flags("scalar"), include, "-c"]
    commands += [[*plain, f"-o{folder / p.stem}.o", p] for p in shared]
    driver = ROOT / "tests/cpp/instructions.cpp"
    commands += [
        [*plain, f"-DLEVEL={level}", f"-o{folder / f'main-{level}.o'}", driver] for level in LEVELS
    ]
    in_parallel([[compiler(), *map(str, command)] for command in commands])
    objects = [str(folder / f"{p.stem}.o") for p in shared]
    link = [compiler(), "-static", "-pthread", *objects]
    for level in LEVELS:
        parts = [str(folder / f"main-{level}.o"), str(folder / f"{level}.o")]
        in_parallel([[*link, *parts, f"-o{folder / level}"]])


def in_parallel(commands: list[list[str]]) -> None:
    waiting, running = list(reversed(commands)), list[subprocess.Popen[str]]()
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            pipe = subprocess.PIPE
            running.append(subprocess.Popen(waiting.pop(), stdout=pipe, stderr=pipe, text=True))
        child = running.pop(0)
        _, error = child.communicate()
        if child.returncode:
            for other in running:
                other.kill()
            sys.exit(f"{' '.join(map(str, child.args))} failed:\n{error[-2000:]}")  # type: ignore[arg-type]


def measure() -> Counts:
    with TemporaryDirectory() as name:
        folder = Path(name)
        build(folder)
        in_parallel(
            [
                ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder / level}.out",
                 str(folder / level)]
                for level in LEVELS
            ]
        )  # fmt: skip
        return {level: read(folder, level) for level in LEVELS}


def read(folder: Path, level: str) -> dict[str, int]:
    """The dumps that the program asked for, in its order."""
    found = {}
    numbered = (p for p in folder.glob(f"{level}.out.*") if p.suffix[1:].isdecimal())
    for path in sorted(numbered, key=lambda p: int(p.suffix[1:])):
        text = path.read_text()
        trigger = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE)
        total = re.search(r"^(?:totals|summary): (\d+)", text, re.MULTILINE)
        if trigger and total:
            found[trigger[1]] = int(total[1])
    return found


def compare(old: Counts, new: Counts) -> tuple[list[str], list[str]]:
    """A sentence for each kernel that got worse (or is not known), and for each that got better."""
    worse, better = [], []
    for level, counts in new.items():
        for kernel, count in counts.items():
            before = old.get(level, {}).get(kernel)
            if before is None:
                worse.append(f"{level}, {kernel}: {count:,} instructions, and none are committed.")
                continue
            change = count / before - 1
            told = f"{level}, {kernel}: {count:,} instructions, {before:,} before ({change:+.1%})."
            if change > TOLERANCE:
                worse.append(told)
            elif change < -TOLERANCE:
                better.append(told)
        gone = sorted(old.get(level, {}).keys() - counts.keys())
        worse += [f"{level}, {kernel}: is committed, and was not counted." for kernel in gone]
    return worse, better


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--update", action="store_true", help="commit what is counted now")
    args = parser.parse_args()
    if reason := why_not():
        sys.exit(f"Nothing was counted: {reason}.")
    key = compiler_key()
    assert key is not None
    committed: dict[str, Counts] = json.loads(COUNTS.read_text()) if COUNTS.exists() else {}
    if key not in committed and not args.update:
        sys.exit(f"{COUNTS.name} has no counts of {key}, only of {', '.join(committed)}.")
    counts = measure()
    worse, better = compare(committed.get(key, {}), counts)
    if key in committed:
        print(*worse, *better, sep="\n", end="\n" if worse or better else "")
    if args.update:
        committed[key] = counts
        COUNTS.write_text(json.dumps(dict(sorted(committed.items())), indent=1) + "\n")
        print(f"{COUNTS.name} holds {sum(map(len, counts.values()))} counts of {key}.")
    elif worse:
        sys.exit(f"{len(worse)} kernels need more instructions than committed; where that is meant, "
                 "run benchmarks/instructions.py --update.")  # fmt: skip
    else:
        print(f"{sum(map(len, counts.values()))} kernels, none above its count ({key}).")
        if better:
            print("Some need fewer: keep that with --update.")


if __name__ == "__main__":
    main()
