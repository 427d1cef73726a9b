"""Real models: float32 parity with transformers, and what quantisation costs.

The reference's weights come from the same file through a table of names of this test's own, so
that a wrong rule in the package cannot hide. (transformers' own GGUF loader needs accelerate.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elinvar.engine.tokenizer import Tokenizer, load_tokenizer
from elinvar.models.family import Model
from elinvar.models.load import load_model
from elinvar.ops import Ops, load_provider
from elinvar.weights.checkpoint import Checkpoint, open_checkpoint
from elinvar.weights.quants import dequantize
from helpers import assert_parity, greedy, iterate_tokens

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
initialization = pytest.importorskip("transformers.initialization")

pytestmark = pytest.mark.model

TEXT = (Path(__file__).parent / "data" / "prose.txt").read_text(encoding="utf-8")
NUM_TEXT_TOKENS = 4000
NUM_PARITY_TOKENS = 600
"""More than Gemma's window of 512."""
NUM_NEW_TOKENS = 24
PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a",
    "def fibonacci(n):\n",
    "Water boils at",
    "The quick brown fox",
    "In 1969, Neil Armstrong",
    "1, 2, 3, 4, 5,",
    "Dear Sir or Madam,\n",
    "import numpy as np\n\n",
    "The opposite of hot is",
    "To bake bread you need flour,",
    "Q: What is the largest planet?\nA:",
    "Roses are red, violets are",
    "SELECT name FROM users WHERE",
    "Shakespeare wrote",
    "The three primary colours are",
    "Je m'appelle",
    "E = mc",
    "She opened the door and",
    "<html>\n<head>\n",
]

COMMON_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
}
LLAMA_NAMES = COMMON_NAMES | {"ffn_norm": "post_attention_layernorm"}
GEMMA_NAMES = COMMON_NAMES | {
    "ffn_norm": "pre_feedforward_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass
class Pair:
    """One model in float32, ours and transformers'."""

    path: Path
    tokenizer: Tokenizer
    ops: Ops
    ours: Model
    theirs: Any


def smollm2_reference(checkpoint: Checkpoint) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
    )

    def convert(name: str, values: Any) -> Any:
        heads = {"attn_q": 9, "attn_k": 3}.get(name)
        if heads is None:
            return values
        # llama.cpp interleaves the two halves of every head's rotary pairs.
        return values.reshape(heads, 32, 2, -1).swapaxes(1, 2).reshape(values.shape)

    return reference(transformers.LlamaForCausalLM, config, checkpoint, LLAMA_NAMES, convert)


def gemma_reference(checkpoint: Checkpoint) -> Any:
    config = transformers.Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        max_position_embeddings=32768,
        sliding_window=512,
        query_pre_attn_scalar=256,
    )

    def convert(name: str, values: Any) -> Any:
        # llama.cpp stores gains with the 1 that Gemma adds.
        return values - 1 if "norm" in name else values

    return reference(transformers.Gemma3ForCausalLM, config, checkpoint, GEMMA_NAMES, convert)


def reference(
    model_class: Any, config: Any, checkpoint: Checkpoint, names: dict[str, str], convert: Any
) -> Any:
    state = {}
    for full_name, tensor in checkpoint.tensors.items():
        found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", full_name)
        assert found, full_name
        layer, name = found.groups()
        prefix = f"model.layers.{layer}." if layer else ""
        values = np.ascontiguousarray(convert(name, dequantize(tensor)))
        state[f"{prefix}{names[name]}.weight"] = torch.from_numpy(values)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with initialization.no_init_weights():
        model = model_class(config)
    model.load_state_dict(state, assign=True)
    return model.eval()


@pytest.fixture(scope="module", params=["smollm2", "gemma"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    path: Path = request.getfixturevalue(f"{request.param}_gguf")
    make_reference = {"smollm2": smollm2_reference, "gemma": gemma_reference}[request.param]
    checkpoint = open_checkpoint(path)
    ops = load_provider("cpu")
    ours = load_model(checkpoint, ops, weight_format="f32")
    tokenizer = load_tokenizer(checkpoint, None)
    yield Pair(path, tokenizer, ops, ours, make_reference(checkpoint))


def test_log_probs_of_every_position(pair: Pair) -> None:
    ids = pair.tokenizer.encode(TEXT)[:NUM_PARITY_TOKENS]
    with torch.no_grad():
        hidden = pair.theirs.model(torch.tensor([ids])).last_hidden_state[0]
        worst = 0.0
        for start, logits in iterate_tokens(pair.ours, pair.ops, ids, chunk=100):
            theirs = pair.theirs.lm_head(hidden[start : start + len(logits)]).numpy()
            worst = max(worst, assert_parity(logits, theirs))
    print(f"largest relative difference of a log-prob: {worst:.2e}")


def test_greedy_tokens(pair: Pair) -> None:
    # If transformers, given the prompt and our answer, would have chosen each of our tokens,
    # then its own greedy answer is ours, by induction: one pass instead of 24 a prompt. What is
    # padded on the right is seen by no token before it.
    prompts = [pair.tokenizer.encode(p) for p in PROMPTS]
    answers = greedy(pair.ours, pair.ops, prompts, NUM_NEW_TOKENS)
    longest = max(map(len, prompts)) + NUM_NEW_TOKENS
    padded = [
        p + a + [0] * (longest - len(p) - len(a)) for p, a in zip(prompts, answers, strict=True)
    ]
    with torch.no_grad():
        hidden = pair.theirs.model(torch.tensor(padded)).last_hidden_state
        for row, prompt, answer in zip(hidden, prompts, answers, strict=True):
            last = row[len(prompt) - 1 : len(prompt) - 1 + NUM_NEW_TOKENS]
            assert pair.theirs.lm_head(last).argmax(-1).tolist() == answer


def perplexity(model: Model, ops: Ops, ids: list[int], kv_dtype: Any) -> float:
    total = 0.0
    for start, logits in iterate_tokens(model, ops, ids, 250, kv_dtype):
        targets = torch.tensor(ids[start + 1 : start + 1 + len(logits)])
        scored = torch.from_numpy(logits[: len(targets)])
        total += float(torch.nn.functional.cross_entropy(scored, targets, reduction="sum"))
    return float(np.exp(total / (len(ids) - 1)))


def test_quantised_perplexity(pair: Pair) -> None:
    ids = pair.tokenizer.encode(TEXT)[:NUM_TEXT_TOKENS]
    assert len(ids) == NUM_TEXT_TOKENS
    shipped = load_model(open_checkpoint(pair.path), pair.ops)
    expected = perplexity(pair.ours, pair.ops, ids, "f32")
    found = perplexity(shipped, pair.ops, ids, "f16")
    print(f"perplexity {found:.4f} as shipped, {expected:.4f} dequantised")
    assert abs(found / expected - 1) < 0.005
