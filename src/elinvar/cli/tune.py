"""`elinvar tune`: measures how a model's products are best cut on the GPU that is here, and keeps it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elinvar.base.errors import InputError, ModelError
from elinvar.cli import options as opt
from elinvar.cli.command import command, option
from elinvar.cli.terminal import bar, note

if TYPE_CHECKING:
    from elinvar.ops.triton.tuning import Choice


@command
@click.argument("model", metavar="MODEL", help="Whose matrices; a config.json does, too.")
@option("--out", type=opt.FILE, help="File to write (default: in the cache folder).")
@option("--rows", default="1,8,32,128,512,4096", help="Numbers of rows that are measured.")
@opt.as_json
def tune(model: str, out: Path | None, rows: str, as_json: bool) -> None:
    """Choose how each of a model's products is cut on this GPU: one way for all numbers of rows.

    It takes minutes a matrix, and another choice means other bits. What is in the file stays."""
    from elinvar.cli.bench.arguments import numbers
    from elinvar.engine.described import describe, products
    from elinvar.weights import sources

    counts = sorted(numbers(rows, "--rows"))
    path = sources.locate(model)
    if path is None:
        raise ModelError(f"{model} is not in the cache; run 'elinvar pull {model}' first.")
    device, name, version = _gpu()
    found = products(describe(path).entries)
    target = out or tuned_path(name)
    costs: dict[str, Any] = {}
    from elinvar.ops.triton.tuner import tune_matrix
    from elinvar.ops.triton.tuning import candidates

    for (kind, shape, gated), uses in found.items():
        key = f"{kind}/{shape[0]}x{shape[1]}"
        with bar(key, len(candidates(kind, *shape))) as update:
            choice = tune_matrix(kind, shape, gated, device, counts, update)
        costs[key] = {**choice.told(), "uses": uses}
        # After each: who interrupts this keeps what is done.
        write(target, name, version, {key: choice}, {key: costs[key]})
        note(f"{key}: at most {choice.worst:.2f} times the best, {choice.mean:.2f} in the mean")
    print(json.dumps(costs) if as_json else target)


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
    from elinvar.ops.triton.tuned import read

    configs, kept = {}, {}
    if path.exists():
        table = read(path)
        if (table.device, table.triton) == (device, version):
            configs = {key: asdict(config) for key, config in table.configs.items()}
            kept = json.loads(path.read_text()).get("costs", {})
    configs |= {key: asdict(choice.config) for key, choice in choices.items()}
    document = {"device": device, "triton": version, "configs": configs, "costs": kept | costs}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
