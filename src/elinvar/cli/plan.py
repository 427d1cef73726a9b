"""`elinvar plan`: what a run of a model takes of a device, and the speed that its memory allows."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from elinvar.base.errors import ModelError
from elinvar.cli import options as opt
from elinvar.cli.command import command, option
from elinvar.cli.options import format_size

if TYPE_CHECKING:
    from elinvar.engine.devices import Chip

BATCHES = (1, 8, 32, 128)


@command
@click.argument(
    "model",
    metavar="MODEL",
    help="As elsewhere; or a config.json, or a folder with no more than that.",
)
@option("--device", default="cpu", metavar="NAME", help="cpu (this machine), h200, mi300x, ...")
@option("--max-len", type=opt.AT_LEAST_1, metavar="TOKENS", help="Longest sequence.")
@option("--rows", type=opt.AT_LEAST_1, default=256, help="Requests running at once.")
@option("--step-tokens", type=opt.AT_LEAST_1, default=512, help="Tokens of one step.")
@option("--context", type=opt.AT_LEAST_1, help="Tokens of a sequence whose speed is told.")
@option(
    "--kv-dtype",
    type=click.Choice(["f16", "bf16", "f32", "int8", "fp8"]),
    default="f16",
    help="Number format of the KV cache.",
)
@option("--kv-memory", metavar="SIZE", help="Memory for the KV cache (default: what is left).")
@opt.weight_format
@opt.as_json
def plan(as_json: bool, **flags: Any) -> None:
    """Say what a run takes of a device, and the most that it can do there; nothing is loaded.

    Of a GPU that is not at hand, too. Weights and cache are exact, workspace and graphs estimates."""
    facts = forecast(**flags)
    print(json.dumps(facts) if as_json else readable(facts))


def forecast(
    model: str,
    device: str,
    max_len: int | None,
    rows: int,
    step_tokens: int,
    context: int | None,
    kv_dtype: Any,
    kv_memory: str | None,
    weight_format: Any,
) -> dict[str, Any]:
    """As plain data: bytes, tokens, seconds."""
    from elinvar.base.config import EngineConfig
    from elinvar.engine.described import describe
    from elinvar.engine.devices import find_chip
    from elinvar.engine.forecast import Run
    from elinvar.ops.triton.sizes import TAKEN
    from elinvar.weights import sources

    path = sources.locate(model)
    if path is None:
        raise ModelError(f"{model} is not in the cache; run 'elinvar pull {model}' first.")

    config = EngineConfig(
        device="cpu" if device == "cpu" else "cuda",
        kv_dtype=kv_dtype,
        weight_format=weight_format,
        kv_memory=opt.parse_size(kv_memory),
        max_context=max_len,
        max_rows=rows,
        max_step_tokens=step_tokens,
    )
    chip = this_machine() if device == "cpu" else find_chip(device)
    stored = TAKEN if config.device == "cuda" else frozenset()
    run = Run(describe(path, weight_format, stored), config, chip)
    seen = min(context or 2048, run.kv.max_context)
    decode = [{"batch": n, **run.decode(n, seen)} for n in BATCHES if n <= rows]
    prefill = run.prefill(min(8192, run.kv.max_context))
    return {"model": model, **run.facts(), "context": seen, "decode": decode, "prefill": prefill}


def this_machine() -> Chip:
    """Its rates are measured the first time, which takes a second."""
    from elinvar.base.cpus import cpu_name
    from elinvar.cli.ceilings import ceilings
    from elinvar.engine.devices import Chip
    from elinvar.engine.memory import available_memory
    from elinvar.ops.cpu import CpuOps

    ops = CpuOps()
    reached = ceilings(ops.num_threads, ops.simd)
    matmul = max(reached.fma, reached.maddubs, reached.dot)
    return Chip("cpu", cpu_name(), available_memory(), reached.read, matmul, measured=True)


def readable(facts: dict[str, Any]) -> str:
    chip, taken, kv = facts["device"], facts["bytes"], facts["kv"]
    rates = f"{chip['bandwidth'] / 1e12:.2f} TB/s, {chip['matmul'] / 1e12:.0f} TFLOP/s"
    if chip["name"] == "cpu":
        rates = f"{chip['bandwidth'] / 1e9:.1f} GB/s, {chip['matmul'] / 1e9:.0f} GFLOP/s"
    origin = "measured" if chip["measured"] else "datasheet: more than any program reaches"
    lines = [
        ("model", facts["model"] + ("" if facts["exact"] else ", by its config.json alone")),
        ("device", f"{chip['title']}, {format_size(chip['memory'])}, {rates} ({origin})"),
        ("weights", format_size(taken["weights"])),
        ("KV cache", f"{format_size(taken['kv'])}: {kv['tokens']:,} tokens, {kv['sequences']:,} "
                     f"sequences of {kv['max_context']:,}"),
        ("workspace", f"{format_size(taken['workspace'])} at most (estimate)"),
    ]  # fmt: skip
    if taken["graphs"]:
        rest = taken["graphs"], taken["runtime"]
        sizes = " and ".join(map(format_size, rest))
        lines.append(("graphs, driver", f"{sizes} (estimates)"))
        lines.append(("while loading", f"{format_size(taken['arriving'])} more at most"))
    lines.append(("in all", format_size(taken["total"])))
    for step in facts["decode"]:
        read = format_size(step["weight_bytes"] + step["kv_bytes"])
        why = f"{read} to be read" if step["bound"] == "memory" else "by its products"
        told = f"at most {step['tokens_per_s']:,.0f} tokens/s ({why}, context {facts['context']:,})"
        lines.append((f"batch {step['batch']}", told))
    prefill = facts["prefill"]
    told = f"at most {prefill['tokens_per_s']:,.0f} tokens/s"
    lines.append((f"prompt {prefill['tokens']:,}", told))
    return "\n".join(f"{name:<15} {value}" for name, value in lines)
