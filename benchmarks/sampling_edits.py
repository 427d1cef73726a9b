"""What changes of logits cost: a decode step with each of them, and a prompt with its log-probs.

    python benchmarks/sampling_edits.py smollm2-135m

Prints medians and their spread, in ms; of a step at batch 1 and 8, over as many steps as --tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from elinvar.base.config import EngineConfig
from elinvar.base.handling import OFFLINE
from elinvar.base.sampling import SamplingParams
from elinvar.engine.core import Engine

EDITS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "presence and frequency": {"presence_penalty": 0.5, "frequency_penalty": 0.5},
    "logit_bias of 300": {"logit_bias": {i: 1.0 for i in range(300)}},
    "bad_words": {"bad_words": tuple(f"word{i}" for i in range(20))},
    "min_tokens": {"min_tokens": 10_000},
    "typical_p": {"typical_p": 0.9},
    "all of top_p, top_k, min_p": {"top_p": 0.95, "top_k": 50, "min_p": 0.02},
}


def step_ms(engine: Engine, params: SamplingParams, rows: int) -> tuple[float, float]:
    """Median and standard deviation of a decode step."""
    prompt = [5 + i % 900 for i in range(200)]
    for k in range(rows):
        engine.add([k, *prompt], params, handling=OFFLINE)
    times = []
    while engine.has_work:
        begin = time.perf_counter()
        deltas = engine.step()
        if len(deltas) == rows:
            times.append((time.perf_counter() - begin) * 1000)
    times = times[len(times) // 10 :]
    return statistics.median(times), statistics.stdev(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args()
    engine = Engine.load(args.model, EngineConfig(kv_memory=2**28, max_rows=8))
    for name, edits in EDITS.items():
        least = {"min_tokens": args.tokens} if "min_tokens" in edits else {}
        params = SamplingParams(
            max_tokens=args.tokens, seed=1, ignore_eos=not least, **{**edits, **least}
        )
        shown = [step_ms(engine, params, rows) for rows in (1, 8)]
        print(f"{name:28}" + "".join(f"  {median:7.3f} ±{spread:6.3f}" for median, spread in shown))
    prompt = [5 + i * 7 % 900 for i in range(1000)]
    for name, told in (("prompt", None), ("prompt with log-probs", 1)):
        times = []
        for k in range(5):
            engine.add([k, *prompt], SamplingParams(max_tokens=1, prompt_logprobs=told))
            begin = time.perf_counter()
            while engine.has_work:
                engine.step()
            times.append((time.perf_counter() - begin) * 1000)
        print(f"{name:28}  {statistics.median(times):7.1f} ±{statistics.stdev(times):6.1f}")


if __name__ == "__main__":
    main()
