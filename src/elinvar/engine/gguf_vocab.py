"""Builds a tokenizer from the vocabulary in a GGUF file. Owns what GGUF's tokenizer keys mean.

Two kinds: "gpt2", a byte-level BPE with its merges in the file and the pre-tokenizer named by
tokenizer.ggml.pre; and "llama", a SentencePiece BPE that has scores instead of merges. Both become a
BPE of the `tokenizers` library. Meanings follow llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from elinvar.base.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

SPACE = "▁"
"""Stands for a space in SentencePiece vocabularies."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""tokenizer.ggml.token_type."""

_MAX_PIECE = 1024

_GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
"""Expressions that cut a text into words, each applied to the pieces of the one before."""

_WHOLE_WORDS_FIRST = {"llama-bpe", "llama3", "llama-v3", "tekken"}
"""Pre-tokenizers of vocabularies in which a word that is a token is never cut by merges."""


_SCALARS: dict[type, tuple[str, ...]] = {
    str: ("ggml.model", "ggml.pre", "chat_template"),
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
    _add_whole_tokens(backend, tokens, types)
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
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

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
    try:
        model = models.BPE(vocabulary, merges, ignore_merges=pre in _WHOLE_WORDS_FIRST)
    except Exception as error:
        raise ModelError(f"The GGUF file's merges do not fit its tokens: {error}.") from error
    backend = Tokenizer(model)
    steps = [pre_tokenizers.Split(Regex(e), "isolated") for e in expressions]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: Sequence[int]) -> Backend:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _per_token(metadata, "tokenizer.ggml.scores", len(tokens), 0)
    mergeable = [
        (token, score)
        for token, score, kind in zip(tokens, scores, types, strict=True)
        if kind in (NORMAL, UNUSED)
    ]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    model = models.BPE(
        {token: i for i, token in enumerate(tokens)},
        merges_from_scores(mergeable),
        unk_token=tokens[unknown] if 0 <= unknown < len(tokens) else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Tokenizer(model)
    replace = normalizers.Replace(" ", SPACE)
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefixed else replace
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


def merges_from_scores(pieces: Iterable[tuple[str, float]]) -> list[tuple[str, str]]:
    """The merges, best first, that make BPE equal to SentencePiece's greedy merging by score.

    SentencePiece joins the neighbours whose concatenation is the piece with the best score, the
    leftmost first, until none is left. While a piece arises in a text, nothing outside it takes
    part, so its last join is the same in every text: the one found by encoding the piece alone.
    One merge a piece is therefore enough (half of all pairs that spell a piece in Gemma's
    vocabulary), and a piece that does not arise from itself never arises.
    """
    ranked = sorted(dict(pieces).items(), key=lambda piece: -piece[1])
    ranks = {piece: rank for rank, (piece, _) in enumerate(ranked)}
    merges = []
    for piece in ranks:
        last = (piece[0], piece[1]) if len(piece) == 2 else _last_join(piece, ranks)
        if last and last[0] in ranks and last[1] in ranks:
            merges.append(last)
    return merges


def _last_join(piece: str, ranks: Mapping[str, int]) -> tuple[str, str] | None:
    """The pair that remains before a piece is whole; None when it never becomes whole."""
    if len(piece) > _MAX_PIECE:
        raise ModelError(f"The GGUF file's tokenizer has a piece of {len(piece)} characters.")
    parts, get, none = list(piece), ranks.get, len(ranks)
    joined = [get(a + b, none) for a, b in pairwise(parts)]
    while len(joined) > 1:
        best = min(joined)
        if best == none:
            return None
        at = joined.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del joined[at]
        if at:
            joined[at - 1] = get(parts[at - 1] + parts[at], none)
        if at < len(joined):
            joined[at] = get(parts[at] + parts[at + 1], none)
    return (parts[0], parts[1]) if joined else None


def _add_whole_tokens(backend: Backend, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Tokens that are found in the raw text before anything else: control and user-defined."""
    from tokenizers import AddedToken

    backend.add_tokens(
        [
            AddedToken(token, special=kind != USER_DEFINED, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (CONTROL, USER_DEFINED, UNKNOWN) and token
        ]
    )
