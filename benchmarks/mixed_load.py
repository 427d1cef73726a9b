"""A long prompt arrives while streams decode: what the streams see between their tokens, and what
cutting the prompt costs in all (docs/design/022 and 027).

    .venv/bin/python benchmarks/mixed_load.py
    .venv/bin/python benchmarks/mixed_load.py --prompt 8000 --streams 4 --rounds 5 --json

The same work once unlimited (as much of the prompt as a step holds) and once limited (`auto`), in
turn; and the streams alone, since their steps get longer as they do: what they wait for a token beside
the prompt is held against the same tokens without it. Beyond the context that the model was made for
its answers mean nothing, but take as long: the engine is told that the context is 32k. Run it on an
idle machine.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from statistics import median, quantiles
from typing import cast

from elinvar.base.config import EngineConfig
from elinvar.base.limits import BATCH, INTERACTIVE, Target
from elinvar.base.sampling import SamplingParams
from elinvar.engine.core import Engine
from elinvar.engine.tokenizer import load_tokenizer
from elinvar.models.load import load_parts
from elinvar.ops import load_provider
from elinvar.weights.cache import cache_root
from elinvar.weights.checkpoint import open_checkpoint
from elinvar.weights.sources import resolve

CONTEXT = 32_768
TARGETS = {"unlimited": Target(1.0, None), "limited": INTERACTIVE}
QUIET = 100
"""Tokens of each stream before the prompt arrives; the first half is not measured."""


def load(model: str, threads: int | None) -> Engine:
    """As Engine.load, but with a context of 32k whatever the model says, and nothing cached."""
    checkpoint = open_checkpoint(resolve(model, lambda what, done, total: None))
    ops = load_provider("cpu", threads)
    parts = load_parts(checkpoint, "auto", cache_root())
    parts = replace(parts, config=replace(parts.config, max_context=CONTEXT))
    config = EngineConfig(num_threads=threads, kv_memory=2**31, prefix_cache=False, max_rows=16)
    return Engine(parts.build(ops), ops, load_tokenizer(checkpoint, cache_root()), config)


def measure(
    engine: Engine, target: Target, prompt: int, streams: int, answer: int
) -> dict[str, float]:
    """Milliseconds between a stream's tokens before the prompt came and beside it, seconds until
    the prompt's first token, tokens a second from its arrival until everything is done. prompt 0:
    the streams alone; `beside` is then what came after the time of its arrival."""
    engine.scheduler.chunks.aim_at(target, BATCH)
    rng = random.Random(1)
    vocab = min(engine.model_config.vocab_size, 40_000)

    def ask(length: int, tokens: int) -> str:
        ids = [rng.randrange(1000, vocab) for _ in range(length)]
        return engine.add(ids, SamplingParams(tokens, seed=1, ignore_eos=True))

    last = dict.fromkeys((ask(64, QUIET + answer) for _ in range(streams)), 0.0)
    counts = dict.fromkeys(last, 0)
    quiet: list[float] = []
    beside: list[float] = []
    long, arrived, first = "", 0.0, 0.0
    while engine.has_work:
        if not arrived and min(counts.values()) >= QUIET:
            arrived = time.perf_counter()
            long = ask(prompt, 16) if prompt else ""
        deltas = engine.step()
        now = time.perf_counter()
        for delta in deltas:
            if delta.request_id == long:
                first = first or now
            elif delta.token_ids:
                spans = quiet if not arrived else beside if not first else []
                if counts[delta.request_id] > QUIET // 2:
                    spans.append(now - last[delta.request_id])
                last[delta.request_id] = now
                counts[delta.request_id] += 1
    return {
        "tokens_beside": len(beside) / streams,
        "quiet_p50_ms": 1e3 * median(quiet),
        "quiet_p99_ms": 1e3 * _p99(quiet),
        "beside_p50_ms": 1e3 * median(beside),
        "beside_p99_ms": 1e3 * _p99(beside),
        "beside_max_ms": 1e3 * max(beside),
        "ttft_s": first - arrived if prompt else 0.0,
        "tokens_per_s": (prompt + 16 * bool(prompt) + streams * answer) / (now - arrived),
    }


def _p99(values: list[float]) -> float:
    return quantiles(values, n=100, method="inclusive")[98]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompt", type=int, default=16_000)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--answer", type=int, default=2000, help="tokens of each stream afterwards")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    engine = load(args.model, args.threads)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (*TARGETS, "alone")}
    for _ in range(args.rounds):
        for name, target in TARGETS.items():
            found[name].append(measure(engine, target, args.prompt, args.streams, args.answer))
        most = int(found["limited"][-1]["tokens_beside"])
        found["alone"].append(measure(engine, INTERACTIVE, 0, args.streams, max(2, most)))
    result = {
        name: {key: median(one[key] for one in each) for key in each[0]}
        for name, each in found.items()
    }
    pairs = list(zip(found["limited"], found["unlimited"], strict=True))
    same = list(zip(found["limited"], found["alone"], strict=True))
    ratios = {
        "itl_p99_to_quiet": median(a["beside_p99_ms"] / b["beside_p50_ms"] for a, b in same),
        "itl_p99_to_first_quiet": median(a["beside_p99_ms"] / a["quiet_p50_ms"] for a, _ in same),
        "quiet_p99_to_p50": median(b["beside_p99_ms"] / b["beside_p50_ms"] for _, b in same),
        "throughput": median(one["tokens_per_s"] / other["tokens_per_s"] for one, other in pairs),
    }
    if args.json:
        print(json.dumps({"options": vars(args), **cast("dict[str, object]", result), **ratios}))
        return
    print(f"{args.model}, {args.streams} streams, a prompt of {args.prompt} tokens")
    for name, values in result.items():
        print(f"{name:>10}  " + "  ".join(f"{key} {value:.1f}" for key, value in values.items()))
    print("limited: " + ", ".join(f"{key} {value:.2f}" for key, value in ratios.items()))
    print("targets: itl_p99_to_quiet at most 2, throughput at least 0.9")


if __name__ == "__main__":
    main()
