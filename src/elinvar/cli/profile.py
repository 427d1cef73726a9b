"""`elinvar profile`: where a step's time goes, op by op, and how near each is to the machine's roof.

Steps run as they do in a server: prompts op by op, decode as one recorded call whose ops are timed
inside it. What a step takes beyond its ops is Python, and has a line of its own.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from elinvar.cli import options as opt
from elinvar.cli.bench.arguments import numbers
from elinvar.cli.ceilings import Remeasure, ceilings, describe
from elinvar.cli.terminal import bar, note

if TYPE_CHECKING:
    from elinvar.cli.roofline import Phase
    from elinvar.ops import Ops
    from elinvar.ops.ceilings import Ceilings


def profile(
    model: opt.ModelArgument,
    batch: Annotated[
        str, typer.Option("--batch", "-b", help="Batch sizes of decode, with commas.")
    ] = "1,16",
    prefill: Annotated[str, typer.Option(help="Prompt lengths, with commas.")] = "512",
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of each prompt before decode.")
    ] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps timed per batch size.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Prompts timed per length.")] = 5,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write every op as a trace for Perfetto or chrome://tracing.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    remeasure: Remeasure = False,
    threads: opt.Threads = None,
    kv_dtype: opt.KVDtypeOption = "f16",
    kv_memory: opt.KVMemory = None,
    weight_format: opt.WeightFormat = "auto",
    verbose: opt.Verbose = False,
) -> None:
    """Say where the time of a step goes, and how near each op is to this machine's ceilings."""
    batches, prefills = numbers(batch, "--batch"), numbers(prefill, "--prefill")
    config = opt.engine_config(
        threads=threads,
        kv_memory=kv_memory,
        kv_dtype=kv_dtype,
        weight_format=weight_format,
        prefix_cache=False,
        max_rows=max(batches, default=1),
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
        "kv_dtype": kv_dtype,
        "weight_format": weight_format,
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
