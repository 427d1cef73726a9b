"""Text to token ids and back. Owns which ids end an answer and what bytes a token stands for.

Encoding is done by the `tokenizers` library, from a GGUF file's vocabulary or a folder's files.
Decoding is done here: a token is a sequence of bytes, a text is their UTF-8 decoding. That is exact
in pieces (see engine.detokenize), where other decoders look at more than one token.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from elinvar.base.errors import ModelError
from elinvar.engine.chat import ChatTemplate
from elinvar.engine.folder_tokenizer import folder_parts
from elinvar.engine.gguf_vocab import gguf_parts
from elinvar.engine.vocab import CHARACTER_BYTES, SPACE, Parts
from elinvar.weights.atomic import atomic_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

    from elinvar.weights.checkpoint import Checkpoint

log = logging.getLogger("elinvar.engine")

END_OF_TURN = (
    *("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|return|>"),
    *("<|call|>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "<|eot|>", "<|eom|>"),
)
"""Control tokens that end an answer in any model that has them; <|end|> but in those that have
<|return|> as well (harmony), where an answer may be several messages."""

_CACHE_VERSION = 2
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """The tokenizer of one model. Made by load_tokenizer; safe to share between threads."""

    def __init__(self, parts: Parts) -> None:
        backend = self._backend = parts.backend
        self._prefix = list(parts.prefix_ids)
        self._chat_prefix = list(parts.chat_prefix_ids)
        self._variables = dict(parts.variables)
        added = backend.get_added_tokens_decoder()
        self._added = {i: str(token.content) for i, token in added.items()}
        self._bytes: dict[int, bytes] = {}
        self.kind = _decoding_kind(backend)
        """How tokens spell bytes: `byte-level`, `sentencepiece` (with names for bytes), `metaspace`
        or `wordpiece`."""
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        """Control tokens: they are no part of a decoded text."""
        self.bos_id = parts.bos_id
        self.eos_ids = frozenset(parts.eos_ids) | self._turn_ends()
        """Ids that end an answer."""
        self.chat_template: ChatTemplate | None = None
        """None: the model has no chat template (use completions, or use_chat_template)."""
        if "default" in parts.templates:
            self.chat_template = ChatTemplate(
                parts.templates["default"], self._variables, parts.templates.get("tool_use")
            )

    def _turn_ends(self) -> set[int]:
        ids = {token: self._backend.token_to_id(token) for token in END_OF_TURN}
        # In harmony, <|end|> ends a message and the answer may go on: thoughts come before it.
        message_ends = {"<|end|>"} if ids["<|return|>"] is not None else set()
        return {i for t, i in ids.items() if i in self.special_ids and t not in message_ends}

    def use_chat_template(self, source: str) -> None:
        """Replaces the model's chat template by the Jinja text `source`."""
        self.chat_template = ChatTemplate(source, self._variables)

    @property
    def whole_tokens(self) -> dict[str, int]:
        """Tokens that are found whole in a text, and their ids; control tokens are among them."""
        return {token: i for i, token in self._added.items()}

    @property
    def vocab_size(self) -> int:
        """Number of tokens; a model's logits may have more columns (padding)."""
        return int(self._backend.get_vocab_size())

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of `text`; control tokens written in it are parsed as such.

        With `add_special` the ids begin with BOS where the model wants one. No end token is ever
        added: the model is to go on from here."""
        # The batch call lets go of the GIL: a long prompt must not stall the step thread.
        encoded = self._backend.encode_batch_fast([_characters(text)], add_special_tokens=False)
        ids: list[int] = encoded[0].ids
        return [*self._prefix, *ids] if add_special else ids

    def control_id(self, name: str) -> int | None:
        """The id of a control token; None: the model has none of this name."""
        found: int | None = self._backend.token_to_id(name)
        return found if found in self._added else None

    def encode_chat(self, text: str) -> list[int]:
        """Token ids of a rendered chat template. Where the model's format wants BOS before chats,
        it comes first once, whoever wrote it."""
        ids, prefix = self.encode(text, add_special=False), self._chat_prefix
        return ids if ids[: len(prefix)] == prefix else [*prefix, *ids]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; malformed UTF-8 becomes U+FFFD. A space that a tokenizer puts before
        the first word is kept: the ids may be the middle of a text."""
        return self.text_bytes(ids, None if skip_special else ()).decode("utf-8", "replace")

    def text_bytes(self, ids: Iterable[int], hidden: Container[int] | None = None) -> bytes:
        """The bytes of the text of `ids`, without those of `hidden` ones; None: of control tokens."""
        hidden = self.special_ids if hidden is None else hidden
        return b"".join([self.token_bytes(i) for i in ids if i not in hidden])

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, perhaps a part of a character; a control token's are
        those of its name, an unknown id has none."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._spell(token_id)
        return found

    def spellings(self, count: int) -> list[bytes]:
        """token_bytes of all ids below `count`, for those who keep them elsewhere."""
        return [self._spell(token_id) for token_id in range(count)]

    def token_text(self, token_id: int) -> str:
        """A token as a text to show; U+FFFD stands for a part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _spell(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return b""
        added = token_id in self._added
        if self.kind == "wordpiece":
            joined = token.startswith("##") and not added
            return str(token[2:] if joined else f" {token}").encode()
        if self.kind in ("sentencepiece", "metaspace"):
            named = self.kind == "sentencepiece" and not added
            if named and (match := _BYTE_TOKEN.fullmatch(token)):
                return bytes([int(match[1], 16)])
            return str(token).replace(SPACE, " ").encode()
        if not added and all(character in CHARACTER_BYTES for character in token):
            return bytes(CHARACTER_BYTES[character] for character in token)
        return str(token).encode()


def load_tokenizer(checkpoint: Checkpoint, cache_dir: Path | None = None) -> Tokenizer:
    """The tokenizer of a model. One that had to be built is kept below cache_dir/tokenizers.

    Raises ModelError when the model has none, or one of an unknown kind."""

    def keep(key: str, build: Callable[[], Backend]) -> Backend:
        return _kept(cache_dir, key, build)

    if checkpoint.format == "gguf":
        return Tokenizer(gguf_parts(checkpoint.metadata, checkpoint.fingerprint, keep))
    return Tokenizer(folder_parts(checkpoint.path, checkpoint.metadata, keep))


def _kept(cache_dir: Path | None, key: str, build: Callable[[], Backend]) -> Backend:
    from tokenizers import Tokenizer as Backend

    if cache_dir is None:
        return build()
    path = cache_dir / "tokenizers" / f"{key}-{_CACHE_VERSION}.json"
    if path.exists():
        # It is only a cache: one that cannot be read is made again.
        with contextlib.suppress(Exception):
            return Backend.from_file(str(path))
    backend = build()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = backend.to_str().encode()
        with atomic_file(path, len(raw)) as file:
            file.write(raw)
    except (ModelError, OSError) as error:
        log.info("the tokenizer is not kept: %s", error)
    return backend


def _characters(text: str) -> str:
    """A lone surrogate is no character; JSON and the command line can bring one."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _decoding_kind(backend: Backend) -> str:
    """From the decoder's description, which the library gives only as JSON."""
    decoder = backend.decoder
    described = json.loads(decoder.__getstate__()) if decoder is not None else {}
    kinds = {step.get("type") for step in described.get("decoders", [described])}
    if "ByteLevel" in kinds:
        return "byte-level"
    if "ByteFallback" in kinds:
        return "sentencepiece"
    if kinds & {"Metaspace", "Replace"}:
        return "metaspace"
    if "WordPiece" in kinds:
        return "wordpiece"
    raise ModelError(
        f"The tokenizer's decoder ({', '.join(sorted(map(str, kinds)))}) is not supported; "
        "byte-level BPE, SentencePiece and WordPiece are."
    )
