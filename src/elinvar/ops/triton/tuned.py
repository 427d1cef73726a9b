"""The configurations that `elinvar tune` has measured on a device: a file of JSON.

{"device": "NVIDIA H200", "triton": "3.6.0", "configs": {"bf16/4096x14336": {"block_m": 128, ...},
"experts/128/q4/768x2048": {...}}, "attention": {"bfloat16/int8/128": {"rows": 64, ...}}}; a shape is
N x K, a kind of heads the dtype of products, that of the cache, dims. Another table means other bits,
so it belongs to what an engine says of itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

from elinvar.base.errors import ElinvarError
from elinvar.ops.triton.configs import Config, Tile
from elinvar.ops.triton.matrices import Matrix


@dataclass(frozen=True, slots=True)
class Table:
    device: str
    """As the driver names it."""
    triton: str
    """The version that compiled what was measured: another makes other kernels."""
    configs: Mapping[str, Config] = field(default_factory=dict)
    attention: Mapping[str, Tile] = field(default_factory=dict)

    def fit(self, w: Matrix) -> Matrix:
        """w with what was measured for its shape, or as it is."""
        config = self.configs.get(name(w))
        return w if config is None else replace(w, tuned=config)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def place(cache: Path, device: str) -> Path:
    """Where the table of a device is, in the cache folder."""
    return cache / "tuned" / f"{re.sub(r'[^a-z0-9]+', '-', device.lower())}.json"


def name(w: Matrix) -> str:
    """Under which a matrix is in the table."""
    n, k = w.shape
    experts = "" if w.experts is None else f"experts/{w.experts}/"
    return f"{experts}{w.kind}/{n}x{k}"


def heads(dtype: torch.dtype, kind: str, dims: int) -> str:
    """Under which attention is in the table."""
    return f"{str(dtype).removeprefix('torch.')}/{kind}/{dims}"


def read(path: Path) -> Table:
    """Raises ElinvarError, in one sentence, for a file that is no such table."""
    try:
        document = json.loads(path.read_text())
        configs = _all(Config, document["configs"])
        tiles = _all(Tile, document.get("attention", {}))
        return Table(str(document["device"]), str(document["triton"]), configs, tiles)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ElinvarError(
            f"{path} is no table of tuned kernels ({error}): run `elinvar tune`."
        ) from None


def find_table(cache: Path, device: str) -> Table | None:
    """What was measured on such a device for kernels of this Triton. Raises as `read` does."""
    path = place(cache, device)
    table = read(path) if path.exists() else None
    return table if table is not None and table.triton == triton.__version__ else None


def arithmetic(device: str, table: Table | None) -> str:
    """Changes when bits may: with the chip, the compiler, and how work is cut."""
    cuts: dict[str, Config | Tile] = {}
    if table is not None:
        cuts = {**table.configs, **table.attention}
    told = json.dumps({key: asdict(cut) for key, cut in cuts.items()}, sort_keys=True)
    return f"|{device}|triton {triton.__version__}|{sha256(told.encode()).hexdigest()[:12]}"


Cut = TypeVar("Cut", Config, Tile)


def _all(kind: type[Cut], found: Mapping[str, Mapping[str, Any]]) -> dict[str, Cut]:
    return {key: _checked(key, kind(**value)) for key, value in found.items()}


def _checked(key: str, cut: Cut) -> Cut:
    for f in fields(cut):
        number = getattr(cut, f.name)
        if f.name == "few" and number is None:
            continue
        if type(number) is not int or number < 1:
            raise ValueError(f"{f.name} of {key} is {number!r}, not a number from 1 on")
    return cut
