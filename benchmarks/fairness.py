"""A tenant asks for a hundred answers at once, another for one now and then: how long the other waits
for its first token under each policy (docs/design/022).

    .venv/bin/python benchmarks/fairness.py
    .venv/bin/python benchmarks/fairness.py --model smollm2-135m --rows 16 --rounds 3 --json

Its fair share of two tenants is half of the machine: twice the time that it needs alone. The greedy
tenant's requests are replaced as they end, so that it never has fewer. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from statistics import median, quantiles

from elinvar.base.config import EngineConfig, PolicyName
from elinvar.base.handling import Handling
from elinvar.base.sampling import SamplingParams
from elinvar.engine.core import Engine

POLICIES: tuple[PolicyName, ...] = "fcfs", "fair"
GREEDY = 100


def waits(engine: Engine, greedy: int, count: int, args: argparse.Namespace) -> list[float]:
    """Seconds to the first token of `count` requests, each after a pause, beside so many others."""
    rng = random.Random(1)
    vocab = min(engine.model_config.vocab_size, 40_000)

    def ask(tenant: str, tokens: int) -> str:
        ids = [rng.randrange(1000, vocab) for _ in range(args.prompt)]
        params = SamplingParams(tokens, seed=1, ignore_eos=True)
        return engine.add(ids, params, handling=Handling(tenant))

    crowd = {ask("greedy", args.answer) for _ in range(greedy)}
    due = time.perf_counter() + args.pause
    single, asked, found = "", 0.0, list[float]()
    while len(found) < count:
        if not single and time.perf_counter() >= due:
            single, asked = ask("modest", 16), time.perf_counter()
        for delta in engine.step():
            if delta.request_id == single:
                if delta.token_ids and asked:
                    found.append(time.perf_counter() - asked)
                    asked = 0.0
                if delta.finish_reason is not None:
                    single, due = "", time.perf_counter() + args.pause
            elif delta.finish_reason is not None and delta.request_id in crowd:
                crowd.remove(delta.request_id)
                crowd.add(ask("greedy", args.answer))
    for request_id in [*crowd, single]:
        engine.abort(request_id)
    while engine.has_work:
        engine.step()
    return found


def p95(values: list[float]) -> float:
    return quantiles(values, n=20, method="inclusive")[18]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--answer", type=int, default=64, help="tokens of the greedy tenant's")
    parser.add_argument("--requests", type=int, default=20, help="of the other, in a round")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between them")
    parser.add_argument("--rows", type=int, default=16, help="requests that run at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    engines = {
        policy: Engine.load(
            args.model,
            EngineConfig(
                num_threads=args.threads,
                kv_memory=2**29,
                max_rows=args.rows,
                prefix_cache=False,
                policy=policy,
            ),
        )
        for policy in POLICIES
    }
    sides: dict[str, list[float]] = {name: [] for name in ("alone", *POLICIES)}
    for _ in range(args.rounds):
        sides["alone"].append(p95(waits(engines["fcfs"], 0, args.requests, args)))
        # Behind a hundred others, each takes as long as they do.
        sides["fcfs"].append(p95(waits(engines["fcfs"], GREEDY, 2, args)))
        sides["fair"].append(p95(waits(engines["fair"], GREEDY, args.requests, args)))
    share = 2 * median(sides["alone"])
    result = {
        "fair_share_s": share,
        **{f"{name}_p95_s": median(sides[name]) for name in POLICIES},
        **{f"{name}_to_fair_share": median(sides[name]) / share for name in POLICIES},
    }
    if args.json:
        print(json.dumps({"options": vars(args), **result}))
        return
    print(
        f"{args.model}, {args.rows} rows, prompts of {args.prompt}; p95 of the time to first token"
    )
    for key, value in result.items():
        print(f"{key:>20} {value:8.3f}")
    print("target: fair_to_fair_share at most 2")


if __name__ == "__main__":
    main()
