"""read_adapter: a LoRA adapter as PEFT saves it, in the names and the order of rows of the model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from elinvar.base.digest import blake2b
from elinvar.base.errors import ModelError
from elinvar.ops.arguments import LoraPair
from elinvar.ops.layout import Weight, pack_float
from elinvar.weights.nested import text_name
from elinvar.weights.peft_config import LoraSettings
from elinvar.weights.quants import dequantize, to_codes
from elinvar.weights.rules import Binding, Rule, State, bind
from elinvar.weights.safetensors import read_file
from elinvar.weights.tensor import HostTensor

TENSORS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"

ADAPTED = frozenset(["q", "k", "v", "o", "gate", "up", "down", "q_a", "kv_a"])
"""What can be adapted of a layer (layers.{i}.q), and the head: matrices that every family multiplies
by ops.linear or ops.gated_linear."""

_FLOATS = ("F32", "F16", "BF16")
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


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
        settings = LoraSettings(folder)
        file, tensors = read_file(_tensors_path(folder))
    except OSError as error:
        raise ModelError(f"{folder} cannot be read: {error.strerror}.") from error
    try:
        pairs = _pairs(folder, settings, tensors, _by_module(rules, num_layers, weights))
    finally:
        tensors.clear()
        file.close()
    return Adapter(folder, dict(pairs.values()), _digest(pairs))


def _tensors_path(folder: Path) -> Path:
    if (folder / TENSORS).exists():
        return folder / TENSORS
    if (folder / PICKLE).exists():
        raise ModelError(
            f"{folder / PICKLE} is a pickle, which can run code when opened; save the adapter again "
            "with safe_serialization=True."
        )
    raise ModelError(f"{folder} holds no {TENSORS}; give the whole folder that PEFT saved.")


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
    settings: LoraSettings,
    tensors: Mapping[str, HostTensor],
    by_module: Mapping[str, list[tuple[Binding, Weight]]],
) -> dict[str, tuple[Weight, LoraPair]]:
    """By canonical name: the matrix, and what is added to it."""
    halves: dict[str, dict[str, HostTensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise ModelError(
                f"{folder} holds the tensor {name}, which is no lora_A or lora_B of a matrix, and "
                "nothing else is supported; save the adapter without it."
            )
        both = halves.setdefault(text_name(match[1]), {})
        if match[2] in both:
            raise ModelError(
                f"{folder} holds {name} and {both[match[2]].name}, which are one; save it again."
            )
        both[match[2]] = tensor
    if not halves:
        raise ModelError(f"{folder} adapts nothing: its {TENSORS} holds no tensor.")
    pairs: dict[str, tuple[Weight, LoraPair]] = {}
    for module, both in halves.items():
        targets = _targets(folder, module, by_module)
        _check(folder, module, both, settings.rank(module), *targets[0])
        a, scale = _packed(both["A"]), settings.scale(module)
        for binding, weight in targets:
            b = _packed(_rows_of(binding, both["B"]))
            pairs[binding.name] = weight, LoraPair(a, b, scale)
    return pairs


def _targets(
    folder: Path, module: str, by_module: Mapping[str, list[tuple[Binding, Weight]]]
) -> list[tuple[Binding, Weight]]:
    """The matrices that are adapted by adapting the module."""
    targets = by_module.get(module)
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
    return targets


def _check(
    folder: Path,
    module: str,
    both: Mapping[str, HostTensor],
    r: int,
    binding: Binding,
    weight: Weight,
) -> None:
    """Both halves are there, and have the shapes that one of the module's matrices says."""
    if len(both) < 2:
        there, other = ("A", "B") if "A" in both else ("B", "A")
        raise ModelError(
            f"{folder} holds lora_{there} of {module} without its lora_{other}; save it again."
        )
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
