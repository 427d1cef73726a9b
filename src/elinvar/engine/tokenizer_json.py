"""What a tokenizer.json may hold that the tokenizers library does not look at. A module of its own, since
only folders have one, and msgspec costs memory."""

from __future__ import annotations

from typing import Any

import msgspec


class _Model(msgspec.Struct):
    type: str | None = None
    continuing_subword_prefix: str | None = None
    unk_id: int | None = None


class _Described(msgspec.Struct):
    """The parts of a tokenizer.json that the library trusts without looking."""

    model: _Model
    post_processor: Any = None


def check(raw: bytes) -> None:
    """Raises ValueError for what makes the library panic, or end the process; msgspec.DecodeError where raw
    is no JSON."""
    described = msgspec.json.decode(raw, type=_Described)
    model = described.model
    if model.continuing_subword_prefix and model.type != "WordPiece":
        raise ValueError("its continuing_subword_prefix is only known of WordPiece")
    if model.type == "Unigram" and model.unk_id is None:
        raise ValueError("its Unigram model has no unk_id, and some texts would have no tokens")
    steps = [described.post_processor]
    while steps:
        step = steps.pop()
        if not isinstance(step, dict):
            continue
        steps += step.get("processors") or []
        known = step.get("special_tokens") or {}
        for entry in (*(step.get("single") or ()), *(step.get("pair") or ())):
            token = entry.get("SpecialToken", {}).get("id") if isinstance(entry, dict) else None
            if token is not None and token not in known:
                raise ValueError(f"its post_processor writes {token!r}, which it does not describe")
