"""The tokenizer in a Hugging Face folder. Owns what the settings beside its vocabulary change, and
what families leave to their own code: control tokens, prefixes, ends of answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elinvar.base.errors import ModelError
from elinvar.engine.rank_vocab import QWEN_CONTROL
from elinvar.engine.vocab import Keep, Parts
from elinvar.engine.vocab_files import from_json, from_vocabulary
from elinvar.weights.safetensors import read_json

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""What tokenizer_config.json names, and chat templates may write."""
_USUAL = {"bos_token": ("<s>", "<bos>"), "eos_token": ("</s>", "<eos>"), "unk_token": ("<unk>",)}
"""Names of a vocabulary file alone, where no setting gives others."""

_CHATGLM, _GLM4 = "ChatGLMTokenizer", "ChatGLM4Tokenizer"
_LISTED_IN_CODE: dict[str, tuple[str, ...]] = {
    "QWenTokenizer": QWEN_CONTROL,
    _CHATGLM: (
        *("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"),
        *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    ),
}
"""Control tokens that follow the vocabulary, by tokenizer_class."""
_PREFIXES = {_CHATGLM: ("[gMASK]", "sop"), _GLM4: ("[gMASK]", "<sop>")}
_NEXT_SPEAKERS = dict.fromkeys((_CHATGLM, _GLM4), ("<|user|>", "<|observation|>"))
"""Where an answer ends by saying who speaks next."""
_MAX_ADDED = 1 << 16


