"""OpenVINO GenAI on a GGUF file or on a folder in OpenVINO's own format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openvino
import openvino_genai as genai
from protocol import serve


class OpenVino:
    version = genai.__version__
    settings = "ContinuousBatchingPipeline"

    def __init__(self, model: Path, threads: int) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 1
        # All prompts of a batch in one step, so that all rows decode in step from then on.
        scheduler.max_num_batched_tokens = 8192
        scheduler.dynamic_split_fuse = False
        scheduler.enable_prefix_caching = False
        self.pipeline = genai.ContinuousBatchingPipeline(
            str(model), scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
        )
        self.next_id = 0

    def continue_text(self, text: str) -> str:
        config = genai.GenerationConfig(
            max_new_tokens=1, do_sample=False, apply_chat_template=False
        )
        return self.pipeline.generate([text], [config])[0].m_generation_ids[0]

    def steps(self, prompts: list[list[int]], tokens: int) -> Iterator[None]:
        config = genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
        handles = []
        for ids in prompts:
            self.next_id += 1
            tensor = openvino.Tensor(np.array([ids], np.int64))
            handles.append(self.pipeline.add_request(self.next_id, tensor, config))
        for _ in range(tokens):
            self.pipeline.step()
            yield
        for handle in handles:
            handle.read_all()


if __name__ == "__main__":
    serve(OpenVino)
