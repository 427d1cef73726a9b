"""Text to token ids and back. Owns which ids end an answer and what bytes a token stands for.

Encoding is done by the `tokenizers` library, from a GGUF file's vocabulary or a tokenizer.json.
Decoding is done here: a token is a sequence of bytes, a text is their UTF-8 decoding. That is exact
in pieces (see engine.detokenize), where other decoders look at more than one token.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elinvar.base.errors import ModelError
from elinvar.engine.chat import ChatTemplate
from elinvar.engine.gguf_vocab import SPACE, build_backend, check_keys
from elinvar.weights.atomic import atomic_file
from elinvar.weights.safetensors import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

    from elinvar.weights.checkpoint import Checkpoint

log = logging.getLogger("elinvar.engine")

END_OF_TURN = (
    *("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|return|>"),
    *("<|endoftext|>", "<|end_of_text|>", "<EOT>", "<|call|>"),
)
"""Control tokens that end an answer in any model that has them; <|end|> but in those that have
<|return|> as well (harmony), where an answer may be several messages."""

_CACHE_VERSION = 1
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CHARACTER_BYTES = {
    # GPT-2's alphabet: printable bytes stand for themselves, the others follow from U+0100 on.
    chr(code): byte
    for code, byte in (
        *((b, b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))),
        *((256 + i, b) for i, b in enumerate((*range(33), *range(127, 161), 173))),
    )
}


class Tokenizer:
    """The tokenizer of one model. Made by load_tokenizer; safe to share between threads."""

    def __init__(
        self,
        backend: Backend,
        *,
        bos_id: int | None,
        eos_ids: Iterable[int],
        prefix_ids: Iterable[int] = (),
        variables: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        """`prefix_ids`: what comes before every plain text, usually BOS or nothing.
        `variables`: tokens that a chat template may write (bos_token, eos_token, ...)."""
        self._backend = backend
        self._prefix = list(prefix_ids)
        self._variables = dict(variables or {})
        added = backend.get_added_tokens_decoder()
        self._added = {i: str(token.content) for i, token in added.items()}
        self._bytes: dict[int, bytes] = {}
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        """Control tokens: they are no part of a decoded text."""
        self.bos_id = bos_id
        turns = [backend.token_to_id(token) for token in END_OF_TURN]
        if backend.token_to_id("<|return|>") in self.special_ids:
            turns.remove(backend.token_to_id("<|end|>"))
        self.eos_ids = frozenset(eos_ids) | {i for i in turns if i in self.special_ids}
        """Ids that end an answer."""
        self.chat_template: ChatTemplate | None = None
        """None: the model has no chat template (use completions, or use_chat_template)."""
        if chat_template is not None:
            self.use_chat_template(chat_template)

    def use_chat_template(self, source: str) -> None:
        """Replaces the model's chat template by the Jinja text `source`."""
        self.chat_template = ChatTemplate(source, self._variables)

    @property
    def vocab_size(self) -> int:
        """Number of tokens; a model's logits may have more columns (padding)."""
        return int(self._backend.get_vocab_size())

    @cached_property
    def kind(self) -> str:
        """`byte-level` or `sentencepiece`: how tokens spell bytes."""
        return _decoding_kind(self._backend)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of `text`; control tokens written in it are parsed as such.

        With `add_special` the ids begin with BOS where the model wants one. No end token is ever
        added: the model is to go on from here."""
        # The batch call lets go of the GIL: a long prompt must not stall the step thread.
        encoded = self._backend.encode_batch_fast([_characters(text)], add_special_tokens=False)
        ids: list[int] = encoded[0].ids
        return [*self._prefix, *ids] if add_special else ids

    def encode_chat(self, text: str) -> list[int]:
        """Token ids of a rendered chat template; BOS comes first once, whoever wrote it."""
        ids = self.encode(text, add_special=False)
        return ids if ids[: len(self._prefix)] == self._prefix else [*self._prefix, *ids]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; malformed UTF-8 becomes U+FFFD. A space that a tokenizer puts before
        the first word is kept: the ids may be the middle of a text."""
        return self.text_bytes(ids, skip_special).decode("utf-8", "replace")

    def text_bytes(self, ids: Iterable[int], skip_special: bool = True) -> bytes:
        """The bytes of the text of `ids`, without those of control tokens."""
        hidden = self.special_ids if skip_special else ()
        return b"".join([self.token_bytes(i) for i in ids if i not in hidden])

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, perhaps a part of a character; a control token's are
        those of its name, an unknown id has none."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._spell(token_id)
        return found

    def token_text(self, token_id: int) -> str:
        """A token as a text to show; U+FFFD stands for a part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _spell(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return b""
        added = token_id in self._added
        if self.kind == "sentencepiece":
            if not added and (match := _BYTE_TOKEN.fullmatch(token)):
                return bytes([int(match[1], 16)])
            return str(token).replace(SPACE, " ").encode()
        if not added and all(character in _CHARACTER_BYTES for character in token):
            return bytes(_CHARACTER_BYTES[character] for character in token)
        return str(token).encode()


def load_tokenizer(checkpoint: Checkpoint, cache_dir: Path | None = None) -> Tokenizer:
    """The tokenizer of a model. One built from a GGUF file is kept below cache_dir/tokenizers.

    Raises ModelError when the model has none, or one of an unknown kind."""
    if checkpoint.format == "gguf":
        return _from_gguf(checkpoint, cache_dir)
    return _from_folder(checkpoint)


def _from_gguf(checkpoint: Checkpoint, cache_dir: Path | None) -> Tokenizer:
    metadata = checkpoint.metadata
    check_keys(metadata)
    backend = _cached_backend(checkpoint, cache_dir)
    sentencepiece = metadata.get("tokenizer.ggml.model") == "llama"
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if sentencepiece else {}
    ids: dict[str, int] = {}
    spelled: dict[str, str] = {}
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        token_id = metadata.get(f"tokenizer.ggml.{name}_token_id", defaults.get(name))
        if token_id is not None and 0 <= token_id < backend.get_vocab_size():
            ids[name], spelled[name] = token_id, backend.id_to_token(token_id) or ""
    bos_by_default = sentencepiece or metadata.get("tokenizer.ggml.pre") in ("llama-bpe", "tekken")
    add_bos = "bos" in ids and metadata.get("tokenizer.ggml.add_bos_token", bos_by_default)
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    return Tokenizer(
        backend,
        bos_id=ids.get("bos"),
        eos_ids=[ids[name] for name in ("eos", "eot", "eom") if name in ids],
        prefix_ids=[ids["bos"]] if add_bos else [],
        variables={key: spelled[name] for name, key in names.items() if name in spelled},
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _cached_backend(checkpoint: Checkpoint, cache_dir: Path | None) -> Backend:
    from tokenizers import Tokenizer as Backend

    if cache_dir is None:
        return build_backend(checkpoint.metadata)
    path = cache_dir / "tokenizers" / f"{checkpoint.fingerprint}-{_CACHE_VERSION}.json"
    if path.exists():
        # It is only a cache: one that cannot be read is made again.
        with contextlib.suppress(Exception):
            return Backend.from_file(str(path))
    backend = build_backend(checkpoint.metadata)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = backend.to_str().encode()
        with atomic_file(path, len(raw)) as file:
            file.write(raw)
    except (ModelError, OSError) as error:
        log.info("the tokenizer is not kept: %s", error)
    return backend


def folder_backend(folder: Path) -> Backend:
    """What tokenizer.json describes. Raises ModelError where it is missing or broken."""
    from tokenizers import Tokenizer as Backend

    path = folder / "tokenizer.json"
    if not path.exists():
        raise ModelError(
            f"{folder} holds no tokenizer: tokenizer.json was looked for (a tokenizer.model or "
            "vocab.json alone can be converted with transformers' save_pretrained)."
        )
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:
        raise ModelError(f"{path} cannot be read: {' '.join(str(error).split())}.") from error
    # A tokenizer may come with truncation or padding switched on, for training.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _from_folder(checkpoint: Checkpoint) -> Tokenizer:
    folder = checkpoint.path
    backend = folder_backend(folder)
    settings = _read_optional(folder / "tokenizer_config.json")
    generation = _read_optional(folder / "generation_config.json")
    tokens = _named_tokens(folder, settings)
    bos = _as_ids(checkpoint.metadata.get("bos_token_id"))
    bos_id = backend.token_to_id(tokens["bos_token"]) if "bos_token" in tokens else None
    eos = _as_ids(generation.get("eos_token_id")) + _as_ids(checkpoint.metadata.get("eos_token_id"))
    if "eos_token" in tokens:
        eos += _as_ids(backend.token_to_id(tokens["eos_token"]))
    return Tokenizer(
        backend,
        bos_id=bos_id if bos_id is not None else next(iter(bos), None),
        eos_ids=eos,
        prefix_ids=_prefix_ids(backend),
        variables=tokens,
        chat_template=_folder_template(folder, settings),
    )


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _named_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The tokens that tokenizer_config.json names, as texts or as descriptions of tokens."""
    tokens: dict[str, str] = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = settings.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[key] = _characters(text)
        elif value is not None:
            raise ModelError(
                f"{folder / 'tokenizer_config.json'} has a {key} that is no text; download it again."
            )
    return tokens


def _characters(text: str) -> str:
    """A lone surrogate is no character; JSON and the command line can bring one."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _as_ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and v >= 0]


def _prefix_ids(backend: Backend) -> list[int]:
    """What tokenizer.json's post-processor puts before a text."""
    plain = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return list(full[:start])
    return []


def _folder_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else chat_template.json, else tokenizer_config.json's."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except ValueError as error:
            raise ModelError(f"{path} is not UTF-8 text; download it again.") from error
    own = _read_optional(folder / "chat_template.json").get("chat_template")
    template = own or settings.get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        template = next((e.get("template") for e in entries if e.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _decoding_kind(backend: Backend) -> str:
    """From the decoder's description, which the library gives only as JSON."""
    decoder = backend.decoder
    described = json.loads(decoder.__getstate__()) if decoder is not None else {}
    kinds = {step.get("type") for step in described.get("decoders", [described])}
    if "ByteLevel" in kinds:
        return "byte-level"
    if kinds & {"ByteFallback", "Metaspace"}:
        return "sentencepiece"
    raise ModelError(
        f"The tokenizer's decoder ({', '.join(sorted(map(str, kinds)))}) is not supported; "
        "byte-level BPE and SentencePiece are."
    )
