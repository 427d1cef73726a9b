"""`elinvar tune`: measures how a model's work is best cut on the GPU that is here, and keeps it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elinvar.base.errors import InputError, ModelError
from elinvar.cli import options as opt
from elinvar.cli.command import command, option
from elinvar.cli.terminal import bar, note

if TYPE_CHECKING:
    from elinvar.engine.described import Described
    from elinvar.ops.triton.tuning import Choice

Tuning = Callable[..., "Choice | tuple[Choice, ...]"]


@dataclass(frozen=True, slots=True)
class Job:
    names: tuple[str, ...]
    """In the table."""
    candidates: int
    uses: int
    """In a forward."""
    run: Tuning
    """A choice for each name; `progress` is told how many candidates were looked at."""


@command
@click.argument("model", metavar="MODEL", help="Whose matrices; a config.json does, too.")
@option("--out", type=opt.FILE, help="File to write (default: in the cache folder).")
@option("--rows", default="1,8,32,128,512,4096", help="Numbers of rows that are measured.")
@option(
    "--kv-dtype",
    type=click.Choice(["f16", "bf16", "f32", "int8", "fp8"]),
    default="f16",
    help="Number format of the KV cache that attention is tuned for.",
)
@opt.as_json
def tune(model: str, out: Path | None, rows: str, kv_dtype: Any, as_json: bool) -> None:
    """Choose how attention and each of a model's products are cut on this GPU: one way for all rows.

    It takes minutes a matrix, and another choice means other bits. What is in the file stays."""
    from elinvar.cli.bench.arguments import numbers
    from elinvar.engine.described import describe
    from elinvar.ops.triton.sizes import TAKEN
    from elinvar.weights import sources

    counts = sorted(numbers(rows, "--rows"))
    path = sources.locate(model)
    if path is None:
        raise ModelError(f"{model} is not in the cache; run 'elinvar pull {model}' first.")
    device, name, version = _gpu()
    target = out or tuned_path(name)
    costs: dict[str, Any] = {}
    for job in jobs(describe(path, stored=TAKEN), kv_dtype, counts, device):
        with bar(job.names[0], job.candidates) as update:
            found = job.run(progress=update)
        choices = dict(zip(job.names, found if isinstance(found, tuple) else (found,), strict=True))
        told = {key: {**choice.told(), "uses": job.uses} for key, choice in choices.items()}
        costs |= told
        # After each: who interrupts this keeps what is done.
        write(target, name, version, choices, told)
        for key, choice in choices.items():
            note(f"{key}: at most {choice.worst:.2f} times the best, {choice.mean:.2f} in the mean")
    from elinvar.ops.triton.tuning import together

    whole = together(cost for key, cost in costs.items() if "block_m" in cost["config"])
    if whole:
        worst = max(whole, key=lambda count: whole[count])
        note(f"all products: at most {whole[worst]:.3f} times the best ({worst} rows)")
    print(json.dumps(costs) if as_json else target)


def jobs(model: Described, kv_dtype: Any, rows: list[int], device: Any) -> Iterator[Job]:
    """Attention first: it is soon done, and prompts gain most by it."""
    from elinvar.engine.described import experts, products
    from elinvar.ops.triton import tuned, tuner, tuner_heads
    from elinvar.ops.triton.tuning import candidates

    if found := tuner_heads.heads_of(model.config, kv_dtype, model.floats):
        heads, uses = found
        name, some = tuned.heads(heads.product, heads.kind, heads.dims), tuner_heads.tiles(heads)
        run: Tuning = partial(tuner_heads.tune_attention, heads, device)
        if len(some) > 1:
            yield Job((name,), len(some), uses, run)
    for product, uses in products(model.entries).items():
        kind, (n, k), _ = product
        run = partial(tuner.tune_matrix, *product, device, rows)
        yield Job((f"{kind}/{n}x{k}",), len(candidates(kind, n, k)), uses, run)
    for layer, uses in experts(model).items():
        run = partial(tuner.tune_experts, layer, device, rows)
        yield Job(layer.names, tuner.looks(layer), uses, run)


def _gpu() -> tuple[Any, str, str]:
    """The device, its name, and the version of Triton."""
    try:
        import torch
        import triton
    except ModuleNotFoundError as error:
        raise InputError(
            "device",
            f"{error.name} is missing: pip install 'elinvar[gpu]' brings what tuning needs.",
        ) from None
    if not torch.cuda.is_available():
        raise InputError(
            "device", "There is no GPU here that torch can use; tune where it will run."
        )
    device = torch.device("cuda", torch.cuda.current_device())
    return device, torch.cuda.get_device_name(device), triton.__version__


def tuned_path(device: str) -> Path:
    """Where the table of a device is kept."""
    from elinvar.ops.triton.tuned import place
    from elinvar.weights.cache import cache_root

    return place(cache_root(), device)


def write(
    path: Path, device: str, version: str, choices: dict[str, Choice], costs: dict[str, Any]
) -> None:
    """Adds to the table at `path`; one of another device or Triton is begun anew."""
    from elinvar.ops.triton.configs import Tile
    from elinvar.ops.triton.tuned import read

    document: dict[str, Any] = {"device": device, "triton": version, "configs": {}, "attention": {}}
    document["costs"] = {}
    if path.exists():
        table = read(path)
        if (table.device, table.triton) == (device, version):
            document |= asdict(table)
            document["costs"] = json.loads(path.read_text()).get("costs", {})
    for key, choice in choices.items():
        part = "attention" if isinstance(choice.config, Tile) else "configs"
        document[part][key] = asdict(choice.config)
    document["costs"] |= costs
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
