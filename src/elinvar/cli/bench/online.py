"""`elinvar bench online`: requests arrive as they do at a server, and each one's waiting is told.

Against an engine in this process, or with --url against any server that speaks OpenAI's API and
takes prompts as token ids. Ctrl-C ends it and prints what was measured so far.
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

if TYPE_CHECKING:
    from elinvar.cli.bench.clients import Client
    from elinvar.cli.bench.workload import Arrival

_LOAD = "The load"
_GOALS = "Goals of a good request, in ms"
DEFAULT_RATE = 4.0


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
    "--rate",
    type=float,
    help=f"Requests a second on average, at random times; inf: all at once (default: "
    f"{DEFAULT_RATE:g}, or the trace's own times).",
    section=_LOAD,
)
@option(
    "--requests",
    "-n",
    type=opt.AT_LEAST_1,
    metavar="N",
    default=64,
    help="How many.",
    section=_LOAD,
)
@option("--prompt-tokens", default="256", help="Tokens of a prompt: 256, or 32-512.", section=_LOAD)
@option("--output-tokens", default="64", help="Tokens of an answer: 64, or 16-128.", section=_LOAD)
@option(
    "--trace",
    type=opt.FILE_THAT_IS_THERE,
    metavar="FILE",
    help="Times and lengths from a trace: Mooncake's JSONL or Azure's CSV.",
    section=_LOAD,
)
@option("--speed", default=1.0, help="Play the trace this much faster.", section=_LOAD)
@option("--scale", default=1.0, help="Lengths of the trace times this.", section=_LOAD)
@option(
    "--seed",
    type=opt.Whole(min=0),
    metavar="S",
    default=0,
    help="Same seed, same load.",
    section=_LOAD,
)
@option("--slo-ttft", type=float, help="To the first token.", section=_GOALS)
@option("--slo-tpot", type=float, help="A token after the first, on average.", section=_GOALS)
@option("--slo-e2e", type=float, help="The whole answer.", section=_GOALS)
@opt.as_json
@opt.max_rows
@opt.engine
@opt.verbose
def online(
    model: str,
    url: str | None,
    api_key: str | None,
    priority: int | None,
    rate: float | None,
    requests: int,
    prompt_tokens: str,
    output_tokens: str,
    trace: Path | None,
    speed: float,
    scale: float,
    seed: int,
    slo_ttft: float | None,
    slo_tpot: float | None,
    slo_e2e: float | None,
    as_json: bool,
    **flags: Any,
) -> int:
    """Measure latencies and goodput under requests that arrive over time."""
    import asyncio

    from elinvar.cli.bench.drive import drive
    from elinvar.cli.bench.latency import Goals, summary

    for flag, value in (("--rate", rate), ("--speed", speed), ("--scale", scale)):
        if value is not None and not value > 0:
            raise click.BadParameter(f"{value} is not above 0", param_hint=flag)
    arrivals = _arrivals(
        trace, requests, rate, speed, scale, seed,
        _length(prompt_tokens, "--prompt-tokens"), _length(output_tokens, "--output-tokens"),
    )  # fmt: skip
    goals = Goals(*(None if ms is None else ms / 1000 for ms in (slo_ttft, slo_tpot, slo_e2e)))
    about: dict[str, Any] = {
        "model": model,
        "rate": rate if rate is None or math.isfinite(rate) else "inf",
        "trace": None if trace is None else trace.name,
        "seed": seed,
    }
    if priority is not None and url is None:
        raise click.BadParameter("--priority needs --url", param_hint="--priority")
    client: Client
    if url is not None:
        from elinvar.cli.bench.clients import HttpClient

        client = HttpClient(url, model, api_key, priority)
        about |= {"url": url} | ({} if priority is None else {"priority": priority})
    else:
        from elinvar.cli.bench.clients import EngineClient
        from elinvar.cli.load import load

        config = opt.engine_config(flags)
        engine = load(model, config).engine
        client = EngineClient(engine)
        ops: Any = engine.ops
        about |= {"threads": ops.num_threads, "simd": ops.simd, "kv_dtype": config.kv_dtype}
    records, interrupted = asyncio.run(drive(client, arrivals, seed))
    found = {**about, "interrupted": interrupted, **summary(records, goals)}
    if not found["completed"] and found["failed"] and not interrupted:
        raise ElinvarError(f"No request was answered: {next(iter(found['errors'])).rstrip('.')}.")
    if as_json:
        print(json.dumps(found))
    else:
        _print(found)
    return 130 if interrupted else 0


def _length(text: str, flag: str) -> tuple[int, int]:
    found = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", text)
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= low <= high:
        raise click.BadParameter(f"{text!r} is not a length such as 256 or 32-512", param_hint=flag)
    return low, high


def _arrivals(
    trace: Path | None,
    count: int,
    rate: float | None,
    speed: float,
    scale: float,
    seed: int,
    prompt: tuple[int, int],
    output: tuple[int, int],
) -> list[Arrival]:
    from elinvar.cli.bench.workload import poisson, read_trace, uniform

    if trace is None:
        return poisson(uniform(count, prompt, output, seed), rate or DEFAULT_RATE, seed)
    arrivals = read_trace(trace, count, speed, scale)
    return arrivals if rate is None else poisson(arrivals, rate, seed)


def _print(found: dict[str, Any]) -> None:
    ended = "stopped after" if found["interrupted"] else "in"
    print(
        f"{found['model']}: {found['completed']} of {found['requests']} requests answered "
        f"{ended} {found['seconds']:,.1f} s"
    )
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
    for error, times in found.get("errors", {}).items():
        print(f"  {times} failed: {error}")
