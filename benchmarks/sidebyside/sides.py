"""The sides of a comparison: Elinvar through its command line, llama.cpp through its own tools, and
Python peers through a worker each. Every side fills the rows of a job; none knows the others.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sidebyside.processes import WORKERS, PeerError, Worker, run, seconds_to_output
from sidebyside.rows import LONG_STEPS, PROMPT, STEPS, Job, Values

START_PROMPT = "The capital of France is Paris. The capital of Italy is Rome. The capital of"
"""16 tokens, about."""
SLOW_START = 20.0
"""Seconds: a peer that needs longer to its first token is started once, not once a round."""
MB = 1e6


class Side(Protocol):
    name: str
    weights: Path
    four_bit: bool
    """Whether its weights are 4-bit: then it stands in the column of the best such peer."""

    def measure(self, job: Job) -> Values:
        """The job's rows; empty where this side has none. Raises PeerError."""

    def describe(self) -> dict[str, str]:
        """Version and settings, known after the first job."""

    def end_round(self) -> None: ...

    def close(self) -> None: ...


def is_four_bit(weights: Path) -> bool:
    return any(word in weights.name.lower() for word in ("q4", "int4"))


@dataclass
class CommandLine:
    """What the sides of separate processes share: nothing to keep between jobs."""

    weights: Path
    threads: int
    four_bit: bool = field(init=False)

    def __post_init__(self) -> None:
        self.four_bit = is_four_bit(self.weights)

    def end_round(self) -> None:
        """Nothing lives on."""

    def close(self) -> None:
        """Nothing lives on."""


