"""Texts that tokenizers get wrong, made from a seed: scripts, emoji, code, space, specials, noise."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

SPECIALS = (
    *("<s>", "</s>", "<unk>", "<pad>", "<bos>", "<eos>", "<mask>", "[CLS]", "[SEP]", "[MASK]"),
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>", "<|end|>"),
    *("<|start_header_id|>", "<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|call|>"),
    *("[INST]", "[/INST]", "[TOOL_CALLS]", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>"),
    *("<start_of_turn>", "<end_of_turn>", "<think>", "</think>", "<tool_call>", "</tool_call>"),
    *("<｜begin▁of▁sentence｜>", "<｜User｜>", "<0x0A>", "<0xE2>", "▁", "Ġ"),
    *("<|im_start", "|im_end|>", "<|im_start|", "< |im_end|>", "<|IM_START|>", "<|fim_prefix|>"),
)
"""Control tokens of many families, and texts that nearly are one."""

_WORD_LIST = (
    "the The THE and of word Words naïve café Ångström ﬁne ſ ẞ straße İstanbul ıŞık "
    "Здравствуй мир Γειά κόσμε ΣΊΣΥΦΟΣ שלום עולם שָׁלוֹם مرحبا بالعالم مُحَمَّد لا ﷺ हिन्दी क्षत्रिय नमस्ते "
    "สวัสดีครับ ภาษาไทย 日本語 テキスト ｱｲｳ がぎ か\u3099 漢字 中文字符 龍龘 𠮷野家 한국어 텍스트 \u1112\u1161\u11ab\u1100\u116e\u11a8 "
    "ქართული Հայերեն አማርኛ ᏣᎳᎩ ខ្មែរ မြန်မာ བོད་ཡིག Ǆ ǅ ǆ 𝕳𝖊𝖑𝖑𝖔 ①②③ ㈱ ㎏ ½ ²³ Ⅷ ℌ K Å 𐍈 𓀀 ‱ №"
)
_WORDS = _WORD_LIST.split()
_EMOJI_LIST = "😀 😃🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 🇯🇵🇫🇷 🇦 1️⃣ #️⃣ ❤️ ❤ ☺︎ 👨🏿‍🚀 🏴󠁧󠁢󠁥󠁮󠁧󠁿 🤷🏻‍♀️ \u200d 🏽 ️ ©️ ™ ⚡ 🫠 🧑‍🤝‍🧑"
_EMOJI = _EMOJI_LIST.split()
_CODE = (
    "def f(x: int) -> int:\n    return x ** 2  # square\n\n\n",
    "\t\tif (a && !b) {\r\n\t\t\treturn 0x1F;\r\n\t\t}\r\n",
    '{"a": [1, 2.5e-3, {"b": null}], "c": "\\u00e9"}',
    "https://example.org/a?b=c&d=%20#e",
    *("for(;;){i+=1;}//", "#include <a.h>", "SELECT * FROM t WHERE a='b';", "</div>", "a::b<c>"),
    *("```python\n", "$x^{2}$", "\\frac{a}{b}", "C++", "@a.b", "--flag=1", "____", "....", "!?!"),
    *("`${x}`", "lambda x:x", "\\n\\t", "~/.config", "C:\\Users\\x", "u@example.org", "<!-- x -->"),
)
_SPACE = (
    *(" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\r", " \n", "\n ", " \t ", "\v", "\f", "\x85"),
    *("\u00a0", "\u2003", "\u3000", "\u2028", "\u2029", "\u200b", "\ufeff", "\u202e", "\u00ad"),
)
_TAILS = ("s", "S", "t", "re", "ve", "m", "ll", "d", "LL", "Re", "x", "ſ")
_APOSTROPHES = ("'", "’", "ʼ", "＇", "`", "´", "'" * 2)
_DIGITS = ("0123456789", "٠١٢٣٤٥٦٧٨٩", "०१२३४५६७८९", "０１２３４５６７８９")


def hard_texts(count: int = 5000, seed: int = 0) -> list[str]:
    """`count` texts, the same for the same seed. All can be encoded as UTF-8."""
    rng = random.Random(seed)
    fixed = ["", " ", "\n", "\x00", "a", "ab" * 40, " " * 40, "=" * 70, "\u0301", "\U0010ffff"]
    texts = [*fixed, *SPECIALS, *(f"x{special}y" for special in SPECIALS)]
    while len(texts) < count:
        kind = rng.randrange(4)
        if kind == 0:  # a sentence of one script's words
            texts.append(" ".join(rng.choices(_WORDS, k=rng.randint(1, 12))))
        elif kind == 1:  # noise
            texts.append("".join(_character(rng) for _ in range(rng.randint(1, 24))))
        else:  # everything beside everything
            makers = rng.choices(_MAKERS, k=rng.randint(1, 14))
            texts.append("".join(make(rng) for make in makers))
    return texts[:count]


def _pick(choices: Sequence[str]) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(choices)


def _character(rng: random.Random) -> str:
    """Any character but half a surrogate pair; the low planes are likelier."""
    while True:
        code = rng.randrange(rng.choice((0x80, 0x250, 0x3000, 0x10000, 0x110000)))
        if not 0xD800 <= code < 0xE000:
            return chr(code)


def _digits(rng: random.Random) -> str:
    run = "".join(rng.choices(rng.choice(_DIGITS), k=rng.randint(1, 12)))
    return rng.choice((run, f"{run[:3]}.{run[3:]}", f"{run[:2]},{run[2:]}", f"-{run}"))


def _contraction(rng: random.Random) -> str:
    return rng.choice(("I", " you", "HE", "")) + rng.choice(_APOSTROPHES) + rng.choice(_TAILS)


def _long(rng: random.Random) -> str:
    unit = rng.choice((*_WORDS[:8], "a", "x1", "-", " ", "\n", "漢", "é", "😀"))
    return unit * rng.randint(5, 60)


def _marks(rng: random.Random) -> str:
    return rng.choice("aeoกאअ") + "".join(chr(rng.randrange(0x300, 0x36F)) for _ in range(4))


_MAKERS: tuple[Callable[[random.Random], str], ...] = (
    *(_pick(_WORDS), _pick(_WORDS), _pick(_EMOJI), _pick(_CODE), _pick(_SPACE), _pick(_SPACE)),
    *(_pick(SPECIALS), _digits, _contraction, _long, _marks, _character),
)
