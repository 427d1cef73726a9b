"""The meaning of PEFT's adapter_config.json.

What would change answers and is not done here is refused by the name of its key; so is every key that
nobody knew when this was written, unless it is empty.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable
from pathlib import Path

from elinvar.base.errors import ModelError
from elinvar.weights.safetensors import read_json

CONFIG = "adapter_config.json"

_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
_ONLY_NAMES = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
"""Which matrices are adapted: the tensors say it, too."""
_HARMLESS = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "ensure_weight_tying", "megatron_core"),
    *("qalora_group_size", "loftq_config", "eva_config", "velora_config", "runtime_config"),
    "fan_in_fan_out",  # how the base model lies; A and B always lie the same way
}
_ALLOWED: dict[str, tuple[object, ...]] = {
    "bias": ("none",),
    # The others change the base model's weights before training.
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
}


class LoraSettings:
    """What the folder's adapter_config.json says. Raises ModelError naming the key for what is wrong or
    not supported."""

    def __init__(self, folder: Path) -> None:
        self.path = path = folder / CONFIG
        if not path.exists():
            raise ModelError(
                f"{folder} is not a LoRA adapter: it holds no {CONFIG}; give a folder that PEFT saved."
            )
        self.config = config = read_json(path)
        if config.get("peft_type") != "LORA":
            raise self._bad("peft_type", "LORA")
        for key, value in config.items():
            allowed = _ALLOWED.get(key)
            if (
                not value
                or key in _READ | _ONLY_NAMES | _HARMLESS
                or (allowed and value in allowed)
            ):
                continue
            raise ModelError(
                f"{path} has {key} {_shown(value)}, which is not supported; train or convert the "
                "adapter without it."
            )
        self._ranks = self._numbers("r", "rank_pattern", _is_rank, "a whole number above 0")
        self._alphas = self._numbers("lora_alpha", "alpha_pattern", _is_finite, "a number")

    def rank(self, module: str) -> int:
        return int(_first(self._ranks, module))

    def scale(self, module: str) -> float:
        r = self.rank(module)
        return _first(self._alphas, module) / (math.sqrt(r) if self.config.get("use_rslora") else r)

    def _numbers(
        self, key: str, by_end: str, good: Callable[[object], bool], wanted: str
    ) -> list[tuple[re.Pattern[str], float]]:
        """By patterns of the ends of modules' names, as PEFT matches them, of which the first that fits
        counts; last what holds for all others."""
        value, ends = self.config.get(key, 8), self.config.get(by_end) or {}  # 8: PEFT's own
        if not good(value):
            raise self._bad(key, wanted)
        if isinstance(ends, dict) and all(map(good, ends.values())) and all(map(_is_simple, ends)):
            with contextlib.suppress(re.error):
                table = [(re.compile(rf"(?:.*\.)?(?:{end})"), ends[end]) for end in ends]
                return [*table, (re.compile(".*"), value)]
        raise self._bad(by_end, f"{wanted} by modules' names or simple patterns of them")

    def _bad(self, key: str, wanted: str) -> ModelError:
        value = _shown(self.config.get(key))
        return ModelError(f"{self.path} has {key} {value}, and it must be {wanted}.")


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _is_simple(pattern: str) -> bool:
    """Whether it is matched in a moment, whoever wrote it: a repeated group may take forever."""
    repeats = len(re.findall(r"[*+{]", pattern))
    return len(pattern) <= 200 and repeats <= 4 and re.search(r"\)[*+{]", pattern) is None


def _first(table: list[tuple[re.Pattern[str], float]], module: str) -> float:
    return next(value for pattern, value in table if pattern.fullmatch(module))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
