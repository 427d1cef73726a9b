"""What single tokens are called in log-probs. Kept per token: the same ones come up all the time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elinvar.engine.tokenizer import Tokenizer


class TokenNames:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._chat: dict[int, tuple[str, list[int]]] = {}
        self._completion: dict[int, str] = {}

    def raw(self, token: int) -> bytes:
        """The bytes that a token adds to the text."""
        return self._tokenizer.text_bytes((token,))

    def chat(self, token: int) -> tuple[str, list[int]]:
        """(text, bytes): where the bytes are no UTF-8 of their own, the text has U+FFFD."""
        found = self._chat.get(token)
        if found is None:
            raw = self._tokenizer.token_bytes(token)
            found = self._chat[token] = (self._tokenizer.token_text(token), list(raw))
        return found

    def completion(self, token: int) -> str:
        """The text, or OpenAI's `bytes:\\xe2\\x80` where the bytes are no UTF-8 of their own."""
        found = self._completion.get(token)
        if found is None:
            raw = self._tokenizer.token_bytes(token)
            try:
                found = raw.decode()
            except UnicodeDecodeError:
                found = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
            self._completion[token] = found
        return found
