"""Reads SentencePiece's tokenizer.model. Owns the little of protobuf that this takes, and which of the
file's settings matter (sentencepiece_model.proto)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from elinvar.base.errors import ModelError
from elinvar.engine.vocab import NORMAL, UNKNOWN, Pieces

_UNIGRAM, _BPE = 1, 2
_Value = int | bytes
_Fields = dict[int, _Value]


def read_pieces(path: Path, raw: bytes) -> Pieces:
    """The vocabulary in a tokenizer.model. Raises ModelError when it is none, or not of BPE: for
    Unigram the library rounds otherwise than SentencePiece, and takes another of equal paths."""
    try:
        parts = list(_fields(raw))
        entries = [_last(value) for number, value in parts if number == 1]
        whole = dict(parts)
        trainer, normaliser = _last(whole.get(2, b"")), _last(whole.get(3, b""))
        tokens = [_bytes(entry.get(1, b"")).decode() for entry in entries]
        scores = [struct.unpack("<f", _bytes(entry.get(2, bytes(4))))[0] for entry in entries]
        types = [_number(entry.get(3, NORMAL)) for entry in entries]
        kind = _number(trainer.get(3, _UNIGRAM))
        pieces = Pieces(
            tokens,
            scores,
            types,
            unknown_id=types.index(UNKNOWN),
            space_prefix=bool(_number(normaliser.get(3, 1))),
            squeeze=bool(_number(normaliser.get(4, 1))),
            charsmap=_bytes(normaliser.get(2, b"")),
        )
    except (ValueError, IndexError, TypeError, struct.error) as error:
        raise ModelError(
            f"{path} is no SentencePiece model and no list of ranks; download it again."
        ) from error
    if kind != _BPE or _number(trainer.get(24, 0)):
        raise ModelError(
            f"{path} is a SentencePiece model, but no BPE with spaces before words, which is all that "
            "is read without a tokenizer.json; save one with transformers' save_pretrained."
        )
    if len(tokens) != len(set(tokens)):
        raise ModelError(f"{path} has the same piece twice; download it again.")
    return pieces


def _fields(raw: bytes) -> Iterator[tuple[int, _Value]]:
    """(field number, value) of one protobuf message. Raises IndexError or ValueError when broken."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(raw, at)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            size, at = _varint(raw, at)
        if size is None or size > len(raw) - at:
            raise ValueError("not a message")
        yield key >> 3, raw[at : at + size]
        at += size


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = raw[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number is too long")


def _last(value: _Value) -> _Fields:
    """A message's fields; of one that comes twice the last counts."""
    return dict(_fields(_bytes(value)))


def _bytes(value: _Value) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError("a number where bytes belong")
    return value


def _number(value: _Value) -> int:
    if not isinstance(value, int):
        raise TypeError("bytes where a number belongs")
    return value
