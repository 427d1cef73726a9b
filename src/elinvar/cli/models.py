"""`elinvar models`: what is in the cache, what one model is, and removing it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from elinvar.base.errors import ModelError
from elinvar.cli import options as opt
from elinvar.cli.command import Command, Group, option
from elinvar.cli.options import format_size

if TYPE_CHECKING:
    from elinvar.weights.cache import CachedModel

as_json_option = option("--json", "as_json", is_flag=True, help="Print JSON.")
available_option = option(
    "--available", is_flag=True, help="List the catalogue of models to pull instead."
)


@click.group(cls=Group, invoke_without_command=True)
@available_option
@as_json_option
@click.pass_context
def models(context: click.Context, available: bool, as_json: bool) -> None:
    """List, show and remove pulled models.

    `elinvar models` alone lists them; `elinvar models show MODEL` says more about one."""
    if not context.invoked_subcommand:
        list_models(available, as_json)


@models.command("list", cls=Command)
@available_option
@as_json_option
def list_command(available: bool, as_json: bool) -> None:
    """List the pulled models; the same as `elinvar models` alone."""
    list_models(available, as_json)


def list_models(available: bool, as_json: bool) -> None:
    from elinvar.weights import cache
    from elinvar.weights.sources import CATALOGUE

    if available:
        entries = [
            {"name": name, "spec": entry.source.spec, "about": entry.about}
            for name, entry in CATALOGUE.items()
        ]
        print(json.dumps(entries, indent=2) if as_json else _table(["name", "about"], entries))
        return
    found = [describe(model) for model in cache.list_models()]
    if as_json:
        print(json.dumps(found, indent=2))
    elif found:
        for model in found:
            model["size"] = format_size(model["bytes"])
        print(_table(["name", "source", "format", "size", "path"], found))
    else:
        print(
            f"No model is in {cache.cache_root()}; 'elinvar models --available' lists some to pull."
        )


@models.command(cls=Command)
@opt.model
@as_json_option
def show(model: str, as_json: bool) -> None:
    """Show what a model is: architecture, quantisation, tokenizer, context."""
    from elinvar.cli.describe import describe_model, readable
    from elinvar.weights import sources

    path = sources.locate(model)
    if path is None:
        raise ModelError(f"{model} is not in the cache; run 'elinvar pull {model}' first.")
    source = sources.parse(model)
    cached = sources.find(source) if isinstance(source, sources.Source) else None
    facts = {**(describe(cached) if cached else {"path": str(path)}), **describe_model(path)}
    # GGUF metadata may hold numpy arrays.
    print(json.dumps(facts, indent=2, default=list) if as_json else readable(facts))


@models.command(cls=Command)
@as_json_option
def support(as_json: bool) -> None:
    """List the families and the formats that can be run."""
    from elinvar.models.support import encoders, families, formats, markdown

    if as_json:
        rows = {"families": families(), "encoders": encoders(), "formats": formats()}
        print(json.dumps(rows, indent=2))
    else:
        print(markdown(), end="")


@models.command(cls=Command)
@opt.model
@option("--yes", "-y", is_flag=True, help="Do not ask.")
def remove(model: str, yes: bool) -> None:
    """Remove a pulled model from the cache, with what was derived from it."""
    from elinvar.weights import sources
    from elinvar.weights.cache import remove_model

    source = sources.parse(model)
    if not isinstance(source, sources.Source):
        raise ModelError(f"{model} is a local path, not a model in the cache; delete it yourself.")
    cached = sources.recorded(source)
    if cached is None:
        raise ModelError(f"{model} is not in the cache; 'elinvar models' lists what is.")
    if not yes:
        if not sys.stdin.isatty():
            raise ModelError(f"Nobody is there to confirm; add --yes to remove {model}.")
        click.confirm(f"Remove {model} ({format_size(cached.size)})?", abort=True, err=True)
    freed = remove_model(cached, _fingerprint(cached))
    print(f"Removed {model}, {format_size(freed)}.")


def describe(model: CachedModel) -> dict[str, Any]:
    """The record of a pulled model, for JSON and tables."""
    from elinvar.weights.sources import CATALOGUE

    aliases = {entry.source.spec: name for name, entry in CATALOGUE.items()}
    return {
        "name": aliases.get(model.spec, model.spec),
        "source": model.spec,
        "revision": model.revision,
        "format": model.format,
        "bytes": model.size,
        "pulled": model.pulled,
        "path": str(model.path),
        "files": [
            {"name": file.name, "bytes": file.size, "sha256": file.sha256} for file in model.files
        ],
    }


def _fingerprint(model: CachedModel) -> str | None:
    """None for a model that is damaged: then nothing derived from it can be found."""
    from elinvar.weights.checkpoint import open_checkpoint

    try:
        checkpoint = open_checkpoint(model.path)
    except ModelError:
        return None
    checkpoint.close()
    return checkpoint.fingerprint


def _table(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """Left-aligned columns; lines are not wrapped, so that they can be cut and grepped."""
    lines = [[column.upper() for column in columns], *([str(r[c]) for c in columns] for r in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    padded = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
    return "\n".join(line.rstrip() for line in padded)
