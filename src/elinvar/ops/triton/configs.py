"""How products and attention are cut into tiles: one way for a matrix, or for heads of a kind, whatever
the number of rows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Config:
    """Of y [M, N] = x [M, K] w^T, for one shape of w and one dtype.

    block_k, parts and num_warps belong to the arithmetic: who changes them changes bits. The
    others say only who computes what, on a device that the tuner has seen to keep that promise.
    """

    block_m: int
    """Rows a tile."""
    block_n: int
    """Outputs a tile, 64 or more: they are the side of it that a wgmma has 64 of."""
    block_k: int
    """Of the inner dim, a turn of the loop."""
    num_warps: int
    num_stages: int
    few: int | None = None
    """Height of the tiles of a product with at most so many rows; None: block_m for them too. Set
    only by the tuner, where it has found the bits of both to be equal."""
    parts: int = 1
    """Parts of K with a sum of their own each, that are added in ascending order. So few rows can
    have a program for each part, and many rows one for all parts, with equal bits."""


def default(kind: str) -> Config:
    """What any chip can run, until the tuner has said better."""
    if kind == "f32":
        return Config(32, 64, 32, 4, 3)
    if kind == "int8":
        return Config(64, 128, 128, 4, 3)
    if kind in ("bf16", "f16", "fp8", "fp8-blocks"):
        return Config(64, 128, 64, 4, 3)
    return Config(64, 64, 128, 4, 3)


@dataclass(frozen=True, slots=True)
class Tile:
    """Of attention, by head dim and dtypes alone. A row's arithmetic has the keys of a tile in it and
    not its rows: each warp has 16 rows, each group of four one wgmma of 64."""

    rows: int
    """Of a program that shares the splits of its rows with others: short, as a decoded token fills
    few rows, and they wait for memory."""
    tall: int
    """Of one that walks all splits: of a prompt, where each key read should serve many rows. More than
    `rows` only where the tuner has found the bits of both to be equal."""
    keys: int
    num_stages: int

    def height(self, partial: bool) -> dict[str, int]:
        """What a launch says of it."""
        rows = self.rows if partial else self.tall
        return {"ROWS": rows, "KEYS": self.keys, "num_warps": max(1, rows // 16)}
