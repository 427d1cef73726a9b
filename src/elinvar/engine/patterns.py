"""The expressions that cut a text into words before byte-level BPE. Owns which vocabulary was made
with which: GGUF names them (tokenizer.ggml.pre), files of ranks name nothing but their class."""

from __future__ import annotations

_GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = _QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}")
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def _cased(ending: str, letters: str = "") -> str:
    """Words as capitals and then small letters; `letters` narrows both classes."""
    upper, lower = f"[{_UPPER}{letters}]", f"[{_LOWER}{letters}]"
    head = r"[^\r\n\p{L}\p{N}]?"
    return f"{head}{upper}*{lower}+{ending}|{head}{upper}+{lower}*{ending}"


_NOT_HAN = r"&&[^\p{Han}]"
_TEKKEN = rf"{_cased('')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
_O200K = rf"{_cased(_ENDINGS + '?')}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
_KIMI = (
    rf"[\p{{Han}}]+|{_cased(_ENDINGS + '?', _NOT_HAN)}|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_REST}",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}")
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")

PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "phi-2", "jais", "mellum"), (_GPT2,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (r"\p{N}", _GPT2)
    ),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2", "pixtral"), (_LLAMA3,)),
    **dict.fromkeys(("smaug-bpe", "dbrx", "chatglm-bpe", "glm4"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"), (_QWEN2,)),
    "qwen35": (_QWEN35,),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), _DEEPSEEK3),
    "deepseek-coder": _DEEPSEEK_CODER,
    "falcon": _FALCON,
    "tekken": (_TEKKEN,),
    **dict.fromkeys(("gpt-4o", "llama4"), (_O200K,)),
    "kimi-k2": (_KIMI,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
"""Expressions that cut a text into words, each applied to the pieces of the one before."""

WHOLE_WORDS_FIRST = {
    *("llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2", "pixtral", "tekken"),
}
"""Pre-tokenizers of GGUF vocabularies in which a word that is a token is never cut by merges."""

CLASSES = {
    "QWenTokenizer": "qwen2",
    "ChatGLM4Tokenizer": "glm4",
    "TikTokenTokenizer": "kimi-k2",
    "GPT2Tokenizer": "gpt-2",
    "Qwen2Tokenizer": "qwen2",
    **dict.fromkeys(("PreTrainedTokenizer", "LlamaTokenizer", "TokenizersBackend"), "llama3"),
}
"""tokenizer_class (without Fast) of those that publish ranks or merges alone."""
