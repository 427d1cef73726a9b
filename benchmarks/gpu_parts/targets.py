"""What docs/performance.md asks for on one H200, against what a report holds: reached or not. No torch: it
reads the report alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

Report = dict[str, Any]


def found(report: Any, pattern: str) -> list[float]:
    """The numbers at a path such as attention/decode/bf16/*/of_copy."""
    first, _, rest = pattern.partition("/")
    if not isinstance(report, dict):
        return []
    inside = [value for key, value in report.items() if fnmatch(key, first)]
    if rest:
        return [number for value in inside for number in found(value, rest)]
    return [float(value) for value in inside if isinstance(value, (int, float))]


def least(*patterns: str) -> Callable[[Report], float | None]:
    """Of all numbers there; None where a pattern finds none."""

    def read(report: Report) -> float | None:
        numbers = [found(report, pattern) for pattern in patterns]
        return min(map(min, numbers)) if all(numbers) else None

    return read


def most(*patterns: str) -> Callable[[Report], float | None]:
    def read(report: Report) -> float | None:
        numbers = [found(report, pattern) for pattern in patterns]
        return max(map(max, numbers)) if all(numbers) else None

    return read


def beside(ours: str, theirs: str) -> Callable[[Report], float | None]:
    def read(report: Report) -> float | None:
        mine, other = found(report, ours), found(report, theirs)
        return mine[0] / other[0] if mine and other and other[0] else None

    return read


def prefill(report: Report) -> float | None:
    """With taller tiles where their bits were equal."""
    seen = report.get("bits", {}).get("attention", {}).get("bf16", {}).get("seen", {})
    tall = "/tall" if seen.get("128 rows a tile") == "equal" else ""
    return least(f"attention/prefill{tall}/flops")(report)


@dataclass(frozen=True, slots=True)
class Target:
    what: str
    read: Callable[[Report], float | None]
    wanted: float
    unit: str = "%"
    above: bool = True

    def told(self, number: float) -> str:
        scale = {"%": 100.0, "TFLOP/s": 1e-12, "x": 1.0}[self.unit]
        return f"{number * scale:.1f} {self.unit}"


TARGETS = (
    Target(
        "decode attention of copy, the least of all loads",
        least("attention/decode/bf16/*/of_copy"),
        0.80,
    ),
    Target(
        "W4A16 at 1 and 16 rows of copy, the least of all shapes",
        least("products/speed/q4/*/1/of_copy", "products/speed/q4/*/16/of_copy"),
        0.75,
    ),
    Target("prefill attention, causal, 8k", prefill, 400e12, "TFLOP/s"),
    Target(
        "bf16 product of 4,096 rows of the vendor's",
        least("products/speed/bf16/*/4096/of_vendor"),
        0.80,
    ),
    Target(
        "norm and activation of copy, 8,192 rows",
        least("rows/add_rms_norm/8192/of_copy", "rows/gated/8192/of_copy"),
        0.85,
    ),
    Target("8B, batch 1, of the limit", least("llama/decode/1/of_limit"), 0.70),
    Target(
        "8B, batch 128, beside transformers' best",
        beside("llama/decode/128/tokens_per_s", "transformers/decode/128/tokens_per_s"),
        2.5,
        "x",
    ),
    Target(
        "GPU idle between steps, 8B at batch 1",
        least("llama/idle/1/ahead/idle_of_step"),
        0.02,
        above=False,
    ),
    Target(
        "what invariance costs a forward in bf16, the most of all loads",
        lambda report: none_or(most("cost/bf16/forward/*")(report), lambda ratio: ratio - 1),
        0.05,
        above=False,
    ),
    Target(
        "memory that `plan` foresees, off by",
        lambda report: none_or(least("llama/plan/of_taken")(report), lambda part: abs(part - 1)),
        0.03,
        above=False,
    ),
)


def none_or(number: float | None, then: Callable[[float], float]) -> float | None:
    return None if number is None else then(number)


def reached(report: Report) -> Iterator[dict[str, str]]:
    """Of each target, in words."""
    for target in TARGETS:
        number = target.read(report)
        told = "not measured" if number is None else target.told(number)
        good = number is not None and (number >= target.wanted) == target.above
        yield {
            "what": target.what,
            "wanted": f"{'>=' if target.above else '<='} {target.told(target.wanted)}",
            "measured": told,
            "reached": "-" if number is None else "yes" if good else "no",
        }
