"""Texts and pairs of texts to the token ids of an encoder, with its special tokens, cut to its length.

The tokenizer's own post-processor says where special tokens stand, and the tokenizers library cuts: as
sentence-transformers has it, so that equal texts give equal ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from elinvar.base.config import ModelConfig
from elinvar.base.errors import InputError, ModelError
from elinvar.engine.folder_tokenizer import folder_parts
from elinvar.engine.gguf_vocab import gguf_parts
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
    def __init__(
        self, backend: Backend, config: ModelConfig, max_tokens: int, lower_case: bool = False
    ) -> None:
        """`max_tokens`: of a text or pair, special tokens included. Raises InputError where that leaves
        no room for a text."""
        self._vocab_size = config.vocab_size
        num_types = config.encoder.num_types if config.encoder else 1
        # Models of one type do not look at them.
        self._num_types = num_types if num_types > 1 else None
        around = backend.num_special_tokens_to_add(is_pair=True)
        if max_tokens <= around:
            raise InputError(
                "max_context", f"max_context must be above {around} tokens, got {max_tokens}."
            )
        self.max_tokens, self._lower = max_tokens, lower_case
        self._plain = backend
        self._cutting = type(backend).from_str(backend.to_str())
        self._cutting.enable_truncation(max_tokens, strategy="longest_first")

    def token_id(self, token: str) -> int | None:
        found: int | None = self._plain.token_to_id(token)
        return found

    def texts(self, texts: Sequence[Input], truncate: bool = True) -> list[Text]:
        """In their order. Raises InputError for ids beyond the vocabulary, for a text without any
        token, and unless `truncate` for one that is too long."""
        words = [self._characters(text) for text in texts if isinstance(text, str)]
        encoded = iter(self._encode(words))
        found = [
            next(encoded) if isinstance(text, str) else self._ids(i, text)
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

    def plain(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """Without special tokens of the post-processor, and whole."""
        words = [self._characters(text) for text in texts]
        found = self._plain.encode_batch_fast(words, add_special_tokens=False)
        return [self._text(each).ids for each in found]

    def _encode(self, texts: Sequence[Any]) -> list[Text]:
        return [self._text(each) for each in self._cutting.encode_batch_fast(texts)]

    def _text(self, encoding: Encoding) -> Text:
        ids, types, limit = encoding.ids, encoding.type_ids, self._num_types
        if max(ids, default=0) >= self._vocab_size or (limit and max(types, default=0) >= limit):
            raise ModelError(
                "The tokenizer gives ids that the model does not have; they do not belong together."
            )
        return Text(ids, types, bool(encoding.overflowing))

    def _ids(self, i: int, ids: Sequence[int]) -> Text:
        for token in ids:
            if (
                isinstance(token, bool)
                or not isinstance(token, int)
                or not 0 <= token < self._vocab_size
            ):
                raise InputError(
                    "input",
                    f"Token ids of text {i} must be from 0 to {self._vocab_size - 1}, got {token!r}.",
                )
        return Text(list(ids[: self.max_tokens]), truncated=len(ids) > self.max_tokens)

    def _characters(self, text: str) -> str:
        """A lone surrogate is no character; JSON and the command line can bring one."""
        text = text.encode("utf-8", "replace").decode("utf-8")
        return text.lower() if self._lower else text


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
    if metadata.get("tokenizer.ggml.model") == "bert" and "tokenizer.ggml.tokens" in metadata:
        return wordpiece_from_gguf(metadata, str(checkpoint.path))
    parts = gguf_parts(metadata, checkpoint.fingerprint, lambda key, build: build())
    backend, before = parts.backend, list(parts.prefix_ids)
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    ends = metadata.get("tokenizer.ggml.add_eos_token")
    after = [token for token in parts.eos_ids if ends and token == eos]
    if before or after:
        names = {token: backend.id_to_token(token) for token in (*before, *after)}
        backend.post_processor = processors.TemplateProcessing(
            single=[*(names[t] for t in before), "$A", *(names[t] for t in after)],
            special_tokens=[(name, token) for token, name in names.items()],
        )
    return backend
