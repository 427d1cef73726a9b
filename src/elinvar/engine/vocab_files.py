"""The vocabulary files of a Hugging Face folder. Owns which of them is read, and what each becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from elinvar.base.digest import blake2b
from elinvar.base.errors import ModelError
from elinvar.engine.patterns import CLASSES, PRE_TOKENIZERS
from elinvar.engine.rank_vocab import is_ranks, read_ranks, read_tekken
from elinvar.engine.spm_vocab import read_pieces
from elinvar.engine.vocab import (
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    Keep,
    Pieces,
    add_whole_tokens,
    byte_level,
    from_ranks,
    sentencepiece,
)
from elinvar.weights.safetensors import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_NAMES = ("tekken.json", "tiktoken.model", "tokenizer.model", "spiece.model")
_VERSION = 1
"""Of what is built: a kept tokenizer of another version is not used."""


def from_json(path: Path) -> Backend:
    """tokenizer.json, the library's own format."""
    from tokenizers import Tokenizer as Backend

    from elinvar.engine.tokenizer_json import check

    raw = _read(path)
    try:
        check(raw)
        backend = Backend.from_str(raw.decode())
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ModelError(f"{path} cannot be read: {reason}.") from error
    # A tokenizer may come with truncation or padding switched on, for training.
    backend.no_truncation()
    backend.no_padding()
    return backend


def from_vocabulary(folder: Path, kind: str, listed: Mapping[int, str], keep: Keep) -> Backend:
    """The tokenizer of a family that publishes its vocabulary alone; `kind` is the name of the class
    that reads it elsewhere, and `listed` what the settings call a token. Raises ModelError when there
    is none."""
    ranks = sorted(path.name for path in folder.glob("*.tiktoken"))
    paths = [folder / name for name in (*_NAMES, *ranks, "vocab.json")]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise ModelError(
            f"{folder} holds no tokenizer: tokenizer.json was looked for, and tekken.json, "
            "tokenizer.model, *.tiktoken, and vocab.json with merges.txt."
        )
    files = [path, folder / "merges.txt"] if path.name == "vocab.json" else [path]
    contents = [_read(file) for file in files]
    digest = blake2b(digest_size=32)
    for part in (f"{_VERSION} {path.name} {kind} {sorted(listed.items())}".encode(), *contents):
        digest.update(len(part).to_bytes(8, "little") + part)
    return keep(digest.hexdigest(), _builder(path, contents, kind, listed))


def _builder(
    path: Path, contents: list[bytes], kind: str, listed: Mapping[int, str]
) -> Callable[[], Backend]:
    if path.name == "tekken.json":
        return lambda: _from_tekken(path)
    if path.name == "vocab.json":
        return lambda: _from_merges(path, contents[1], kind)
    if is_ranks(contents[0]):
        return lambda: from_ranks(read_ranks(path, contents[0]), _expressions(path, kind))
    return lambda: _from_pieces(read_pieces(path, contents[0]), listed)


def _from_tekken(path: Path) -> Backend:
    tekken = read_tekken(path, read_json(path))
    return from_ranks(tekken.ranks, [tekken.pattern], tekken.control)


def _from_merges(path: Path, merges: bytes, kind: str) -> Backend:
    """GPT-2's pair of files. The first line of merges.txt may say its version."""
    vocabulary = read_json(path)
    if not all(type(i) is int and i >= 0 for i in vocabulary.values()):
        raise ModelError(f"{path} is not a list of tokens with their ids; download it again.")
    lines = merges.decode("utf-8", "replace").split("\n")
    pairs = [line.rstrip("\r").split(" ") for line in lines if not line.startswith("#version")]
    joins = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]
    return byte_level(vocabulary, joins, _expressions(path, kind), whole_words_first=False)


def _from_pieces(pieces: Pieces, listed: Mapping[int, str]) -> Backend:
    """Pieces that the settings call otherwise were left free for control tokens (InternLM2)."""
    tokens, types = list(pieces.tokens), list(pieces.types)
    for i, token in listed.items():
        if i < len(tokens) and token not in tokens:
            tokens[i], types[i] = token, CONTROL
    pieces = replace(pieces, tokens=tokens, types=types)
    backend = sentencepiece(pieces)
    whole = (CONTROL, USER_DEFINED, UNKNOWN)
    found = zip(pieces.tokens, pieces.types, strict=True)
    add_whole_tokens(backend, [(t, kind != USER_DEFINED) for t, kind in found if kind in whole])
    return backend


def _expressions(path: Path, kind: str) -> tuple[str, ...]:
    if kind not in CLASSES:
        raise ModelError(
            f"{path.name} needs the expressions that its text is cut with, and those of "
            f"tokenizer_class {kind!r} are not known (known are {', '.join(CLASSES)}); save a "
            "tokenizer.json with transformers' save_pretrained."
        )
    return PRE_TOKENIZERS[CLASSES[kind]]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
