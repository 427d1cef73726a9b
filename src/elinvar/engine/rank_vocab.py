"""Reads vocabularies that are lists of byte strings with ranks: tiktoken's files and Mistral's
tekken.json. Owns which control tokens such families add when no other file lists them."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elinvar.base.errors import ModelError

_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d{1,9})\s*")

QWEN_CONTROL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *(f"<|extra_{i}|>" for i in range(205)),
)
"""Qwen 1 lists them in code only; they follow the ranks."""

_TEKKEN_CONTROL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]"),
    *("[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    "[TOOL_CONTENT]",
)
"""What tekken.json's first versions leave out."""


@dataclass(frozen=True, slots=True)
class Tekken:
    """What tekken.json holds."""

    ranks: dict[bytes, int]
    """Ids without the control tokens, which come before them."""
    control: Sequence[str]
    pattern: str


def is_ranks(raw: bytes) -> bool:
    """Whether a file begins as tiktoken's do."""
    return _LINE.match(raw) is not None


def read_ranks(path: Path, raw: bytes) -> dict[bytes, int]:
    """A tiktoken file: per line a byte string in base64, and its rank."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(raw.splitlines(), 1):
        match = _LINE.fullmatch(line)
        if match is None and line.strip():
            raise ModelError(
                f"{path}, line {number}, is not a token and its rank; download it again."
            )
        if match is not None:
            ranks[_decoded(path, match[1])] = int(match[2])
    return _checked(path, ranks)


def read_tekken(path: Path, settings: Mapping[str, Any]) -> Tekken:
    """tekken.json; of its vocabulary only the first `default_vocab_size` ids are the model's."""
    config = settings.get("config")
    if not isinstance(config, dict) or not isinstance(settings.get("vocab"), list):
        raise ModelError(f"{path} has no config and vocab; download it again.")
    size, reserved = (config.get(f"default_{key}") for key in ("vocab_size", "num_special_tokens"))
    pattern = config.get("pattern")
    if type(size) is not int or type(reserved) is not int or not isinstance(pattern, str):
        raise ModelError(f"{path} does not say its pattern and sizes; download it again.")
    listed = settings.get("special_tokens") or [{"token_str": token} for token in _TEKKEN_CONTROL]
    names = [str(entry.get("token_str")) for entry in listed if isinstance(entry, dict)]
    names += [f"<SPECIAL_{i}>" for i in range(len(names), min(reserved, size))]
    if len(names) != reserved or len(set(names)) != reserved:
        raise ModelError(f"{path} has control tokens twice or too many; download it again.")
    ranks = {
        _decoded(path, entry.get("token_bytes") if isinstance(entry, dict) else None): i
        for i, entry in enumerate(settings["vocab"][: max(size - reserved, 0)])
    }
    return Tekken(_checked(path, ranks), names, pattern)


def _decoded(path: Path, text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, TypeError) as error:
        raise ModelError(f"{path} has a token that is not base64; download it again.") from error


def _checked(path: Path, ranks: dict[bytes, int]) -> dict[bytes, int]:
    """Every byte must be a token and every id belong to one, else some texts have no tokens."""
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ModelError(f"{path} has no token for the byte {missing[0]:#04x}; download it again.")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ModelError(f"{path} gives a rank twice or leaves one out; download it again.")
    return ranks
