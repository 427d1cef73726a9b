"""What the parts share: where they run, how long they may, how they time, and what they write."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import triton

from elinvar.ops.triton import timing
from elinvar.ops.triton.device import find_device

MODULES = {
    "bits": "bits", "cost": "cost",
    "ceilings": "ceilings", "products": "products", "experts": "experts", "rows": "rows",
    "attention": "attention", "sampling": "sampling", "recurrent": "recurrent",
    "texts": "texts", "chosen": "chosen", "transformers": "peers",
    "llama": "whole", "qwen3-moe": "whole", "deepseek": "whole", "gpt-oss": "whole",
}  # fmt: skip


class Part:
    """One part under way. `small`: tiny shapes on the interpreter, of which times mean nothing."""

    def __init__(self, name: str, out: Path, small: bool) -> None:
        self.name, self.out, self.small = name, out, small
        self.device = find_device()
        self.until = time.monotonic() + float(os.environ.get("ELINVAR_PART_SECONDS", "600"))
        self.found: dict[str, Any] = {}
        self.tables = out.parent
        """Where the part `cost` leaves what it chose, as `elinvar tune` does in the cache folder."""
        self.ceilings: dict[str, float] = {"copy": 0.0, "matmul": 0.0}
        known = out.with_name("ceilings.json")
        if known.exists() and name != "ceilings":
            self.ceilings = json.loads(known.read_text())["ceilings"]

    def put(self, key: str, value: Any) -> None:
        """Written at once: what comes after may take the process down."""
        at, parts = self.found, key.split("/")
        for part in parts[:-1]:
            at = at.setdefault(part, {})
        at[parts[-1]] = value
        self.out.write_text(json.dumps(self.found))

    def attempt(self, key: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Its result under `key`, or why there is none; the next attempts go on."""
        if time.monotonic() > self.until:
            self.put(key, {"skipped": "no time was left"})
            return
        try:
            self.put(key, measure())
        except Exception as error:
            last = traceback.format_exc()[-1200:]
            self.put(key, {"error": f"{last}\n{type(error).__name__}: {error}"[-1500:]})
            if "CUDA error" in str(error):  # nothing works any more in this process
                raise

    def seconds(self, calls: Sequence[Callable[[], object]], repeats: int = 5) -> float:
        """Of one call; see timing.seconds."""
        if self.small:
            begun = time.perf_counter()
            calls[0]()
            return time.perf_counter() - begun
        return timing.seconds(calls, repeats)

    def tolerance(self, of_device: float) -> float:
        """The interpreter cuts numbers off to bf16, where a device rounds them."""
        return 4e-2 if self.small else of_device

    def rates(self, seconds: float, num_bytes: float, flops: float = 0) -> dict[str, float]:
        """What was reached, and the part of what the chip can."""
        found = {"us": seconds * 1e6, "bytes_per_s": num_bytes / seconds}
        if self.ceilings["copy"]:
            found["of_copy"] = found["bytes_per_s"] / self.ceilings["copy"]
        if flops:
            found["flops"] = flops / seconds
            if self.ceilings["matmul"]:
                found["of_matmul"] = found["flops"] / self.ceilings["matmul"]
        return found

    def randn(
        self, *shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0
    ) -> torch.Tensor:
        g = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=g, device=self.device, dtype=torch.float32).to(dtype)


def error_of(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest difference, in parts of the largest number."""
    exact = exact.double()
    return float((ours.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


def run(name: str, out: Path, small: bool) -> None:
    """One part, in the process that was started for it."""
    part = Part(name, out, small)
    about = {"torch": torch.__version__, "triton": triton.__version__, "device": "interpreter"}
    if part.device.type == "cuda":
        about["device"] = torch.cuda.get_device_name(part.device)
    part.put("about", about)
    import_module(f"gpu_parts.{MODULES[name]}").measure(part)
