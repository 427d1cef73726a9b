"""`elinvar bench serve`: requests arrive as they do at a server, and each one's waiting is told.

Against any server that speaks OpenAI's API with --url, else against an engine in this process. Ctrl-C
ends it and prints what was measured so far.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elinvar.base.errors import ElinvarError
from elinvar.cli import options as opt
from elinvar.cli.command import command, option
from elinvar.cli.terminal import note

if TYPE_CHECKING:
    from elinvar.cli.bench.clients import Client
    from elinvar.cli.bench.drive import Pace
    from elinvar.cli.bench.latency import Goals
    from elinvar.cli.bench.workload import Arrival

_WHEN = "When requests come"
_WHAT = "What they ask"
_TOLD = "What is told"
DEFAULT_RATE = 4.0
BUSY = 0.8
"""Of a CPU: beyond it this client may be what is slow."""


@command
@opt.model
@option(
    "--url",
    metavar="URL",
    help="Ask this server (http://host:port/v1) for MODEL instead of loading it here.",
)
@option("--api-key", help="Sent to the server of --url.")
@option(
    "--priority",
    type=opt.Whole(-1000, 1000),
    metavar="N",
    help="Of all requests, at the server of --url (elinvar serve --policy priority).",
)
@option(
    "--requests",
    "-n",
    type=opt.AT_LEAST_1,
    metavar="N",
    default=64,
    help="How many; of conversations with --turns.",
    section=_WHEN,
)
@option(
    "--rate",
    type=float,
    help=f"Requests a second on average, at random times; inf: all at once (default: "
    f"{DEFAULT_RATE:g}, or the trace's own times).",
    section=_WHEN,
)
@option(
    "--burstiness",
    type=float,
    help="Of the random times: 1 is a Poisson process, less comes in bursts, more is even.",
    section=_WHEN,
)
@option(
    "--concurrency",
    "-c",
    type=opt.AT_LEAST_1,
    metavar="N",
    help="So many at once: the next one comes when one was answered. With --rate or --trace: no "
    "more than so many.",
    section=_WHEN,
)
@option(
    "--trace",
    type=opt.FILE_THAT_IS_THERE,
    metavar="FILE",
    help="Times and lengths from a trace: Mooncake's JSONL, Azure's CSV, or what elinvar serve "
    "--trace-requests wrote.",
    section=_WHEN,
)
@option("--speed", default=1.0, help="Play the trace this much faster.", section=_WHEN)
@option("--scale", default=1.0, help="Lengths of the trace times this.", section=_WHEN)
@option("--prompt-tokens", default="256", help="Tokens of a prompt: 256, or 32-512.", section=_WHAT)
@option("--output-tokens", default="64", help="Tokens of an answer: 64, or 16-128.", section=_WHAT)
@option(
    "--dataset",
    type=opt.FILE_THAT_IS_THERE,
    metavar="FILE",
    help="JSONL of prompts, as elinvar generate --prompts-file reads it.",
    section=_WHAT,
)
@option(
    "--shared-prefix",
    type=opt.Whole(0),
    metavar="N",
    default=0,
    help="Tokens before each prompt that others begin with, too.",
    section=_WHAT,
)
@option("--prefixes", type=opt.AT_LEAST_1, metavar="N", default=1, help="Of those.", section=_WHAT)
@option("--chat", is_flag=True, help="Ask as a chat; lengths are about right then.", section=_WHAT)
@option(
    "--turns",
    type=opt.AT_LEAST_1,
    metavar="N",
    default=1,
    help="Each request goes on with its answer, and as much that is new.",
    section=_WHAT,
)
@option(
    "--seed",
    type=opt.Whole(min=0),
    metavar="S",
    default=0,
    help="Same seed, same load.",
    section=_WHAT,
)
@option(
    "--slo",
    metavar="GOALS",
    help="What a good request takes at most, in ms, as ttft:500,itl:50 (each gap), tpot, e2e.",
    section=_TOLD,
)
@option("--plot", type=opt.FILE, metavar="FILE", help="Draw it as SVG.", section=_TOLD)
@opt.as_json
@opt.max_rows
@opt.engine
@opt.verbose
def serve(model: str, as_json: bool, plot: Path | None, **flags: Any) -> int:
    """Measure latencies and goodput under requests that arrive over time."""
    import asyncio

    from elinvar.cli.bench.drive import drive
    from elinvar.cli.bench.latency import summary

    for name in ("rate", "speed", "scale", "burstiness"):
        if flags[name] is not None and not flags[name] > 0:
            raise click.BadParameter(f"{flags[name]} is not above 0", param_hint=f"--{name}")
    goals, pace = _goals(flags["slo"]), _pace(flags)
    arrivals = _arrivals(flags)
    if plot is not None:
        plot.write_text("")  # one that cannot be written is told before, not after
    client, about = _client(model, flags)
    driven = asyncio.run(drive(client, arrivals, flags["seed"], pace, flags["chat"]))
    found = {**about, "interrupted": driven.interrupted, **summary(driven.records, goals)}
    found["client_cpu_s"] = round(driven.cpu_s, 3)
    if not found["completed"] and found["failed"] and not driven.interrupted:
        why = next(iter(found["error_examples"].values()))
        raise ElinvarError(f"No request was answered: {why.rstrip('.')}.")
    if plot is not None:
        from elinvar.cli.bench.plot import svg

        plot.write_text(svg(_headline(found), driven.records))
    if flags["url"] and driven.cpu_s > BUSY * found["seconds"] > 0:
        note("This client took most of a CPU: some of what it measured is its own slowness.")
    print(json.dumps(found)) if as_json else _print(found)
    return 130 if driven.interrupted else 0


def _client(model: str, flags: dict[str, Any]) -> tuple[Client, dict[str, Any]]:
    """And what the figures are of."""
    from elinvar.cli.bench.clients import EngineClient, HttpClient

    url, priority, rate = flags["url"], flags["priority"], flags["rate"]
    about: dict[str, Any] = {
        "model": model,
        "rate": rate if rate is None or math.isfinite(rate) else "inf",
        "trace": None if flags["trace"] is None else flags["trace"].name,
        "seed": flags["seed"],
        "concurrency": flags["concurrency"],
        "turns": flags["turns"],
    }
    if priority is not None and url is None:
        raise click.BadParameter("--priority needs --url", param_hint="--priority")
    if url is not None:
        more = {} if priority is None else {"priority": priority}
        return HttpClient(url, model, flags["api_key"], more), {**about, "url": url, **more}
    from elinvar.cli.load import load

    config = opt.engine_config(flags)
    engine = load(model, config).engine
    ops: Any = engine.ops
    about |= {"threads": ops.num_threads, "simd": ops.simd, "kv_dtype": config.kv_dtype}
    return EngineClient(engine), about


def _goals(text: str | None) -> Goals:
    from elinvar.cli.bench.latency import Goals

    given: dict[str, float] = {}
    for part in (text or "").split(","):
        name, _, ms = part.strip().partition(":")
        if text is None:
            continue
        known = name in Goals.__slots__ and name not in given
        if not (known and re.fullmatch(r"\d+(\.\d+)?", ms) and float(ms) > 0):
            message = f"{text!r} is not as ttft:500,itl:50 (of {', '.join(Goals.__slots__)}; ms)"
            raise click.BadParameter(message, param_hint="--slo")
        given[name] = float(ms) / 1000
    return Goals(**given)


def _pace(flags: dict[str, Any]) -> Pace:
    from elinvar.cli.bench.drive import Pace

    most = flags["concurrency"]
    own_times = flags["rate"] is not None or flags["trace"] is not None
    return Pace(most, most is not None and not own_times, flags["turns"])


def _length(text: str, flag: str) -> tuple[int, int]:
    found = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", text)
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= low <= high:
        raise click.BadParameter(f"{text!r} is not a length such as 256 or 32-512", param_hint=flag)
    return low, high


def _arrivals(flags: dict[str, Any]) -> list[Arrival]:
    from elinvar.cli.bench.workload import (
        poisson,
        read_dataset,
        read_trace,
        uniform,
        with_shared,
    )

    trace, rate, seed, count = flags["trace"], flags["rate"], flags["seed"], flags["requests"]
    prompt = _length(flags["prompt_tokens"], "--prompt-tokens")
    output = _length(flags["output_tokens"], "--output-tokens")
    if trace is not None and flags["dataset"] is not None:
        raise click.BadParameter("--trace tells what is asked", param_hint="--dataset")
    if trace is not None:
        arrivals = read_trace(trace, count, flags["speed"], flags["scale"])
    elif flags["dataset"] is not None:
        if flags["shared_prefix"]:
            raise click.BadParameter("--dataset has its prompts", param_hint="--shared-prefix")
        arrivals = read_dataset(flags["dataset"], count, output[1])
        if flags["turns"] > 1 and not flags["chat"] and isinstance(arrivals[0].content, str):
            raise click.BadParameter("texts go on as chats; add --chat", param_hint="--turns")
    else:
        arrivals = uniform(count, prompt, output, seed)
    if flags["shared_prefix"]:
        arrivals = with_shared(arrivals, flags["shared_prefix"], flags["prefixes"], seed)
    if rate is None and trace is not None:
        return arrivals
    if rate is None:
        rate = math.inf if flags["concurrency"] else DEFAULT_RATE
    return poisson(arrivals, rate, seed, flags["burstiness"] or 1.0)


def _headline(found: dict[str, Any]) -> str:
    ended = "stopped after" if found["interrupted"] else "in"
    return (
        f"{found['model']}: {found['completed']} of {found['requests']} requests answered "
        f"{ended} {found['seconds']:,.1f} s"
    )


def _print(found: dict[str, Any]) -> None:
    print(_headline(found))
    print(
        f"  {found['requests_per_s']:,.2f} requests/s, {found['output_tokens_per_s']:,.1f} output "
        f"tokens/s, {found['total_tokens_per_s']:,.1f} tokens/s with prompts"
    )
    if goodput := found.get("goodput"):
        goals = ", ".join(f"{name} {ms:g} ms" for name, ms in goodput["goals_ms"].items())
        print(
            f"  goodput {goodput['requests_per_s']:,.2f} requests/s, "
            f"{100 * goodput['share']:.1f} % of them within {goals}"
        )
    print(f"  {'ms':<8}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}")
    for name in ("ttft", "itl", "tpot", "e2e"):
        if values := found[f"{name}_ms"]:
            print(f"  {name.upper():<8}" + "".join(f"{v:>10,.1f}" for v in values.values()))
    for kind, times in found.get("errors", {}).items():
        print(f"  {times} failed, {kind}: {found['error_examples'][kind]}")
