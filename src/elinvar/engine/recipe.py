"""What the files of sentence-transformers say of a model: how vectors are made of its layers' ones,
which prompts belong before texts, and how long those may be. Without such files, what is usual."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from elinvar.base.config import ModelConfig
from elinvar.base.errors import ModelError
from elinvar.models.keys import Keys
from elinvar.nn.pooling import After, Dense, Normalize, PoolingMode
from elinvar.ops.api import Ops
from elinvar.ops.layout import pack_float
from elinvar.weights.checkpoint import Checkpoint
from elinvar.weights.quants import dequantize
from elinvar.weights.safetensors import read_json, read_safetensors

_MODES: tuple[PoolingMode, ...] = get_args(PoolingMode)
_SAID = {
    **dict(zip(("cls_token", "max_tokens", "mean_tokens"), _MODES, strict=False)),
    **dict(zip(("mean_sqrt_len_tokens", "weightedmean_tokens"), _MODES[3:], strict=False)),
    "lasttoken": "lasttoken",
}
"""pooling_mode_... of older files."""
_GGUF_POOLING: dict[Any, PoolingMode] = {1: "mean", 2: "cls", 3: "lasttoken"}
_TANH, _IDENTITY = "torch.nn.modules.activation.Tanh", "torch.nn.modules.linear.Identity"
_SIGMOID = "torch.nn.modules.activation.Sigmoid"


@dataclass(frozen=True, slots=True)
class Recipe:
    modes: tuple[PoolingMode, ...]
    after: tuple[After, ...]
    max_tokens: int
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    lower_case: bool = False
    dot: bool = False
    """Vectors are compared by their product, not by their angle."""
    sigmoid: bool = True
    """Over the score of a reranker."""
    matryoshka: bool = False
    """The model was trained so that the first numbers of a vector are one, too (Kusupati et al., 2022)."""
    note: str | None = None
    """What was assumed."""


def read_recipe(checkpoint: Checkpoint, config: ModelConfig, ops: Ops) -> Recipe:
    """Raises ModelError for a module that is not known here, or a file that is broken."""
    if checkpoint.format == "gguf":
        return _from_gguf(checkpoint, config, ops)
    folder = checkpoint.path
    longest = _max_tokens(folder, config)
    lower_case = _keys(folder / "sentence_bert_config.json").flag("do_lower_case", False)
    if config.encoder is not None and config.encoder.num_labels:
        sigmoid = _sigmoid(folder, checkpoint.metadata)
        return Recipe(("cls",), (), longest, lower_case=lower_case, sigmoid=sigmoid)
    modules = _modules(folder) if (folder / "modules.json").exists() else []
    if not modules or modules[-1][0] == "LogitScore":  # of a decoder that says yes or no
        mode: PoolingMode = "lasttoken" if config.encoder is None else "mean"
        return Recipe((mode,), (Normalize(ops),), longest, note=_note(folder, mode))
    modes: tuple[PoolingMode, ...] | None = None
    after: list[After] = []
    for name, path in modules:
        if name == "Pooling" and modes is None:
            modes = _pooling(path)
        elif name == "Dense" and modes:
            after.append(_dense(path, ops))
        elif name == "Normalize" and modes:
            after.append(Normalize(ops))
        elif name != "Transformer":
            raise ModelError(
                f"{folder / 'modules.json'} names a module {name}, and only Transformer, Pooling, "
                "Dense and Normalize, in this order, are supported; use another model."
            )
    if modes is None:
        raise ModelError(f"{folder / 'modules.json'} names no Pooling; it makes no vectors.")
    keys = _keys(folder / "config_sentence_transformers.json")
    prompts = keys.raw("prompts") or {}
    if not isinstance(prompts, Mapping) or not all(isinstance(p, str) for p in prompts.values()):
        raise keys.bad("prompts", "an object of texts")
    default = keys.raw("default_prompt_name")
    if default is not None and default not in prompts:
        raise keys.bad("default_prompt_name", "the name of a prompt")
    keys.only("similarity_fn_name", "cosine", "dot")
    return Recipe(
        modes,
        tuple(after),
        longest,
        prompts,
        default,
        lower_case,
        keys.raw("similarity_fn_name") == "dot",
        matryoshka=any(
            checkpoint.metadata.get(key) for key in ("is_matryoshka", "matryoshka_dimensions")
        ),
    )


def _sigmoid(folder: Path, metadata: Mapping[str, Any]) -> bool:
    """Whether the score of a reranker goes through a sigmoid, as it does where nothing is said; three
    generations of sentence-transformers have said it in three places."""
    keys = Keys(metadata, str(folder / "config.json"))
    for key, where in (
        ("activation_fn", _keys(folder / "config_sentence_transformers.json")),
        ("activation_fn", keys.part("sentence_transformers")),
        ("sbert_ce_default_activation_function", keys),
    ):
        where.only(key, _SIGMOID, _IDENTITY)
        if where.has(key):
            return bool(where.raw(key) == _SIGMOID)
    return True


def _note(where: Path, mode: PoolingMode) -> str:
    what = "the last token's vector" if mode == "lasttoken" else "the mean of all tokens' vectors"
    return f"{where} does not say how vectors are made: each is {what}, normalised."


def _from_gguf(checkpoint: Checkpoint, config: ModelConfig, ops: Ops) -> Recipe:
    said = checkpoint.metadata.get(f"{checkpoint.architecture}.pooling_type")
    usual: PoolingMode = "lasttoken" if config.encoder is None else "mean"
    mode = _GGUF_POOLING.get(said, usual)
    note = None if said in _GGUF_POOLING else _note(checkpoint.path, mode)
    return Recipe((mode,), (Normalize(ops),), config.max_context, note=note)


def _keys(path: Path) -> Keys:
    return Keys(read_json(path) if path.exists() else {}, str(path))


def _max_tokens(folder: Path, config: ModelConfig) -> int:
    """As sentence-transformers: its own file's number, else the tokenizer's; never beyond the model."""
    own = _keys(folder / "sentence_bert_config.json")
    if own.has("max_seq_length"):
        return min(own.size("max_seq_length"), config.max_context)
    said = _keys(folder / "tokenizer_config.json").raw("model_max_length")
    number = isinstance(said, int | float) and math.isfinite(said) and said >= 1
    return min(int(said), config.max_context) if number else config.max_context


def _modules(folder: Path) -> Sequence[tuple[str, Path]]:
    """The last part of each module's class, and its folder."""
    path = folder / "modules.json"
    try:
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON; download it again.") from error
    found = []
    for entry in entries if isinstance(entries, list) else [None]:
        kind, where = (entry.get(k) if isinstance(entry, dict) else None for k in ("type", "path"))
        if not isinstance(kind, str) or not isinstance(where, str) or ".." in Path(where).parts:
            raise ModelError(f"{path} is no list of modules; download it again.")
        found.append((kind.rpartition(".")[2], folder / where.lstrip("/")))
    return found