def folder_parts(folder: Path, config: Mapping[str, Any], keep: Keep) -> Parts:
    """The tokenizer of a folder whose config.json is `config`. Raises ModelError when there is none,
    or one that cannot be read."""
    settings = _optional(folder / "tokenizer_config.json")
    kind = str(settings.get("tokenizer_class") or "").removesuffix("Fast")
    tokens = _named_tokens(folder, settings)
    listed = _listed_tokens(folder, settings)
    if (folder / "tokenizer.json").exists():
        backend = from_json(folder / "tokenizer.json")
        _add_listed(folder, backend, listed)
        prefix = _prefix_ids(backend)
    else:
        texts = {i: token.content for i, token in listed.items()}
        backend = from_vocabulary(folder, kind, texts, keep)
        in_code = enumerate(_LISTED_IN_CODE.get(kind, ()), backend.get_vocab_size())
        _add_listed(folder, backend, {i: _control(text) for i, text in in_code} | listed)
        known = {name: _known(backend, texts) for name, texts in _USUAL.items()}
        tokens = {name: text for name, text in known.items() if text is not None} | tokens
        prefix = _ids(backend, _PREFIXES.get(kind, ()))
        # A file of ranks has no BOS of its own; one of SentencePiece has, and wants it.
        if not prefix and settings.get("add_bos_token", known["bos_token"] is not None):
            prefix = _ids(backend, [tokens.get("bos_token", "")])
    # What has a name is a control token, whatever the vocabulary says of it; what is only listed, if
    # the vocabulary says nothing.
    said = {token.content for token in backend.get_added_tokens_decoder().values()}
    named = (*tokens.values(), *(text for text in _extra_tokens(settings) if text not in said))
    backend.add_special_tokens([t for t in named if backend.token_to_id(t) is not None])
    bos, eos = (_as_ids(config.get(f"{end}_token_id")) for end in ("bos", "eos"))
    eos += _as_ids(_optional(folder / "generation_config.json").get("eos_token_id"))
    bos_id = backend.token_to_id(tokens.get("bos_token", ""))
    return Parts(
        backend,
        bos_id=bos_id if bos_id is not None else next(iter(bos), None),
        eos_ids=eos + _ids(backend, [tokens.get("eos_token", ""), *_NEXT_SPEAKERS.get(kind, ())]),
        prefix_ids=prefix,
        # As transformers has it: a chat template writes all of the prompt itself.
        chat_prefix_ids=(),
        variables=tokens,
        templates=_templates(folder, settings),
    )


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _named_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The tokens that tokenizer_config.json names, or special_tokens_map.json where it does not: as
    texts, or as descriptions of tokens."""
    tokens: dict[str, str] = {}
    for name, source in (
        ("special_tokens_map.json", _optional(folder / "special_tokens_map.json")),
        ("tokenizer_config.json", settings),
    ):
        extra = source.get("extra_special_tokens")
        values = {key: source.get(key) for key in _NAMED}
        values |= extra if isinstance(extra, dict) else {}
        for key, value in values.items():
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                # JSON can bring half a surrogate pair, which is no character.
                tokens[key] = text.encode("utf-8", "replace").decode()
            elif value is not None:
                raise ModelError(f"{folder / name} has a {key} that is no text; download it again.")
    return tokens


def _extra_tokens(settings: Mapping[str, Any]) -> list[str]:
    """Control tokens without a name."""
    lists = (settings.get(f"{word}_special_tokens") for word in ("extra", "additional"))
    entries = next((entries for entries in lists if isinstance(entries, list)), [])
    texts = (entry.get("content") if isinstance(entry, dict) else entry for entry in entries)
    return [text for text in texts if isinstance(text, str)]


def _listed_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    """What tokenizer_config.json lists under added_tokens_decoder."""
    from tokenizers import AddedToken

    described = settings.get("added_tokens_decoder") or {}
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    try:
        return {
            int(i): AddedToken(
                token["content"], **{flag: bool(token.get(flag, False)) for flag in flags}
            )
            for i, token in described.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{folder / 'tokenizer_config.json'} has an added_tokens_decoder that is no list of "
            "tokens; download it again."
        ) from error


def _control(text: str) -> AddedToken:
    from tokenizers import AddedToken

    return AddedToken(text, special=True, normalized=False)


def _add_listed(folder: Path, backend: Backend, listed: Mapping[int, AddedToken]) -> None:
    """Makes added tokens of `listed`. An id that the tokenizer cannot give is refused: every text
    with that token would be read wrongly."""
    present = backend.get_added_tokens_decoder()
    for token_id, token in sorted(listed.items()):
        size = backend.get_vocab_size()
        if size < token_id < size + _MAX_ADDED:
            # Ids in between are reserved: nothing is ever encoded to them.
            reserved = (f"<|reserved_token_{i}|>" for i in range(size, token_id))
            backend.add_special_tokens(list(reserved))
        if repr(present.get(token_id)) != repr(token):
            backend.add_tokens([token])
        if backend.token_to_id(token.content) != token_id:
            raise ModelError(
                f"{folder} is inconsistent: its settings give {token.content!r} the id {token_id}, "
                f"its vocabulary {backend.token_to_id(token.content)}; download it again."
            )


def _known(backend: Backend, texts: Iterable[str]) -> str | None:
    """The first that is a control token; among ranks, <s> may be a word as others are."""
    control = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    return next((text for text in texts if text in control), None)


def _ids(backend: Backend, tokens: Iterable[str]) -> list[int]:
    found = (backend.token_to_id(token) for token in tokens)
    return [token_id for token_id in found if token_id is not None]


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


def _templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """chat_template.jinja, else chat_template.json, else tokenizer_config.json's; beside them those
    of additional_chat_templates/, which have names."""
    own = _optional(folder / "chat_template.json").get("chat_template")
    given = own or settings.get("chat_template")
    found: dict[str, str] = {"default": given} if isinstance(given, str) else {}
    for entry in given if isinstance(given, list) else ():
        name, text = (
            entry.get(k) if isinstance(entry, dict) else None for k in ("name", "template")
        )
        if isinstance(name, str) and isinstance(text, str):
            found[name] = text
    files = {path.stem: path for path in (folder / "additional_chat_templates").glob("*.jinja")}
    if (folder / "chat_template.jinja").exists():
        files["default"] = folder / "chat_template.jinja"
    return found | {name: _text(path) for name, path in files.items()}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise ModelError(f"{path} is not UTF-8 text; download it again.") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
