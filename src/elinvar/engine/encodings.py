"""Texts and pairs of texts to the token ids of an encoder, with its special tokens, cut to its length.

The tokenizer's own post-processor says where special tokens stand, and the tokenizers library cuts: as
sentence-transformers has it, so that equal texts give equal ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from elinvar.base.errors import InputError, ModelError
from elinvar.engine.folder_tokenizer import folder_parts
from elinvar.engine.gguf_vocab import build_backend, check_keys
from elinvar.engine.wordpiece import build_wordpiece, wordpiece_from_gguf
from elinvar.run.texts import Text
from elinvar.weights.safetensors import read_json

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as Backend

    from elinvar.weights.checkpoint import Checkpoint

Input = str | Sequence[int]
"""A text, or its token ids with all special tokens."""


class Encodings:
    def __init__(self, backend: Backend, max_tokens: int, lower_case: bool = False) -> None:
        """`max_tokens`: of a text or pair, special tokens included."""
        self.max_tokens, self._lower = max_tokens, lower_case
        self._plain = backend
        self._cutting = type(backend).from_str(backend.to_str())
        self._cutting.enable_truncation(max_tokens, strategy="longest_first")

    def token_id(self, token: str) -> int | None:
        found: int | None = self._plain.token_to_id(token)
        return found

    def texts(self, texts: Sequence[Input], vocab_size: int, truncate: bool = True) -> list[Text]:
        """In their order. Raises InputError for ids beyond the vocabulary, for a text without any
        token, and unless `truncate` for one that is too long."""
        words = [self._characters(text) for text in texts if isinstance(text, str)]
        encoded = iter(self._encode(words))
        found = [
            next(encoded) if isinstance(text, str) else self._ids(i, text, vocab_size)
            for i, text in enumerate(texts)
        ]
        for i, text in enumerate(found):
            if not text.ids:
                raise InputError("input", f"Text {i} has no token; leave it out.")
            if text.truncated and not truncate:
                raise InputError(
                    "input",
                    f"Text {i} is longer than the {self.max_tokens} tokens that this model takes; "
                    "shorten it or let it be truncated.",
                )
        return found

    def pairs(self, first: str, others: Sequence[str]) -> list[Text]:
        """`first` with each of the others; the longer one of a pair that is too long is cut."""
        begin = self._characters(first)
        return self._encode([(begin, self._characters(other)) for other in others])

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Without special tokens of the post-processor, and whole."""
        found = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [each.ids for each in found]

    def _encode(self, texts: Sequence[Any]) -> list[Text]:
        return [_text(each) for each in self._cutting.encode_batch_fast(texts)]

    def _ids(self, i: int, ids: Sequence[int], vocab_size: int) -> Text:
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
                raise InputError(
                    "input",
                    f"Token ids of text {i} must be from 0 to {vocab_size - 1}, got {token!r}.",
                )
        return Text(list(ids[: self.max_tokens]), truncated=len(ids) > self.max_tokens)

    def _characters(self, text: str) -> str:
        """A lone surrogate is no character; JSON and the command line can bring one."""
        text = text.encode("utf-8", "replace").decode("utf-8")
        return text.lower() if self._lower else text


def _text(encoding: Encoding) -> Text:
    return Text(encoding.ids, encoding.type_ids, bool(encoding.overflowing))


def encoder_backend(checkpoint: Checkpoint) -> Backend:
    """The tokenizer of a model, with what it puts around a text. Raises ModelError when the model has
    none, or one of an unknown kind."""
    if checkpoint.format == "gguf":
        return _from_gguf(checkpoint)
    folder = checkpoint.path
    words = folder / "vocab.txt"
    if (folder / "tokenizer.json").exists() or not words.exists():
        return folder_parts(folder, checkpoint.metadata, lambda key, build: build()).backend
    settings = folder / "tokenizer_config.json"
    try:
        tokens = words.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ModelError(f"{words} is not UTF-8 text; download it again.") from error
    return build_wordpiece(tokens, read_json(settings) if settings.exists() else {}, str(words))


def _from_gguf(checkpoint: Checkpoint) -> Backend:
    """Around a text stand BOS and EOS where the file says so."""
    from tokenizers import processors

    metadata = checkpoint.metadata
    check_keys(metadata)
    if metadata.get("tokenizer.ggml.model") == "bert" and "tokenizer.ggml.tokens" in metadata:
        return wordpiece_from_gguf(metadata, str(checkpoint.path))
    backend = build_backend(metadata)
    before, after = (_added(metadata, name) for name in ("bos", "eos"))
    names = [(backend.id_to_token(token), token) for token in (*before, *after)]
    if names:
        backend.post_processor = processors.TemplateProcessing(
            single=[
                *(n for n, _ in names[: len(before)]),
                "$A",
                *(n for n, _ in names[len(before) :]),
            ],
            special_tokens=names,
        )
    return backend


def _added(metadata: Mapping[str, Any], name: str) -> list[int]:
    token = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return [token] if metadata.get(f"tokenizer.ggml.add_{name}_token") and token is not None else []
