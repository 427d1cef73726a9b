"""vLLM's CPU build on a Hugging Face folder: torch.compile on, the engine in this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from protocol import serve


class Vllm:
    def __init__(self, model: Path, threads: int) -> None:
        cpus = sorted(os.sched_getaffinity(0))[:threads]
        # Read when vllm is imported. An engine in a process of its own would hide its memory.
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cpus))
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        import torch
        import vllm

        # bfloat16 without the CPU's own instructions for it is slower than float32 many times over.
        dtype = "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
        self.version = vllm.__version__
        self.settings = f"{dtype}, torch.compile"
        self.new_params = vllm.SamplingParams
        self.llm = vllm.LLM(
            str(model),
            dtype=dtype,
            enable_prefix_caching=False,
            # All prompts of a batch in one step, so that all rows decode in step from then on.
            max_num_batched_tokens=8192,
            max_num_seqs=64,
        )
        self.engine = self.llm.llm_engine
        self.next_id = 0

    def continue_text(self, text: str) -> str:
        params = self.new_params(max_tokens=1, temperature=0)
        return self.llm.generate([text], params, use_tqdm=False)[0].outputs[0].text

    def steps(self, prompts: list[list[int]], tokens: int) -> Iterator[None]:
        params = self.new_params(
            max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False
        )
        for ids in prompts:
            self.next_id += 1
            self.engine.add_request(str(self.next_id), {"prompt_token_ids": ids}, params)
        while self.engine.has_unfinished_requests():
            self.engine.step()
            yield


if __name__ == "__main__":
    serve(Vllm)
