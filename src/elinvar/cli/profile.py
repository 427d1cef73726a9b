"""`elinvar profile`: where a step's time goes, op by op, and how near each is to the machine's roof.

Steps run as they do in a server: prompts op by op, decode as one recorded call whose ops are timed
inside it. What a step takes beyond its ops is Python, and has a line of its own.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from elinvar.cli import options as opt
from elinvar.cli.bench import arguments as arg
from elinvar.cli.ceilings import ceilings, describe, remeasure_option
from elinvar.cli.command import command, option
from elinvar.cli.terminal import bar, note

if TYPE_CHECKING:
    from elinvar.cli.roofline import Phase
    from elinvar.ops import Ops
    from elinvar.ops.ceilings import Ceilings


@command
@opt.model
@arg.batch("1,16")
@arg.prefill
@arg.prompt_tokens
@arg.count("--steps", 64, "Decode steps timed per batch size.")
@arg.count("--repeats", 5, "Prompts timed per length.")
@option(
    "--trace",
    type=opt.FILE,
    metavar="FILE",
    help="Write every op as a trace for Perfetto or chrome://tracing.",
)
@opt.as_json
@remeasure_option
@opt.engine
@opt.verbose
def profile(
    model: str,
    batch: str,
    prefill: str,
    prompt_tokens: int,
    steps: int,
    repeats: int,
    trace: Path | None,
    as_json: bool,
    remeasure: bool,
    **flags: Any,
) -> None:
    """Say where the time of a step goes, and how near each op is to this machine's ceilings."""
    batches, prefills = arg.numbers(batch, "--batch"), arg.numbers(prefill, "--prefill")
    config = opt.engine_config(
        flags, prefix_cache=False, max_rows=max(batches, default=1), speculation="off"
    )
    if config.device != "cpu":
        raise click.BadParameter(
            "ops of a GPU end after their calls have: benchmarks/gpu.py times them",
            param_hint="--device",
        )

    from elinvar.cli.load import load
    from elinvar.cli.roofline import Mix
    from elinvar.ops.profiled import ProfiledOps

    # Opened first: nobody wants to hear after the run that the file cannot be written.
    file = None if trace is None else trace.open("w", encoding="utf-8")
    with load(model, config, wrap_ops=lambda ops: cast("Ops", ProfiledOps(ops))) as llm:
        ops: Any = llm.engine.ops
        roof = ceilings(ops.num_threads, ops.simd, remeasure)
        mix = Mix(llm.engine, ops)
        mix.check(prefills, prompt_tokens)
        phases: list[Phase] = []
        with bar("profile", len(prefills) + len(batches)) as update:
            for length in prefills:
                update(len(phases), f"prefill {length}")
                phases.append(mix.prefill(length, repeats))
            for size in batches:
                update(len(phases), f"decode, batch {size}")
                phases.append(mix.decode(size, prompt_tokens, steps))
    about = {
        "model": model,
        "threads": ops.num_threads,
        "simd": ops.simd,
        "kv_dtype": config.kv_dtype,
        "weight_format": config.weight_format,
        "prompt_tokens": prompt_tokens,
    }
    if as_json:
        told = [phase.as_json(roof) for phase in phases]
        print(json.dumps({**about, "ceilings": asdict(roof), "phases": told}))
    else:
        _print(about, phases, roof)
    if file is not None:
        from elinvar.cli.roofline import chrome_trace

        with file:
            json.dump(chrome_trace(phases), file)
        note(f"{trace} opens in https://ui.perfetto.dev or chrome://tracing")


def _print(about: dict[str, Any], phases: list[Phase], roof: Ceilings) -> None:
    print(f"{about['model']}: {about['threads']} threads, {about['simd']}, KV {about['kv_dtype']}")
    print(describe(roof))
    for phase in phases:
        told = phase.as_json(roof)
        seconds = told["seconds"]
        print(
            f"\n{phase.name}: {1000 * seconds:,.2f} ms, {told['tokens_per_s']:,.0f} tokens/s "
            f"(the quicker half of {len(phase.passes)})"
        )
        width = max(len(f"{one['op']} {one['label']}") for one in told["ops"]) + 2
        head = f"{'calls':>6}{'ms':>10}{'share':>8}{'GB/s':>8}{'GOP/s':>9}"
        print(f"  {'op':<{width}}{head}   of the ceilings")
        for one in told["ops"]:
            percent = ", ".join(
                f"{name} {value:.0f} %" for name, value in one["percent"].items() if value >= 0.5
            )
            print(
                f"  {one['op'] + ' ' + one['label']:<{width}}{one['calls']:>6g}"
                f"{1000 * one['seconds']:>10.3f}{100 * one['share']:>6.1f} %"
                f"{one['gb_per_s']:>8.1f}{one['gop_per_s']:>9.1f}   {percent}"
            )
        above = told["python_seconds"]
        print(
            f"  {'above the kernels (Python)':<{width}}{'':>6}{1000 * above:>10.3f}"
            f"{100 * told['python_share']:>6.1f} %"
        )
