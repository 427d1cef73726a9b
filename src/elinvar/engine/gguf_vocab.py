"""Builds a tokenizer from the vocabulary in a GGUF file. Owns what GGUF's tokenizer keys mean.

Two kinds: "gpt2", a byte-level BPE with its merges in the file and the pre-tokenizer named by
tokenizer.ggml.pre; and "llama", a SentencePiece BPE that has scores instead of merges. Both become a
BPE of the `tokenizers` library. Meanings follow llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from elinvar.base.errors import ModelError
from elinvar.engine.patterns import PRE_TOKENIZERS, WHOLE_WORDS_FIRST
from elinvar.engine.vocab import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Keep,
    Parts,
    Pieces,
    add_whole_tokens,
    byte_level,
    sentencepiece,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_SCALARS: dict[type, tuple[str, ...]] = {
    str: ("ggml.model", "ggml.pre", "chat_template", "chat_template.tool_use"),
    bool: ("ggml.add_bos_token", "ggml.add_space_prefix"),
    int: tuple(
        f"ggml.{name}_token_id" for name in ("bos", "eos", "eot", "eom", "unknown", "padding")
    ),
}


def check_keys(metadata: Mapping[str, Any]) -> None:
    """Raises ModelError for a key of the tokenizer whose value is of another type."""
    for kind, names in _SCALARS.items():
        for key in (f"tokenizer.{name}" for name in names):
            value = metadata.get(key)
            if value is not None and type(value) is not kind:
                raise ModelError(
                    f"The GGUF file is inconsistent: {key} is of type {type(value).__name__}, not "
                    f"{kind.__name__}."
                )


def gguf_parts(metadata: Mapping[str, Any], fingerprint: str, keep: Keep) -> Parts:
    """The tokenizer of a GGUF file. Raises ModelError when there is none, or one of an unknown kind
    or inconsistent."""
    check_keys(metadata)
    backend = keep(fingerprint, lambda: build_backend(metadata))
    sentencepiece = metadata.get("tokenizer.ggml.model") == "llama"
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if sentencepiece else {}
    ids: dict[str, int] = {}
    spelled: dict[str, str] = {}
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        token_id = metadata.get(f"tokenizer.ggml.{name}_token_id", defaults.get(name))
        if token_id is not None and 0 <= token_id < backend.get_vocab_size():
            ids[name], spelled[name] = token_id, backend.id_to_token(token_id) or ""
    bos_by_default = sentencepiece or metadata.get("tokenizer.ggml.pre") in WHOLE_WORDS_FIRST
    add_bos = "bos" in ids and metadata.get("tokenizer.ggml.add_bos_token", bos_by_default)
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    templates = {
        name: metadata[key]
        for name, key in (
            ("default", "tokenizer.chat_template"),
            ("tool_use", "tokenizer.chat_template.tool_use"),
        )
        if metadata.get(key) is not None
    }
    prefix = [ids["bos"]] if add_bos else []
    return Parts(
        backend,
        bos_id=ids.get("bos"),
        eos_ids=[ids[name] for name in ("eos", "eot", "eom") if name in ids],
        prefix_ids=prefix,
        # As llama.cpp reads add_bos_token: chats begin with BOS as other texts do.
        chat_prefix_ids=prefix,
        variables={key: spelled[name] for name, key in names.items() if name in spelled},
        templates=templates,
    )


def build_backend(metadata: Mapping[str, Any]) -> Backend:
    """The tokenizer that the key-values of a GGUF file describe (without BOS handling).

    `metadata` has passed check_keys. Raises ModelError when there is no tokenizer, or one of an
    unknown kind or inconsistent."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None or "tokenizer.ggml.tokens" not in metadata:
        raise ModelError(
            "The GGUF file holds no tokenizer (tokenizer.ggml.model and tokenizer.ggml.tokens are "
            "missing); convert the model again with its tokenizer."
        )
    tokens = _texts(metadata, "tokenizer.ggml.tokens")
    types = _per_token(metadata, "tokenizer.ggml.token_type", len(tokens), NORMAL)
    if kind == "gpt2":
        backend = _byte_level(metadata, tokens)
    elif kind == "llama":
        backend = _sentencepiece(metadata, tokens, types)
    else:
        raise ModelError(
            f"The tokenizer kind {kind!r} of the GGUF file is not supported; 'gpt2' (byte-level "
            "BPE) and 'llama' (SentencePiece BPE) are."
        )
    add_whole_tokens(
        backend,
        [
            (token, kind != USER_DEFINED)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (CONTROL, USER_DEFINED, UNKNOWN) and token
        ],
    )
    return backend


def _per_token(metadata: Mapping[str, Any], key: str, count: int, default: int) -> list[Any]:
    """An array with one number a token, as a list."""
    if key not in metadata:
        return [default] * count
    values = np.asarray(metadata[key])
    if values.shape != (count,) or values.dtype.kind not in "iuf":
        raise ModelError(f"The GGUF file is inconsistent: {key} is not one number a token.")
    return values.tolist()


def _texts(metadata: Mapping[str, Any], key: str) -> list[str]:
    values = metadata[key]
    if isinstance(values, Sequence) and not isinstance(values, str):
        texts = [value for value in values if isinstance(value, str)]
        if len(texts) == len(values):
            return texts
    raise ModelError(f"The GGUF file is inconsistent: {key} is not a list of texts.")


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> Backend:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    expressions = PRE_TOKENIZERS.get(pre)
    if expressions is None:
        raise ModelError(
            f"The pre-tokenizer {pre!r} of the GGUF file is not known; known are "
            f"{', '.join(PRE_TOKENIZERS)}."
        )
    if "tokenizer.ggml.merges" not in metadata:
        raise ModelError("The GGUF file's tokenizer has no merges (tokenizer.ggml.merges).")
    # A merge is "left right"; the left part is at least one character, which may be a space.
    merges = [
        (merge[: at + 1], merge[at + 2 :])
        for merge in _texts(metadata, "tokenizer.ggml.merges")
        for at in (merge.find(" ", 1) - 1,)
    ]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return byte_level(vocabulary, merges, expressions, pre in WHOLE_WORDS_FIRST)


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: Sequence[int]) -> Backend:
    return sentencepiece(
        Pieces(
            tokens,
            _per_token(metadata, "tokenizer.ggml.scores", len(tokens), 0),
            types,
            unknown_id=metadata.get("tokenizer.ggml.unknown_token_id", 0),
            space_prefix=metadata.get("tokenizer.ggml.add_space_prefix", True),
        )
    )
