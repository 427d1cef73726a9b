"""What can be run, as tables made from the registry: `elinvar models support` and docs/models.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elinvar.models.family import Family
from elinvar.models.registry import ENCODERS, FAMILIES
from elinvar.weights.quants import describe_types

Row = Mapping[str, str]


def families() -> list[Row]:
    return [_row(family) for family in FAMILIES]


def encoders() -> list[Row]:
    return [_row(family) for family in ENCODERS]


def _row(family: Family[Any]) -> Row:
    return {
        "family": family.name,
        "models": family.models,
        "config.json": ", ".join(family.hf_architectures) or "-",
        "GGUF": ", ".join(family.gguf_architectures) or "-",
        "tested with": family.tested,
    }


def formats() -> list[Row]:
    return [{"stored": stored, "runs as": here} for stored, here in describe_types()]


def markdown() -> str:
    return f"{_table(families())}\n{_table(encoders())}\n{_table(formats())}"


def _table(rows: Sequence[Row]) -> str:
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(rows[0]))]
    lines.insert(1, ["-" * width for width in widths])
    padded = (
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines
    )
    return "".join(f"| {' | '.join(cells)} |\n" for cells in padded)
