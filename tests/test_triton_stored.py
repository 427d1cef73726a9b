"""Quantised checkpoints on the provider for GPUs, under Triton's interpreter: matrices stay as files hold
them, and answers are those of the values that they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from elinvar.base.config import EngineConfig  # noqa: E402
from elinvar.engine.described import describe  # noqa: E402
from elinvar.engine.devices import CHIPS  # noqa: E402
from elinvar.engine.forecast import Run  # noqa: E402
from elinvar.models.load import load_model  # noqa: E402
from elinvar.ops import Weight, load_provider  # noqa: E402
from elinvar.ops.layout import WeightKind, pack_stored, unpack  # noqa: E402
from elinvar.ops.stored import STORED  # noqa: E402
from elinvar.ops.triton import gather, linear, matrices, panels, rows  # noqa: E402
from elinvar.ops.triton.sizes import TAKEN, matrix_bytes  # noqa: E402
from elinvar.weights.checkpoint import open_checkpoint  # noqa: E402
from engines import random_parts  # noqa: E402
from families.base import SIZES  # noqa: E402
from helpers import Span, assert_parity, log_softmax, make_batch, make_cache  # noqa: E402
from test_gpt_oss import dequantised, save_mxfp4  # noqa: E402
from test_stored import FORMS  # noqa: E402

SMALL = SIZES | {"num_hidden_layers": 1, "intermediate_size": 96}
IDS = np.random.default_rng(0).integers(3, 97, 12).tolist()


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize(("n", "k"), [(40, 160), (16, 32)])
def test_panels_become_matrices(kind: WeightKind, n: int, k: int) -> None:
    parts = random_parts(np.random.default_rng(n), kind, n, k)
    w = pack_stored(kind, parts)
    found = panels.stored(w, "cpu")
    assert found.keys() == parts.keys()
    assert all(np.array_equal(found[name].numpy(), parts[name]) for name in parts)
    there = matrices.from_weight(w, torch.bfloat16, "cpu")
    assert there.kind == kind and there.nbytes == matrix_bytes(kind, (n, k))
    np.testing.assert_allclose(gather.unpack(there).numpy(), unpack(w), rtol=2e-7, atol=0)


def test_rows_are_rounded_for_a_matrix_of_int8() -> None:
    """Of all products: by heads and gated as plain, a row alone as among others."""
    parts = random_parts(np.random.default_rng(0), "int8", 96, 64)
    w = matrices.from_weight(pack_stored("int8", parts), torch.bfloat16, "cpu")
    x = torch.randn(17, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = linear.linear(x, [w], dtype=torch.float32)
    assert torch.equal(y, linear.quantised_linear(*gather.quantise_rows(x), w, torch.float32))
    assert torch.equal(linear.linear(x[3:5], [w], dtype=torch.float32), y[3:5])
    both = rows.gated(y, "silu", torch.bfloat16)
    assert torch.equal(linear.gated_linear(x, w, "silu"), both)
    assert torch.equal(
        linear.head_linear(torch.cat([x, x], 1), w, 2).float()[:, :48], y.bfloat16()[:, :48].float()
    )


def publish(folder: Path, model: Any, form: str) -> None:
    """As it is published: what is quantised, and a folder of the values that stands for."""
    settings, packer, _ = FORMS[form]
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2) if parameter.dim() > 1 else None
    model.save_pretrained(folder / "dense")
    dense, state = load_file(folder / "dense" / "model.safetensors"), {}
    for name, value in dense.items():
        if "_proj" not in name:
            state[name] = value
            continue
        tensors, values = packer(value.numpy())
        stem = name.removesuffix(".weight")
        state |= {stem + key: t.contiguous() for key, t in tensors.items()}
        dense[name] = torch.from_numpy(values)
    save_file(dense, folder / "dense" / "model.safetensors", {"format": "pt"})
    save_file(state, folder / "model.safetensors")
    config = json.loads((folder / "dense" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


def expected_of(folder: Path) -> Any:
    load = transformers.AutoModelForCausalLM.from_pretrained
    return logits_of(load(folder / "dense").float().eval())


def logits_of(reference: Any) -> Any:
    with torch.no_grad():
        return reference(torch.tensor([IDS])).logits[0].numpy()


def forward(folder: Path, kinds: set[str], alone: bool = False) -> Any:
    """Logits on the provider for GPUs, whose quantised matrices are of these kinds, and what is planned
    is what comes. alone: rows have their bits by themselves."""
    ops: Any = load_provider("cuda")
    model: Any = load_model(open_checkpoint(folder), ops)
    weights = {name: w for name, w in model.weights.items() if isinstance(w, Weight)}
    assert {w.kind for w in weights.values() if w.kind != "f32"} == kinds
    groups = len(model.kv_specs("f32"))

    def run(*spans: Span) -> Any:
        batch = ops.upload(make_batch(spans, groups))
        return model.forward(batch, make_cache(model, ops, 3, "f32"))

    found = run(Span(IDS[5:], 0, 3, [1]), Span(IDS, 0, len(IDS), [2]))[3:]
    if alone:
        assert torch.equal(run(Span(IDS, 0, 5, [1])), found[:5])
    planned = Run(describe(folder, stored=TAKEN), EngineConfig(device="cuda"), CHIPS["h200"])
    vectors = sum(w.nbytes for w in model.weights.values() if not isinstance(w, Weight))
    held = sum(matrix_bytes(w.kind, w.shape) for w in weights.values())
    assert planned.weights == held + vectors
    on_device = [*ops._matrices._joined.values()]
    on_device += [[e.both, e.downs] for e in ops._matrices._experts.values()]
    assert sum(m.nbytes for some in on_device for m in some) == held
    return found.numpy()


@pytest.mark.parametrize("form", ["fp8-channel", "nvfp4", "mxfp4", "w8a8"])
def test_a_tiny_llama(form: str, tmp_path: Path) -> None:
    """The head is f32, and so are activations."""
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=False)
    publish(tmp_path, transformers.LlamaForCausalLM(config), form)
    found, expected = forward(tmp_path, {FORMS[form][2]}, form == "w8a8"), expected_of(tmp_path)
    if form != "w8a8":
        assert_parity(found, expected)
        return
    off = log_softmax(found) - log_softmax(expected)  # activations are rounded
    assert 1e-4 < np.sqrt(np.mean(off**2)) < 0.1


def test_a_tiny_mixture(tmp_path: Path) -> None:
    """As Qwen3-30B-A3B in blocks: q, k and v, gates and ups are joined at borders that are none of
    these. What has no more than 128 inputs has in effect a scale a row."""
    sizes = {"hidden_size": 160, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    sizes |= {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = transformers.Qwen3MoeConfig(
        **SMALL | sizes, norm_topk_prob=True, tie_word_embeddings=False
    )
    publish(tmp_path, transformers.Qwen3MoeForCausalLM(config), "fp8-blocks")
    assert_parity(forward(tmp_path, {"fp8", "fp8-blocks"}, True), expected_of(tmp_path))


def test_gpt_oss(tmp_path: Path) -> None:
    """Parts of stacks, gate and up in turns."""
    save_mxfp4(tmp_path, num_hidden_layers=1)
    assert_parity(forward(tmp_path, {"mxfp4"}), logits_of(dequantised(tmp_path)))
