"""What a model's files say about it, for `elinvar models show`."""

from __future__ import annotations

import json
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from elinvar.base.config import DeltaConfig
from elinvar.base.errors import ModelError
from elinvar.cli.options import format_size
from elinvar.engine.dialects.detect import dialect_for
from elinvar.engine.encodings import encoder_backend
from elinvar.engine.tokenizer import Tokenizer, load_tokenizer
from elinvar.models.load import mtp_heads
from elinvar.models.registry import find_encoder, find_family, read_config
from elinvar.weights.cache import cache_root
from elinvar.weights.checkpoint import Checkpoint, open_checkpoint
from elinvar.weights.safetensors import read_json

_SAMPLING = "general.sampling."


def describe_model(path: Path) -> dict[str, Any]:
    """Architecture, shape, tensor types, tokenizer and generation_config, as plain data.

    A model that cannot be run is described all the same; `problems` then says why."""
    checkpoint = open_checkpoint(path)
    problems: list[str] = []
    facts: dict[str, Any] = {"architecture": checkpoint.architecture, "format": checkpoint.format}
    try:
        facts["family"] = (find_encoder(checkpoint) or find_family(checkpoint)).name
        facts["config"] = _config(checkpoint)
        facts["mtp_heads"] = mtp_heads(checkpoint)
    except ModelError as error:
        problems.append(str(error))
    facts["parameters"] = sum(prod(tensor.shape) for tensor in checkpoint.tensors.values())
    facts["tensor_types"] = _tensor_types(checkpoint)
    try:
        if find_encoder(checkpoint):
            backend = encoder_backend(checkpoint)
            kind = type(backend.model).__name__
            facts["tokenizer"] = {"kind": kind, "vocab_size": backend.get_vocab_size()}
        else:
            tokenizer = load_tokenizer(checkpoint, cache_root())
            facts["tokenizer"] = _tokenizer(tokenizer)
            if tokenizer.chat_template is not None:
                facts["dialect"] = dialect_for(tokenizer, checkpoint.architecture).name
    except ModelError as error:
        problems.append(str(error))
    facts["generation_config"] = _generation_config(checkpoint)
    facts["problems"] = problems
    checkpoint.close()
    return facts


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    config = asdict(read_config(checkpoint))
    kinds = config.pop("layer_kinds")
    config["layer_kinds"] = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    return config


def _states(config: dict[str, Any]) -> list[tuple[str, str]]:
    """What recurrent layers keep of a sequence."""
    if config["delta"] is None:
        return []
    c, count = DeltaConfig(**config["delta"]), config["layer_kinds"]["linear"]
    heads = f"{c.heads} heads of {c.key_dim} x {c.value_dim}"
    size = format_size(4 * c.state_floats * count)
    return [("states", f"{heads}: {size} a sequence or snapshot, whatever its length")]


def _tensor_types(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    """Number of tensors and bytes by type, the heaviest first."""
    types: dict[str, dict[str, int]] = {}
    for tensor in checkpoint.tensors.values():
        entry = types.setdefault(tensor.dtype, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.nbytes
    return dict(sorted(types.items(), key=lambda item: -item[1]["bytes"]))


def _tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    bos = tokenizer.bos_id
    return {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "bos": None if bos is None else tokenizer.token_text(bos),
        "adds_bos": bool(tokenizer.encode("")),
        "end_tokens": [tokenizer.token_text(i) for i in sorted(tokenizer.eos_ids)],
        "chat_template": tokenizer.chat_template is not None,
    }


def _generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the model's authors suggest for sampling. Elinvar shows it and never applies it."""
    if checkpoint.format == "gguf":
        found = checkpoint.metadata.items()
        return {k.removeprefix(_SAMPLING): v for k, v in found if k.startswith(_SAMPLING)}
    path = checkpoint.path / "generation_config.json"
    return read_json(path) if path.exists() else {}


def readable(facts: dict[str, Any]) -> str:
    """The facts as lines of a name and a value."""
    lines: list[tuple[str, str]] = []
    if "source" in facts:
        lines.append(("source", f"{facts['source']} {facts['revision']}, {facts['pulled']}"))
    lines.append(("path", facts["path"]))
    family = f" (family {facts['family']})" if "family" in facts else ""
    lines.append(("architecture", f"{facts['architecture']}{family}, {facts['format']}"))
    lines.append(("parameters", f"{facts['parameters'] / 1e6:,.1f} M"))
    if config := facts.get("config"):
        kinds = ", ".join(f"{count} {kind}" for kind, count in config["layer_kinds"].items())
        window = f", window {config['window']}" if config["window"] else ""
        heads = f"{config['num_heads']} heads of {config['head_dim']}"
        lines += [
            ("context", f"{config['max_context']:,} tokens"),
            ("layers", f"{config['num_layers']} ({kinds}{window})"),
            ("width", f"{config['dim']}, MLP {config['ff_dim']} ({config['activation']})"),
            ("attention", f"{heads}, {config['num_kv_heads']} for keys and values"),
        ]
        lines += _states(config)
        ropes = [f"{r['base']:g} ({k})" for k, r in config["rope"].items() if r["dim"]]
        lines.append(("RoPE base", ", ".join(ropes) or "none"))
        if encoder := config["encoder"]:
            labels = encoder["num_labels"]
            scores = f"scores of {labels} label{'s' * (labels > 1)}"
            lines.append(("makes", scores if labels else "vectors of texts"))
    if drafts := facts.get("mtp_heads"):
        lines.append(("drafts", f"{drafts} MTP {'head' if drafts == 1 else 'heads'}"))
    for name, entry in facts["tensor_types"].items():
        size = format_size(entry["bytes"])
        lines.append((f"in {name}", f"{size} ({entry['tensors']} of the tensors)"))
    tokenizer = facts.get("tokenizer", {})
    if "kind" in tokenizer:
        lines.append(("tokenizer", f"{tokenizer['kind']}, {tokenizer['vocab_size']:,} tokens"))
    if "end_tokens" in tokenizer:
        bos = "added" if tokenizer["adds_bos"] else "not added"
        template = "yes" if tokenizer["chat_template"] else "none (use completions)"
        lines += [
            ("BOS", f"{tokenizer['bos']} ({bos})" if tokenizer["bos"] else "none"),
            ("ends with", " ".join(tokenizer["end_tokens"]) or "nothing"),
            ("chat template", template),
        ]
    if "dialect" in facts:
        lines.append(("dialect", f"{facts['dialect']} (of tool calls and thoughts)"))
    for name, value in facts["generation_config"].items():
        lines.append((name, f"{json.dumps(value, default=list)} (generation_config, not applied)"))
    lines += [("problem", problem) for problem in facts["problems"]]
    return "\n".join(f"{name:<14} {value}" for name, value in lines)
