"""read_adapter: a LoRA adapter as PEFT saves it, in the names and the order of rows of the model.

Owns the meaning of adapter_config.json. What would change answers and is not done here is refused by
the name of its key; so is every key that nobody knew when this was written, unless it is empty.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from elinvar.base.digest import blake2b
from elinvar.base.errors import ModelError
from elinvar.ops.api import LoraPair
from elinvar.ops.layout import Weight, pack_float
from elinvar.weights.quants import dequantize, to_codes
from elinvar.weights.rules import Binding, Rule, State, bind
from elinvar.weights.safetensors import read_file, read_json
from elinvar.weights.tensor import HostTensor

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

ADAPTED = frozenset(["q", "k", "v", "o", "gate", "up", "down", "q_a", "kv_a"])
"""What can be adapted of a layer (layers.{i}.q), and the head: matrices that every family multiplies
by ops.linear or ops.gated_linear."""

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
_FLOATS = ("F32", "F16", "BF16")
_NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """What it adds to which matrix."""

    path: Path
    pairs: Mapping[Weight, LoraPair]
    digest: bytes
    """Of everything that answers depend on."""

    @property
    def nbytes(self) -> int:
        return sum(w.nbytes for w in {w for p in self.pairs.values() for w in (p.a, p.b)})


def read_adapter(folder: Path, rules: Sequence[Rule], num_layers: int, weights: State) -> Adapter:
    """The adapter in `folder` for the model with these rules and weights, from whichever format
    they came. Raises ModelError, in one sentence, for anything that does not fit it."""
    try:
        settings = _Settings(_config(folder), folder / CONFIG)
        file, tensors = read_file(_tensors_path(folder))
    except OSError as error:
        raise ModelError(f"{folder} cannot be read: {error.strerror}.") from error
    try:
        pairs = _pairs(folder, settings, tensors, _by_module(rules, num_layers, weights))
    finally:
        tensors.clear()
        file.close()
    return Adapter(folder, dict(pairs.values()), _digest(pairs))


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).exists():
        raise ModelError(
            f"{folder} is not a LoRA adapter: it holds no {CONFIG}; give a folder that PEFT saved."
        )
    return read_json(folder / CONFIG)


def _tensors_path(folder: Path) -> Path:
    if (folder / TENSORS).exists():
        return folder / TENSORS
    if (folder / PICKLE).exists():
        raise ModelError(
            f"{folder / PICKLE} is a pickle, which can run code when opened; save the adapter again "
            "with safe_serialization=True."
        )
    raise ModelError(f"{folder} holds no {TENSORS}; give the whole folder that PEFT saved.")


class _Settings:
    """adapter_config.json, checked."""

    def __init__(self, config: Mapping[str, Any], path: Path) -> None:
        self.config, self.path = config, path
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
        self.ranks = self._pattern("rank_pattern")
        self.alphas = self._pattern("alpha_pattern")

    def rank(self, module: str) -> int:
        r = self._of(self.ranks, module, "r")
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise self._bad("r", "a whole number above 0")
        return r

    def scale(self, module: str) -> float:
        alpha, r = self._of(self.alphas, module, "lora_alpha"), self.rank(module)
        if (
            isinstance(alpha, bool)
            or not isinstance(alpha, int | float)
            or not math.isfinite(alpha)
        ):
            raise self._bad("lora_alpha", "a number")
        return alpha / (math.sqrt(r) if self.config.get("use_rslora") else r)

    def _pattern(self, key: str) -> list[tuple[re.Pattern[str], Any]]:
        """Patterns of the ends of modules' names, as PEFT matches them: the first that fits counts."""
        values = self.config.get(key) or {}
        if not isinstance(values, dict):
            raise self._bad(key, "an object of numbers by module")
        try:
            return [(re.compile(rf"(?:.*\.)?(?:{end})"), value) for end, value in values.items()]
        except re.error:
            raise self._bad(key, "names or patterns of modules as its keys") from None

    def _of(self, patterns: list[tuple[re.Pattern[str], Any]], module: str, default: str) -> Any:
        for pattern, value in patterns:
            if pattern.fullmatch(module):
                return value
        return self.config.get(default, 8)  # PEFT's own, of both

    def _bad(self, key: str, wanted: str) -> ModelError:
        value = _shown(self.config.get(key))
        return ModelError(f"{self.path} has {key} {value}, and it must be {wanted}.")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _by_module(
    rules: Sequence[Rule], num_layers: int, weights: State
) -> dict[str, list[tuple[Binding, Weight]]]:
    """Module of the Hugging Face model -> the matrices that its weight holds; merged ones several."""
    found: dict[str, list[tuple[Binding, Weight]]] = {}
    for binding in bind(rules, "safetensors", num_layers):
        weight = weights.get(binding.name)
        if isinstance(weight, Weight):
            module = binding.source.removesuffix(".weight")
            found.setdefault(module, []).append((binding, weight))
    return found


