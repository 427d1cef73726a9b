"""Which device kernels run on, and bytes on their way to it and back."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from elinvar.base.errors import ElinvarError
from elinvar.ops.triton.numbers import INTERPRETED

INTERPRETER = bool(INTERPRETED.value)
"""TRITON_INTERPRET=1, Triton's own switch for debugging: kernels run on a CPU, very slowly."""


def find_device() -> torch.device:
    """The first GPU that is visible. Raises ElinvarError where there is none."""
    if INTERPRETER:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ElinvarError(
            "torch finds no GPU on this machine: see that its driver works and that this torch "
            "was made for it, or run on the CPU."
        )
    return torch.device("cuda", torch.cuda.current_device())


def device_name(device: torch.device) -> str:
    """As its driver says it."""
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def keep_kernels(cache: Path) -> None:
    """Compiled kernels are kept in the cache folder, where nobody said another place to Triton: whoever
    keeps that folder, as a container's volume, starts without compiling."""
    if "TRITON_HOME" not in os.environ:
        os.environ.setdefault("TRITON_CACHE_DIR", str(cache / "kernels"))


def free_memory(device: torch.device) -> int | None:
    """Bytes; None: those of this process."""
    return None if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]


def staging(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Bytes of the host that a copy to or from the device need not copy again."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type != "cpu")


@dataclass(frozen=True, slots=True, eq=False)
class DeviceBlocks:
    """As ops.caches.Blocks."""

    tensor: torch.Tensor
    """[B, bytes] u8"""

    @property
    def nbytes(self) -> int:
        return self.tensor.numel()

    def read(self, block: int) -> memoryview:
        host = staging(self.tensor.shape[1], self.tensor.device)
        host.copy_(self.tensor[block])
        return memoryview(host.numpy().data)

    def write(self, block: int, fill: Callable[[memoryview], bool]) -> bool:
        host = staging(self.tensor.shape[1], self.tensor.device)
        filled = fill(memoryview(host.numpy().data))
        if filled:
            self.tensor[block].copy_(host)
        return filled

    def copy(self, source: int, target: int) -> None:
        self.tensor[target].copy_(self.tensor[source])