def _pooling(folder: Path) -> tuple[PoolingMode, ...]:
    keys = Keys(read_json(folder / "config.json"), str(folder / "config.json"))
    keys.only("include_prompt", True)
    said = keys.raw("pooling_mode")
    if said is None:
        said = [mode for k, mode in _SAID.items() if keys.flag(f"pooling_mode_{k}", False)]
    names = [said] if isinstance(said, str) else said
    if not isinstance(names, list) or not all(n in _MODES for n in names):
        raise keys.bad("pooling_mode", f"one of {', '.join(_MODES)}, or several")
    return tuple(names) or ("mean",)


def _dense(folder: Path, ops: Ops) -> Dense:
    keys = Keys(read_json(folder / "config.json"), str(folder / "config.json"))
    keys.only("activation_function", _TANH, _IDENTITY)
    keys.only("use_residual", False)
    keys.only("module_input_name", "sentence_embedding")
    files, tensors = read_safetensors(folder)
    shape = keys.size("out_features"), keys.size("in_features")
    weight, bias = tensors.get("linear.weight"), tensors.get("linear.bias")
    if weight is None or weight.shape != shape or (bias and bias.shape != shape[:1]):
        raise ModelError(f"{folder} does not hold linear.weight of shape {list(shape)}.")
    dense = Dense(
        pack_float("f32", dequantize(weight)),
        None if bias is None else dequantize(bias),
        keys.raw("activation_function") != _IDENTITY,
        ops,
    )
    tensors.clear()
    for file in files:
        file.close()
    return dense
