"""onnxruntime-genai on a folder that its model builder wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
from protocol import serve


class OnnxRuntime:
    version = og.__version__
    settings = "Generator, static batch"

    def __init__(self, model: Path, threads: int) -> None:
        config = og.Config(str(model))
        # The default is one thread.
        session = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self.model = og.Model(config)

    def continue_text(self, text: str) -> str:
        tokenizer = og.Tokenizer(self.model)
        ids = tokenizer.encode(text)
        params = og.GeneratorParams(self.model)
        params.set_search_options(max_length=len(ids) + 1, do_sample=False)
        generator = og.Generator(self.model, params)
        generator.append_tokens(ids)
        generator.generate_next_token()
        return tokenizer.decode(generator.get_next_tokens())

    def steps(self, prompts: list[list[int]], tokens: int) -> Iterator[None]:
        params = og.GeneratorParams(self.model)
        length = len(prompts[0]) + tokens
        # The shared KV buffer is as long as max_length; min_length keeps an end token from ending it.
        params.set_search_options(
            batch_size=len(prompts), max_length=length, min_length=length, do_sample=False
        )
        generator = og.Generator(self.model, params)
        generator.append_tokens(np.array(prompts, np.int32))
        for _ in range(tokens):
            generator.generate_next_token()
            yield


if __name__ == "__main__":
    serve(OnnxRuntime)
