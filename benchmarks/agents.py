"""Agents: conversations of many turns with pauses between them, and what their prefixes cost.

    .venv/bin/python benchmarks/agents.py                        # simulated: all configurations
    .venv/bin/python benchmarks/agents.py --study                # simulated: candidate rules
    .venv/bin/python benchmarks/agents.py --model smollm2-135m   # an engine, in real time

Conversations are those of the public Mooncake trace: docs/design/024-agents-as-a-load.md says what
of it is kept. Its file is looked for in $ELINVAR_TRACES and in shared/traces beside the checkout, or
given by --trace; --synthetic makes one with like marginals. Counted are prompt tokens that were
computed, over those that an engine which forgets nothing computes; and the time to the first token of
turns that come back. Real runs want an idle machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agentload import synthetic, trace
from agentload.configs import CANDIDATES, CONFIGS
from agentload.load import PAUSES, Load, load, marginals, marginals_of_rows, working_set
from agentload.oracle import least
from agentload.simulate import Costs, Simulation
from agentload.trace import Row, Scale

Line = dict[str, Any]


def warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def source(args: argparse.Namespace) -> list[Row]:
    if args.synthetic or args.quick:
        return synthetic.rows(120 if args.quick else 8000, args.seed)
    path = trace.find(args.trace)
    if path is None:
        raise SystemExit(
            f"{trace.NAME} is not here: name it with --trace FILE or its folder in "
            f"${trace.VARIABLE}, or let --synthetic stand in for it."
        )
    return trace.read(path)


def make(args: argparse.Namespace, rows: list[Row], pauses: str) -> Load:
    scale = Scale(args.divisor, args.seed)
    found = trace.conversations(trace.copied(rows, args.copies), scale, args.min_turns)
    if args.longest:
        found = [one for one in found if _longest(one) <= args.longest]
    found = found[: args.sessions]
    if not found:
        raise SystemExit("No conversation is left: lower --min-turns or raise --longest.")
    return load(found, scale, pauses, args.rate, args.notice, args.seed)


def _longest(root: trace.Conversation) -> int:
    return max(one.num_tokens for one in trace.family(root))


def pools(args: argparse.Namespace, made: Load) -> list[tuple[float, int]]:
    """Shares of the working set, and tokens. No pool holds less than the longest conversation."""
    whole = working_set(made)
    longest = max(one.conversation.num_tokens for one in made.sessions)
    return [(share, max(int(share * whole), longest)) for share in args.pool]


def simulated(args: argparse.Namespace, made: Load) -> Iterator[Line]:
    oracle, costs = least(made), Costs().faster(args.speed)
    host = int(args.host * working_set(made))
    table = CANDIDATES if args.study else CONFIGS
    for share, tokens in pools(args, made):
        for name in chosen(args, table):
            if args.study:
                one = CANDIDATES[name]
                run = Simulation(
                    made,
                    tokens,
                    one.watcher(),
                    costs=costs,
                    cached_first=one.cached_first,
                    host_tokens=host if one.host else 0,
                )
            else:
                config = CONFIGS[name]
                run = Simulation(
                    made,
                    tokens,
                    hint=config.hint,
                    costs=costs,
                    prepare=config.prepare,
                    host_tokens=host if config.host else 0,
                    tools=config.tools,
                )
            found = run.run(oracle).as_json()
            yield {"config": name, "share": share, "pool_tokens": tokens, **found}


def real(args: argparse.Namespace, made: Load) -> Iterator[Line]:
    from agentload.real import Room, run

    oracle, host = least(made), int(args.host * working_set(made))
    for share, tokens in pools(args, made):
        for name in chosen(args, CONFIGS):
            config, room = CONFIGS[name], Room(tokens, host)
            found = run(args.model, made, config, room, args.squeeze, args.threads, oracle)
            yield {"config": name, "share": share, "pool_tokens": tokens, **found.as_json()}


def chosen(args: argparse.Namespace, table: dict[str, Any]) -> list[str]:
    names = args.config or list(table)
    if unknown := set(names) - set(table):
        raise SystemExit(f"--config: {', '.join(sorted(unknown))} is none of {', '.join(table)}.")
    return names


def print_line(line: Line) -> None:
    print(
        f"{line['config']:<34}{line['share']:>6.0%}{line['computed_over_least']:>9.3f}x"
        f"{line['again']:>12,}{1000 * line['ttft_returning_p50']:>10,.0f}"
        f"{1000 * line['ttft_returning_p95']:>10,.0f}{line['preemptions']:>6}",
        flush=True,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--model", help="run an engine with it, in real time")
    add("--study", action="store_true", help="candidate rules of which block yields, simulated")
    add("--trace", type=Path, metavar="FILE", help="of Mooncake's format")
    add("--synthetic", action="store_true", help="lengths from distributions, no file")
    add("--divisor", type=int, default=16, help="of all lengths; a power of two up to 512")
    add("--min-turns", type=int, default=4, help="of a conversation (default: 4)")
    add("--sessions", type=int, help="the first so many (default: all; 48 with --model)")
    add("--longest", type=int, help="leave out what gets longer (default: none; 2048 with --model)")
    add("--copies", type=int, default=1, help="of the trace's users (default: 1)")
    add("--rate", type=float, help="conversations begin so much faster (default: 4)")
    add("--pauses", action="append", choices=PAUSES, help="repeatable (default: tools)")
    add("--notice", type=float, default=0.3, help="share of sessions that announce their end")
    add("--pool", type=float, action="append", help="share of the working set; repeatable")
    add("--host", type=float, default=1.0, help="size of a host tier, as a share (default: 1)")
    add("--config", action="append", metavar="NAME", help="repeatable (default: all)")
    add("--speed", type=float, default=1.0, help="of the simulated machine")
    add("--squeeze", type=float, default=20.0, help="real runs: all waiting is divided by it")
    add("--threads", type=int)
    add("--seed", type=int, default=0)
    add("--quick", action="store_true", help="few synthetic conversations, to see that it works")
    add("--json", action="store_true", help="one report on stdout instead of tables")
    args = parser.parse_args()
    if args.divisor not in [2**i for i in range(10)]:
        parser.error("--divisor must be a power of two from 1 to 512.")
    if args.model:
        args.sessions, args.longest = args.sessions or 48, args.longest or 2048
    args.rate = args.rate or 4.0
    args.pool = args.pool or ([0.25] if args.quick else [0.1, 0.25, 1.0])
    args.pauses = args.pauses or ["tools"]
    return args


def main() -> None:
    args = parse()
    rows = source(args)
    reports = []
    for pauses in args.pauses:
        made = make(args, rows, pauses)
        about = {
            "pauses": pauses,
            "sessions": len(made.sessions),
            "turns": made.num_turns,
            "working_set": working_set(made),
            "least": least(made),
            "without_cache": made.num_prompt_tokens,
        }
        if not args.json:
            print(", ".join(f"{key} {value}" for key, value in about.items()))
            print(f"{'':<34}{'pool':>6}{'computed':>10}{'again':>12}{'TTFT p50':>10}{'p95 ms':>10}")
        lines = []
        for line in real(args, made) if args.model else simulated(args, made):
            lines.append(line)
            if not args.json:
                print_line(line)
        found = {"load": marginals(made), "source": marginals_of_rows(rows, made.scale)}
        reports.append({**about, "marginals": found, "lines": lines})
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k not in ("trace", "json")}
        print(json.dumps({"settings": settings, "reports": reports}, indent=1))


if __name__ == "__main__":
    main()
