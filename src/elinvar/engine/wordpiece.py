"""BERT's tokenizer (Schuster and Nakajima, 2012; Devlin et al., 2018) from its list of words alone, as
vocab.txt or a GGUF file holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from elinvar.base.errors import ModelError
from elinvar.engine.vocab import SPACE

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_MAX_WORD = 100
"""Characters; a longer word is unknown."""


def build_wordpiece(tokens: Sequence[str], settings: Mapping[str, Any], source: str) -> Backend:
    """`tokens`: by id, with ## before those that go on with a word. `settings`: of
    tokenizer_config.json. Raises ModelError where the list is none of BERT's."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = {token: i for i, token in enumerate(tokens)}
    missing = [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in vocabulary]
    if missing:
        raise ModelError(
            f"{source} is no list of BERT's words: it lacks {missing[0]}; convert the tokenizer with "
            "transformers' save_pretrained, which writes tokenizer.json."
        )
    backend = Tokenizer(
        models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=_MAX_WORD)
    )
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
        strip_accents=settings.get("strip_accents"),
        lowercase=bool(settings.get("do_lower_case", True)),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [token for token in _SPECIAL if token in vocabulary]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return backend


def wordpiece_from_gguf(metadata: Mapping[str, Any], source: str) -> Backend:
    """llama.cpp's converter marks the tokens that begin a word, and not those that go on with one. Files
    do not say whether a text is lower-cased: it is where no token has a capital."""
    tokens = []
    for token in metadata["tokenizer.ggml.tokens"]:
        if not isinstance(token, str):
            raise ModelError(
                f"{source} is inconsistent: tokenizer.ggml.tokens is no list of texts."
            )
        named = token.startswith("[") and token.endswith("]")
        begins = token.startswith(SPACE)
        tokens.append(token if named else token[1:] if begins else f"##{token}")
    plain = (token for token in tokens if not token.startswith("["))
    return build_wordpiece(
        tokens, {"do_lower_case": not any(t != t.lower() for t in plain)}, source
    )
