"""transformers on a Hugging Face folder: its model and its KV cache, driven step by step.

`generate()` adds work of its own to each step, so the loop is written out: forward, argmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from protocol import serve


class Transformers:
    version = f"{transformers.__version__}, torch {torch.__version__}"
    settings = "float32, forward and argmax"

    def __init__(self, model: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.folder = model

    @torch.inference_mode()
    def continue_text(self, text: str) -> str:
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder)
        logits = self.model(**tokenizer(text, return_tensors="pt"), logits_to_keep=1).logits
        return tokenizer.decode(logits[0, -1].argmax())

    @torch.inference_mode()
    def steps(self, prompts: list[list[int]], tokens: int) -> Iterator[None]:
        ids, cache = torch.tensor(prompts), None
        for _ in range(tokens):
            out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            yield


if __name__ == "__main__":
    serve(Transformers)
