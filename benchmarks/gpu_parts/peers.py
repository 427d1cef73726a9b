"""transformers with the weights that the part `llama` has: its logits beside ours, and its tokens a second
with a static cache and compiled, which is its best."""

from __future__ import annotations

import time
from typing import Any
from zlib import crc32

import torch

from elinvar.models.registry import FAMILIES
from elinvar.ops.triton.samples import random_matrix
from elinvar.weights.rules import bind
from gpu_parts.base import Part
from gpu_parts.models import engine_of, random_model, settings
from gpu_parts.whole import random_prompt, tokens_of, wait


def measure(part: Part) -> None:
    told = settings("llama", part.small)
    theirs = transformers_model(part, told)
    part.attempt("agreement", lambda: agreement(part, theirs))
    torch.cuda.empty_cache()
    for batch in (1,) if part.small else (128, 1, 32, 8):
        part.attempt(f"decode/{batch}", lambda n=batch: decode(part, theirs, n))
    part.attempt("prefill", lambda: prefill(part, theirs, 40 if part.small else 8192))


def transformers_model(part: Part, told: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    given = {key: value for key, value in told.items() if value is not None}
    config = LlamaConfig(**given, attn_implementation="sdpa")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(part.device), torch.no_grad():
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(before)
    family = next(f for f in FAMILIES if f.name == "llama")
    parameters = dict(model.named_parameters())
    shape = family.config_from_hf(told)
    with torch.no_grad():
        for binding in bind(family.rules(shape), "safetensors", shape.num_layers):
            own = parameters.get(binding.source)
            if own is None or binding.shape is None or binding.optional:
                continue
            if len(binding.shape) == 1:
                own.fill_(1.0)
            else:
                seed = crc32(binding.name.encode())
                own.copy_(random_matrix("bf16", *binding.shape, part.device, seed).codes)
    return model


def agreement(part: Part, theirs: Any) -> dict[str, Any]:
    """Log-probs of our greedy answer, as both see them."""
    model, ops, _ = random_model("llama", part.small, part.tables)
    a_block = sum(spec.block_bytes for spec in model.kv_specs("bf16"))
    longest = 96 if part.small else 256
    engine = engine_of(model, ops, kv_memory=a_block * 32, max_rows=2, max_context=longest)
    prompt = random_prompt(engine, 12 if part.small else 64, 5)
    ((ids, logprobs),) = tokens_of(engine, [prompt], 4 if part.small else 32, temperature=0.0)
    with torch.no_grad():
        whole = torch.tensor([prompt + ids], device=part.device)
        logits = theirs(whole).logits[0, len(prompt) - 1 : -1].float()
    told = torch.log_softmax(logits, 1).gather(1, torch.tensor(ids, device=part.device)[:, None])
    difference = float((told[:, 0] - torch.tensor(logprobs, device=part.device)).abs().max())
    spread = float(logits.std())
    return {
        "largest_difference": difference,
        "equal_tokens": sum(map(int.__eq__, logits.argmax(1).tolist(), ids)),
        "right": difference < 0.1 * max(1.0, spread),
    }


def decode(part: Part, model: Any, batch: int) -> dict[str, Any]:
    """From the time of two lengths: the prompt's cancels out."""
    prompt = 9 if part.small else 512
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt), device=part.device)
    few, many = (2, 4) if part.small else (8, 40)

    def generate(count: int) -> float:
        begun = time.perf_counter()
        with torch.no_grad():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=count,
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
                **({} if part.small else {"cache_implementation": "static"}),
            )
        wait(part)
        return time.perf_counter() - begun

    generate(few)  # compiles
    seconds = max(generate(many) - generate(few), 1e-9)
    return {"tokens_per_s": batch * (many - few) / seconds}


def prefill(part: Part, model: Any, length: int) -> dict[str, Any]:
    ids = torch.randint(0, model.config.vocab_size, (1, length), device=part.device)

    def forward() -> float:
        begun = time.perf_counter()
        with torch.no_grad():
            model(ids, use_cache=True, logits_to_keep=1)
        wait(part)
        return time.perf_counter() - begun

    forward()
    return {"tokens_per_s": length / forward()}
