"""The panels of ops/layout.py taken apart on the device: bytes go there as they are, and a model of
many GB is there as fast as they travel. The same values as `unpack`, `unpack_codes` and `unpack_stored`
give."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from elinvar.ops.layout import (
    CODE_BYTES,
    GROUP,
    GROUP_BYTES,
    PANEL,
    Weight,
    num_panels,
    panel_bytes,
    stored_parts,
)
from elinvar.ops.triton.sizes import ARRIVING

_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def slices(w: Weight) -> Iterator[Weight]:
    """Its rows in as many matrices as it takes to have few at once in pieces on the device."""
    (n, k), panels = w.shape, num_panels(w.shape[0])
    some = max(1, ARRIVING // (k * PANEL))
    for first in range(0, panels, some):
        own = w.data.reshape(panels, -1)[first : first + some]
        yield Weight(w.kind, (min(n - first * PANEL, some * PANEL), k), own.reshape(-1))


def floats(w: Weight, device: torch.device | str) -> torch.Tensor:
    """[N, K] of a matrix that is not quantised, in its own dtype."""
    (n, k), dtype = w.shape, _DTYPES[w.kind]
    values = _bytes(w, device, k * PANEL * dtype.itemsize).view(dtype)
    return values.view(-1, k, PANEL).transpose(1, 2).reshape(-1, k)[:n].contiguous()


def codes(
    w: Weight, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes [N, K] (int8, of q4 and q5 uint8), scales and, of these, mins f16 [N, K / 32]."""
    n, k = w.shape
    groups, scales_at = k // GROUP, CODE_BYTES[w.kind]
    records = _bytes(w, device, groups * GROUP_BYTES[w.kind]).view(-1, groups, GROUP_BYTES[w.kind])
    parts = _q8(records) if w.kind == "q8" else _nibbles(records, w.kind == "q5")

    def column(at: int) -> torch.Tensor:
        values = records[:, :, at : at + 2 * PANEL].contiguous().view(torch.float16)
        return values.transpose(1, 2).reshape(-1, groups)[:n]

    mins = None if w.kind == "q8" else column(scales_at + 2 * PANEL)
    return parts.reshape(-1, k)[:n], column(scales_at), mins


def stored(w: Weight, device: torch.device | str) -> dict[str, torch.Tensor]:
    """Of a kind in STORED: parts by name, bytes or f32, with a row for each of w, or for each panel."""
    n, k = w.shape
    raw, at, found = _bytes(w, device, panel_bytes(w.kind, k)), 0, {}
    for name, (rows, columns, dtype) in stored_parts(w.kind, k).items():
        size = rows * columns * dtype.itemsize
        values = raw[:, at : at + size].contiguous()
        values = values.view(torch.float32) if dtype.itemsize == 4 else values
        found[name] = values.view(-1, columns)[: n if rows == PANEL else None]
        at += size
    return found


def _q8(records: torch.Tensor) -> torch.Tensor:
    """-> [P, 16, G, 8, 4]"""
    panels, groups, _ = records.shape
    bytes_ = records[:, :, : CODE_BYTES["q8"]].reshape(panels, groups, 8, PANEL, 4)
    return bytes_.permute(0, 3, 1, 2, 4).view(torch.int8)


def _nibbles(records: torch.Tensor, fifth: bool) -> torch.Tensor:
    """-> [P, 16, G, 4, 2, 4]: code k = 8 c + 4 half + j of a group is at [.., c, half, j]."""
    panels, groups, _ = records.shape
    low = CODE_BYTES["q4"]
    both = records[:, :, :low].reshape(panels, groups, 4, 1, PANEL, 4)
    halves = torch.cat([both & 15, both >> 4], 3)  # panel, group, c, half, n, j
    if fifth:
        plane = records[:, :, low : CODE_BYTES["q5"]].reshape(panels, groups, 1, 1, PANEL, 4)
        bit = torch.arange(8, dtype=torch.uint8, device=records.device).view(2, 4).T
        halves |= ((plane >> bit[:, :, None, None]) & 1) << 4
    return halves.permute(0, 4, 1, 2, 3, 5)


def _bytes(w: Weight, device: torch.device | str, used: int) -> torch.Tensor:
    """The first bytes of each panel [P, used]: behind them it is filled up."""
    panels = torch.tensor(w.data).to(device).view(num_panels(w.shape[0]), -1)
    return panels[:, :used].contiguous()