@dataclass
class Elinvar(CommandLine):
    name: str = "elinvar"
    command: Path = field(default_factory=lambda: Path(sys.executable).with_name("elinvar"))
    simd: str = ""

    def measure(self, job: Job) -> Values:
        match job.kind:
            case "start":
                command = [str(self.command), "generate", str(self.weights), "--temperature=0"]
                command += [f"--threads={self.threads}", "--max-tokens=1", "-p", START_PROMPT]
                return {"start": seconds_to_output(command)}
            case "prefill":
                found, _ = self._bench(job.repeats, prefill=[job.size])
                return {f"prefill {job.size}": found["prefill"][str(job.size)]}
            case "decode":
                found, memory = self._bench(job.repeats, batch=[job.size])
                values = (found["decode"][str(job.size)], memory / MB)
                return dict(zip(job.rows, values, strict=False))
            case "long":
                # The short prompt is what bench warms up with.
                found, _ = self._bench(
                    1, prefill=[16, job.size], batch=[1], prompt=job.size, steps=LONG_STEPS
                )
                values = (found["prefill"][str(job.size)], found["decode"]["1"])
                return dict(zip(job.rows, values, strict=True))
            case "concurrent":
                found, _ = self._bench(job.repeats, batch=[job.size // 2, job.size])
                small, large = (found["decode"][str(n)] for n in (job.size // 2, job.size))
                return {job.rows[0]: large / small}

    def _bench(
        self,
        repeats: int,
        prefill: list[int] | None = None,
        batch: list[int] | None = None,
        prompt: int = PROMPT,
        steps: int = STEPS,
    ) -> tuple[dict[str, Any], int]:
        command = [str(self.command), "bench", str(self.weights), "--json"]
        command += [f"--threads={self.threads}", f"--repeats={repeats}"]
        command += [f"--prefill={','.join(map(str, prefill or []))}"]
        command += [f"--batch={','.join(map(str, batch or []))}"]
        command += [f"--prompt-tokens={prompt}", f"--decode-tokens={steps}"]
        done = run(command)
        found = json.loads(done.stdout)
        self.simd = found["simd"]
        return found, done.peak_memory

    def describe(self) -> dict[str, str]:
        version = run([str(self.command), "--version"]).stdout.strip()
        here = Path(__file__).parent
        git = ["git", "-C", str(here), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        return {"version": f"{version} ({commit})", "settings": self.simd}


@dataclass
class LlamaCpp(CommandLine):
    """llama-bench for prompts, llama-batched-bench for decode, llama-completion for the start."""

    folder: Path
    name: str = "llama.cpp"

    def measure(self, job: Job) -> Values:
        match job.kind:
            case "start":
                command = self._tool("llama-completion", "-c", "512", "-n", "1", "--temp", "0")
                command += ["-no-cnv", "--no-warmup", "--no-display-prompt", "-p", START_PROMPT]
                return {"start": seconds_to_output(command)}
            case "prefill":
                command = self._tool("llama-bench", "-p", str(job.size), "-n", "0", "-o", "jsonl")
                done = run([*command, "-r", str(job.repeats)])
                rates = json.loads(done.stdout.splitlines()[0])["samples_ts"]
                return {f"prefill {job.size}": statistics.median(rates)}
            case "decode":
                found, memory = self._batched(PROMPT, STEPS, [job.size] * job.repeats)
                rate = statistics.median(row["speed_tg"] for row in found)
                return dict(zip(job.rows, (rate, memory / MB), strict=False))
            case "long":
                found, _ = self._batched(job.size, LONG_STEPS, [1])
                values = (found[0]["speed_pp"], found[0]["speed_tg"])
                return dict(zip(job.rows, values, strict=True))
            case "concurrent":
                return {}

    def _batched(
        self, prompt: int, steps: int, batches: list[int]
    ) -> tuple[list[dict[str, Any]], int]:
        # One prompt shared by all rows (-pps) is this tool's faster mode: less of a cache to read.
        context = prompt + max(batches) * steps
        command = self._tool("llama-batched-bench", "-tb", str(self.threads), "-pps")
        command += ["-c", str(context), "-b", "2048", "-ub", "512", "--output-format", "jsonl"]
        command += ["-npp", str(prompt), "-ntg", str(steps), "-npl", ",".join(map(str, batches))]
        done = run(command)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if len(lines) < len(batches):
            raise PeerError(f"llama-batched-bench measured {len(lines)} of {len(batches)} batches")
        return [json.loads(line) for line in lines], done.peak_memory

    def _tool(self, tool: str, *flags: str) -> list[str]:
        return [str(self.folder / tool), "-m", str(self.weights), "-t", str(self.threads), *flags]

    def describe(self) -> dict[str, str]:
        command = [str(self.folder / "llama-bench"), "--version"]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = (done.stdout + done.stderr).strip().splitlines()
        # Archives without git history build as number 0: then the folder's name says which it is.
        folder = "/".join(self.folder.resolve().parts[-4:-2])
        return {"version": " ".join([*lines[:2], f"({folder})"]), "settings": "-pps -ub 512"}


class PythonPeer:
    """A peer in an interpreter of its own, through workers/measure_NAME.py."""

    def __init__(self, name: str, worker: str, python: Path, weights: Path, threads: int) -> None:
        self.name = name
        self.weights = weights
        self.four_bit = is_four_bit(weights)
        script = WORKERS / f"measure_{worker}.py"
        self._command = [str(python), str(script), str(weights), f"--threads={threads}"]
        self._command += ["--text", START_PROMPT]
        self._worker: Worker | None = None
        self._about: dict[str, str] = {}
        self._remembered: Values = {}
        """What a worker that is kept can tell once only: its start, and its peak memory."""

    def measure(self, job: Job) -> Values:
        if job.kind in ("long", "concurrent"):
            return {}
        worker = self._running()
        if job.kind == "start":
            return {"start": worker.start_seconds}
        sizes = {"tokens": job.size}
        if job.kind == "decode":
            sizes = {"batch": job.size, "prompt": PROMPT, "tokens": STEPS}
        answers = [worker.ask(job=job.kind, **sizes) for _ in range(job.repeats)]
        rate = statistics.median(answer["rate"] for answer in answers)
        values = dict(zip(job.rows, (rate, answers[-1]["rss"] / MB), strict=False))
        return values | {row: self._remembered.setdefault(row, values[row]) for row in job.rows[1:]}

    def _running(self) -> Worker:
        if self._worker is None:
            self._worker = Worker(self._command)
            self._about = self._worker.about
        return self._worker

    def describe(self) -> dict[str, str]:
        return self._about

    def end_round(self) -> None:
        if self._worker and self._worker.start_seconds < SLOW_START:
            self.close()

    def close(self) -> None:
        if self._worker:
            self._worker.close()
            self._worker = None
            self._remembered = {}


def usable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)
