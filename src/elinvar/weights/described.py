"""Checkpoints of which the weights are not here: what config.json alone says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elinvar.base.errors import ModelError
from elinvar.ops.layout import Kinds, WeightKind
from elinvar.weights.checkpoint import Checkpoint
from elinvar.weights.packfile import Entry
from elinvar.weights.rules import Rule, bind
from elinvar.weights.safetensors import read_json

_FLOATS: dict[str, WeightKind] = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def config_alone(path: Path) -> Path | None:
    """The config.json that `path` is, or that lies in the folder `path` without weights beside it."""
    if path.name == "config.json" and path.is_file():
        return path
    inside = path / "config.json"
    weights = ("*.safetensors*", "*.gguf", "*.bin")
    if inside.is_file() and not any(any(path.glob(pattern)) for pattern in weights):
        return inside
    return None


def described_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint without tensors. Raises ModelError for a file that describes no model."""
    config = read_json(path)
    named = config.get("architectures")
    if not (isinstance(named, list) and named and isinstance(named[0], str)):
        raise ModelError(f"{path} names no architecture under 'architectures'.")
    text = config.get("text_config")
    if isinstance(text, Mapping):  # a model that also sees, of which only the text is run
        outer = "architectures", "quantization_config"
        config = dict(text) | {key: config[key] for key in outer if key in config}
    return Checkpoint(path, "safetensors", named[0], config, {}, "")


def described_entries(
    checkpoint: Checkpoint, rules: Sequence[Rule], layers: int, stored: Kinds = frozenset()
) -> list[Entry]:
    """The weights that such a checkpoint's model should have, in the precision that its configuration
    names, or in kinds of `stored`. Left out is what only some checkpoints have, a bias mostly."""
    floats = checkpoint.metadata.get("dtype", checkpoint.metadata.get("torch_dtype"))
    plain = _FLOATS.get(str(floats), "bf16")
    settings = checkpoint.metadata.get("quantization_config")
    inner, only_experts = _quantised_kind(settings, plain)
    if (own := _stored_kind(settings)) is not None and own in stored:
        inner = own
    entries = []
    for binding in bind(rules, "safetensors", layers):
        if binding.shape is None or binding.optional:
            continue
        kind: Any = plain
        if len(binding.shape) == 1:
            kind = "vector"
        elif binding.name.startswith("layers.") and not binding.name.endswith("router"):
            kind = plain if only_experts and ".experts." not in binding.name else inner
        entries.append(Entry(binding.name, kind, binding.shape))
    return entries


def _quantised_kind(settings: object, plain: WeightKind) -> tuple[WeightKind, bool]:
    """What quantised matrices become (docs/design/008), and whether only those of experts are."""
    if not isinstance(settings, Mapping):
        return plain, False
    method = settings.get("quant_method")
    if method == "mxfp4":
        return "q5", True
    return ("q4" if settings.get("bits") == 4 or settings.get("load_in_4bit") else "q8"), False


def _stored_kind(settings: object) -> WeightKind | None:
    """Of ops.stored, where quantised matrices are of such a kind in the files."""
    keys = "format", "quant_algo", "quant_method"
    if not isinstance(settings, Mapping) or not any(key in settings for key in keys):
        return None
    name = next(str(settings[key]).lower() for key in keys if key in settings)
    if name.startswith(("mxfp4", "nvfp4")):
        return "mxfp4" if name.startswith("mxfp4") else "nvfp4"
    if name not in ("fp8", "fbgemm_fp8", "float-quantized"):
        return None
    block = settings.get("weight_block_size")
    return "fp8" if block is None else "fp8-blocks" if block == [128, 128] else None
