"""Makes tokenizers of the `tokenizers` library from plain vocabularies. Owns how merges follow from
scores or ranks; what the vocabularies are read from is up to gguf_vocab, spm_vocab and rank_vocab."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from elinvar.base.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from tokenizers.normalizers import Normalizer

SPACE = "▁"
"""Stands for a space in SentencePiece vocabularies."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces, numbered so by SentencePiece and by GGUF (tokenizer.ggml.token_type)."""

_MAX_PIECE = 1024

CHARACTER_BYTES = {
    # GPT-2's alphabet: printable bytes stand for themselves, the others follow from U+0100 on.
    chr(code): byte
    for code, byte in (
        *((b, b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))),
        *((256 + i, b) for i, b in enumerate((*range(33), *range(127, 161), 173))),
    )
}
BYTE_CHARACTERS = {byte: character for character, byte in CHARACTER_BYTES.items()}


@dataclass(frozen=True, slots=True)
class Parts:
    """What a model's files say of its tokenizer."""

    backend: Backend
    bos_id: int | None
    eos_ids: Iterable[int]
    prefix_ids: Sequence[int]
    """What comes before every plain text, usually BOS or nothing."""
    chat_prefix_ids: Sequence[int]
    """What comes before a rendered chat that does not begin with it."""
    variables: Mapping[str, str]
    """Tokens that a chat template may write (bos_token, eos_token, ...)."""
    templates: Mapping[str, str]
    """Chat templates by name: `default`, and perhaps `tool_use`."""


Keep = Callable[[str, "Callable[[], Backend]"], "Backend"]
"""keep(key, build): what `build` makes, kept between runs where there is a cache."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """A SentencePiece BPE vocabulary: per id its text, score and type."""

    tokens: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    unknown_id: int = 0
    space_prefix: bool = True
    """A space is put before the text."""
    squeeze: bool = False
    """Spaces at the ends go, and runs of them become one."""
    charsmap: bytes = b""
    """SentencePiece's compiled normalisation, empty for none. The library applies it to each
    grapheme, where SentencePiece looks for the longest match: they differ for rare marks."""


def byte_level(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    expressions: Sequence[str],
    whole_words_first: bool,
) -> Backend:
    """Byte-level BPE; tokens are spelled in GPT-2's alphabet. Raises ModelError when the merges do
    not fit the vocabulary or an expression is none."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    with _building():
        model = models.BPE(dict(vocabulary), list(merges), ignore_merges=whole_words_first)
        steps = [pre_tokenizers.Split(Regex(e), "isolated") for e in expressions]
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def from_ranks(
    ranks: Mapping[bytes, int], expressions: Sequence[str], before: Sequence[str] = ()
) -> Backend:
    """Byte-level BPE from tiktoken's ranks: joins go by the rank of what they make, and a word that
    is a token is never cut. `before`: control tokens whose ids come before the ranks."""
    spelled = {"".join(BYTE_CHARACTERS[b] for b in token): rank for token, rank in ranks.items()}
    merges = merges_from_scores((token, -rank) for token, rank in spelled.items())
    vocabulary = {token: i for i, token in enumerate(before)}
    vocabulary |= {token: rank + len(before) for token, rank in spelled.items()}
    backend = byte_level(vocabulary, merges, expressions, whole_words_first=True)
    add_whole_tokens(backend, [(token, True) for token in before])
    return backend


@contextmanager
def _building() -> Iterator[None]:
    """What the library says of a vocabulary that contradicts itself, as one sentence."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ModelError(f"The tokenizer cannot be built from its vocabulary: {reason}.") from error


def sentencepiece(pieces: Pieces) -> Backend:
    """A SentencePiece BPE as one with merges."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers

    tokens, unknown = pieces.tokens, pieces.unknown_id
    mergeable = (
        (token, score)
        for token, score, kind in zip(tokens, pieces.scores, pieces.types, strict=True)
        if kind in (NORMAL, UNUSED)
    )
    merges = merges_from_scores(mergeable)
    steps: list[Normalizer] = []
    with _building():
        model = models.BPE(
            {token: i for i, token in enumerate(tokens)},
            merges,
            unk_token=tokens[unknown] if 0 <= unknown < len(tokens) else None,
            fuse_unk=True,
            byte_fallback=True,
        )
        if pieces.charsmap:
            steps.append(normalizers.Precompiled(pieces.charsmap))
    backend = Tokenizer(model)
    if pieces.squeeze:
        ends = normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), "")
        steps += [ends, normalizers.Replace(Regex(" +"), " ")]
    if pieces.space_prefix:
        steps.append(normalizers.Prepend(SPACE))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
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
        raise ModelError(f"The tokenizer has a piece of {len(piece)} characters.")
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


def add_whole_tokens(backend: Backend, tokens: Iterable[tuple[str, bool]]) -> None:
    """Tokens (text, whether it is a control token) that are found in the raw text before anything
    else."""
    from tokenizers import AddedToken

    added = [AddedToken(token, special=special, normalized=False) for token, special in tokens]
    backend.add_tokens(added)
