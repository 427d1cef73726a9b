"""GPUs that are known by name: what a forecast for one that is not at hand goes by."""

from __future__ import annotations

from dataclasses import dataclass

from elinvar.base.errors import InputError


@dataclass(frozen=True, slots=True)
class Chip:
    name: str
    title: str
    memory: int
    """Bytes that the driver shows."""
    bandwidth: float
    """Bytes a second between memory and chip."""
    matmul: float
    """Operations a second of dense bf16 products, a multiply-add being two."""
    measured: bool
    """Rates that programs reached; otherwise those of the maker's datasheet, which none reaches."""


_GIB = 2**30
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("h200", "NVIDIA H200 SXM", 139 * _GIB, 4.3e12, 780e12, measured=True),
        Chip("h100", "NVIDIA H100 SXM 80 GB", 79 * _GIB, 3.35e12, 989e12, measured=False),
        Chip("b200", "NVIDIA B200", 178 * _GIB, 8.0e12, 2250e12, measured=False),
        Chip("a100", "NVIDIA A100 SXM 80 GB", 79 * _GIB, 2.039e12, 312e12, measured=False),
        Chip("a100-40g", "NVIDIA A100 SXM 40 GB", 39 * _GIB, 1.555e12, 312e12, measured=False),
        Chip("l40s", "NVIDIA L40S", 44 * _GIB, 0.864e12, 362e12, measured=False),
        Chip("l4", "NVIDIA L4", 22 * _GIB, 0.3e12, 121e12, measured=False),
        Chip("rtx4090", "NVIDIA RTX 4090", 23 * _GIB, 1.008e12, 165e12, measured=False),
        Chip("mi300x", "AMD MI300X", 191 * _GIB, 5.3e12, 1307e12, measured=False),
        Chip("mi325x", "AMD MI325X", 255 * _GIB, 6.0e12, 1307e12, measured=False),
    )
}


def find_chip(name: str) -> Chip:
    """Raises InputError with the names that there are."""
    found = CHIPS.get(name.lower())
    if found is None:
        raise InputError(
            "device", f"No device {name!r} is known; choose cpu or one of {', '.join(CHIPS)}."
        )
    return found
