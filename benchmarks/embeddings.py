"""Texts and tokens a second of an embedding model, here and by sentence-transformers.

    .venv/bin/python benchmarks/embeddings.py all-minilm-l6-v2 --texts 512 --words 8 64 200

Each side runs in a process of its own, the sides in turn, on the same texts and CPUs; a figure is the
median of its rounds. Without the package sentence-transformers only our side is measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROSE = Path(__file__).parent.parent / "tests" / "data" / "prose.txt"


def texts(count: int, num_words: int) -> list[str]:
    words = PROSE.read_text(encoding="utf-8").split()
    starts = (i * 37 % (len(words) - num_words) for i in range(count))
    return [" ".join(words[start : start + num_words]) for start in starts]


def ours(model: str) -> Callable[[list[str]], Any]:
    from elinvar import Embedder

    return Embedder(model).embed


def theirs(model: str) -> Callable[[list[str]], Any]:
    from sentence_transformers import SentenceTransformer

    from elinvar.weights.sources import resolve

    loaded = SentenceTransformer(str(resolve(model)), device="cpu")
    return lambda some: loaded.encode(some, batch_size=64)


SIDES = {"elinvar": ours, "sentence-transformers": theirs}


def measure(side: str, model: str, count: int, num_words: int) -> float:
    """Seconds, after a round to warm up."""
    embed, some = SIDES[side](model), texts(count, num_words)
    embed(some[:64])
    start = time.perf_counter()
    embed(some)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--words", type=int, nargs="+", default=[8, 64, 200])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(measure(args.side, args.model, args.texts, args.words[0]))
        return
    sides = [side for side in SIDES if side == "elinvar" or _installed()]
    for num_words in args.words:
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(args.rounds):
            for side in sides:
                command = [sys.executable, __file__, args.model, "--side", side]
                command += ["--texts", str(args.texts), "--words", str(num_words)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                seconds[side].append(float(done.stdout.split()[-1]))
        rates = {side: args.texts / statistics.median(each) for side, each in seconds.items()}
        print(json.dumps({"words": num_words, "texts_per_second": rates}), flush=True)


def _installed() -> bool:
    return importlib.util.find_spec("sentence_transformers") is not None


if __name__ == "__main__":
    main()