def _pairs(
    folder: Path,
    settings: _Settings,
    tensors: Mapping[str, HostTensor],
    by_module: Mapping[str, list[tuple[Binding, Weight]]],
) -> dict[str, tuple[Weight, LoraPair]]:
    """By canonical name: the matrix, and what is added to it."""
    halves: dict[str, dict[str, HostTensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise ModelError(
                f"{folder} holds the tensor {name}, which is no lora_A or lora_B of a matrix; "
                "nothing else can be adapted here."
            )
        halves.setdefault(match[1], {})[match[2]] = tensor
    if not halves:
        raise ModelError(f"{folder} adapts nothing: its {TENSORS} holds no tensor.")
    pairs: dict[str, tuple[Weight, LoraPair]] = {}
    for module, both in halves.items():
        _check(folder, module, both, settings.rank(module), by_module.get(module))
        a, scale = _packed(both["A"]), settings.scale(module)
        for binding, weight in by_module[module]:
            b = _packed(_rows_of(binding, both["B"]))
            pairs[binding.name] = weight, LoraPair(a, b, scale)
    return pairs


def _check(
    folder: Path,
    module: str,
    both: Mapping[str, HostTensor],
    r: int,
    targets: Sequence[tuple[Binding, Weight]] | None,
) -> None:
    if targets is None:
        raise ModelError(
            f"{folder} adapts {module}, which this model does not have; give an adapter that was "
            "trained on it."
        )
    if not all(_can_adapt(binding.name) for binding, _ in targets):
        raise ModelError(
            f"{folder} adapts {module}, which is not supported: only the matrices of attention and "
            "of dense MLPs and the head can be adapted."
        )
    if len(both) < 2:
        there, other = ("A", "B") if "A" in both else ("B", "A")
        raise ModelError(
            f"{folder} holds lora_{there} of {module} without its lora_{other}; save it again."
        )
    binding, weight = targets[0]
    outputs = math.prod(binding.part.of[:-1]) if binding.part else weight.shape[0]
    for half, wanted in (("A", (r, weight.shape[1])), ("B", (outputs, r))):
        tensor = both[half]
        if tensor.dtype not in _FLOATS:
            raise ModelError(
                f"{folder} holds lora_{half} of {module} as {tensor.dtype}; save it as "
                f"{', '.join(_FLOATS[:-1])} or {_FLOATS[-1]}."
            )
        if tensor.shape != wanted:
            raise ModelError(
                f"lora_{half} of {module} in {folder} has shape {list(tensor.shape)}, and rank {r} "
                f"on this model needs {list(wanted)}; give an adapter that was trained on it."
            )
        if not np.isfinite(dequantize(tensor)).all():
            raise ModelError(
                f"lora_{half} of {module} in {folder} holds NaN or infinity; train or download it "
                "again."
            )


def _can_adapt(name: str) -> bool:
    layer, _, last = name.rpartition(".")
    return name == "head" or (layer.count(".") == 1 and last in ADAPTED)


def _rows_of(binding: Binding, b: HostTensor) -> HostTensor:
    """B's rows are the matrix's: the rule takes its part of them, and puts them in order."""
    assert binding.shape is not None
    r = b.shape[1]
    part = replace(binding.part, of=(*binding.part.of[:-1], r)) if binding.part else None
    shape = binding.shape[0], r
    return replace(binding, shape=shape, part=part, transposed=False).rows(b, 0, shape[0])


def _packed(tensor: HostTensor) -> Weight:
    codes = to_codes(tensor)
    return pack_float(codes.kind, codes.values)


def _digest(pairs: Mapping[str, tuple[Weight, LoraPair]]) -> bytes:
    digest = blake2b(digest_size=32)
    for name in sorted(pairs):
        _, pair = pairs[name]
        digest.update(repr((name, pair.scale, pair.a.kind, pair.a.shape, pair.b.kind)).encode())
        for half in (pair.a, pair.b):
            digest.update(half.data.data)
    return digest.digest()
