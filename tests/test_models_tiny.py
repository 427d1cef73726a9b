"""All families against transformers in float32, on tiny random models of odd sizes."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from elinvar.models.family import Model
from elinvar.models.load import load_model
from elinvar.models.registry import FAMILIES, find_family, read_config
from elinvar.ops import Ops, load_provider
from elinvar.weights.checkpoint import open_checkpoint
from elinvar.weights.load import load_weights
from elinvar.weights.rules import as_published
from elinvar.weights.save import save_state
from families import CASES, ENGINES
from families.base import SIZES
from helpers import Span, assert_parity, make_batch, make_cache, run_sequences, run_tokens

torch = pytest.importorskip("torch")
torch_files = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")

VOCAB = SIZES["vocab_size"]
LENGTH = 75
"""Longer than two blocks and nine windows."""


def make_reference(case: str, dtype: Any = torch.float32) -> Any:
    """A transformers model with random weights; norm gains are random too."""
    one = CASES[case]
    torch.manual_seed(len(case))
    # A copy: transformers writes into the dictionaries that it is given.
    settings = deepcopy(SIZES | one.settings)
    if one.around is not None:
        settings = deepcopy(one.around) | {"text_config": settings}
    settings = getattr(transformers, one.config)(**settings)
    model = getattr(transformers, one.architecture)(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than the usual 0.02, so that every part of the model matters.
            parameter.normal_(0.0, 0.25) if parameter.dim() > 1 else parameter.add_(
                torch.randn_like(parameter) * 0.2
            )
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                # Delta nets that remember, as trained ones do. One that forgets at once gives a
                # multiple of v, normed, and where that is near 0 all is rounding.
                parameter.sub_(3.0)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.normal_(0.0, 0.2)
    return model.to(dtype).eval()


@cache
def prompt(seed: int = 0, length: int = LENGTH) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(3, VOCAB, length).tolist())


def save(case: str, reference: Any, folder: Path) -> None:
    """As checkpoints of the family are published."""
    reference.save_pretrained(folder)
    if published := CASES[case].published:
        path, weights = folder / "config.json", folder / "model.safetensors"
        config = json.loads(path.read_text())
        tensors = torch_files.load_file(weights)
        # As bits, since numpy knows no bfloat16.
        bits = {name: tensor.view(torch.int16).numpy() for name, tensor in tensors.items()}
        bits = published.tensors(config, bits)
        tensors = {n: torch.from_numpy(b.copy()).view(reference.dtype) for n, b in bits.items()}
        torch_files.save_file(tensors, weights)
        config = published.config(config) | {"architectures": [published.architecture]}
        path.write_text(json.dumps(config))


def read_back(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def reference_logits(reference: Any, ids: tuple[int, ...]) -> Any:
    with torch.no_grad():
        return reference(torch.tensor([ids])).logits[0].numpy()


@pytest.fixture(scope="module", params=["ref", "cpu"])
def ops(request: pytest.FixtureRequest) -> Ops:
    return load_provider(request.param)


def load_f32(path: Path, ops: Ops) -> Model:
    return load_model(open_checkpoint(path), ops, weight_format="f32")


@pytest.mark.parametrize("case", CASES)
def test_parity_with_transformers(case: str, ops: Ops, tmp_path: Path) -> None:
    reference = make_reference(case)
    save(case, reference, tmp_path)
    model = load_f32(tmp_path, ops)
    expected = reference_logits(reference, prompt())
    for chunk in (LENGTH, 33, 1):
        assert_parity(run_tokens(model, ops, prompt(), chunk), expected)


def test_every_family_is_here() -> None:
    names = {family.name for family in FAMILIES}
    assert set(ENGINES) == names
    for family in FAMILIES:
        cases = [case for case in CASES.values() if case.family == family.name]
        assert len(cases) >= 2, f"{family.name} has fewer than two tiny configurations"
        names = {
            case.published.architecture if case.published else case.architecture for case in cases
        }
        assert names == set(family.hf_architectures)


@pytest.mark.parametrize("case", CASES)
def test_greedy_steps(case: str, tmp_path: Path) -> None:
    """A prompt in one piece, then a token a step: the same tokens, and their log-probs."""
    reference, ops = make_reference(case), load_provider("cpu")
    save(case, reference, tmp_path)
    model = load_f32(tmp_path, ops)
    start = prompt(1, 40)
    with torch.no_grad():
        ids = reference.generate(
            torch.tensor([start]), max_new_tokens=32, min_new_tokens=32, do_sample=False
        )
    sequence = tuple(ids[0].tolist())
    expected = reference_logits(reference, sequence)
    found = run_tokens(model, ops, sequence, 1)
    assert_parity(found, expected)
    # The end token may not come here: generate() was told so.
    found[:, SIZES["eos_token_id"]] = -np.inf
    assert found[len(start) - 1 : -1].argmax(-1).tolist() == list(sequence[len(start) :])


@pytest.mark.parametrize("case", ["llama", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_in_shards(case: str, dtype: Any, ops: Ops, tmp_path: Path) -> None:
    reference = make_reference(case, dtype)
    reference.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = load_f32(tmp_path, ops)
    expected = reference_logits(read_back(tmp_path), prompt())
    assert_parity(run_tokens(model, ops, prompt()), expected)


@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_sequences_do_not_see_each_other(case: str, ops: Ops, tmp_path: Path) -> None:
    make_reference(case).save_pretrained(tmp_path)
    model = load_f32(tmp_path, ops)
    prompts = [prompt(seed, length) for seed, length in enumerate((5, 40, 33))]
    together = run_sequences(model, ops, prompts, chunk=16)
    for ids, logits in zip(prompts, together, strict=True):
        alone = run_tokens(model, ops, ids)
        # The oracle's sums go through BLAS, whose order is its own.
        if ops.name == "ref":
            assert_parity(logits, alone, 1e-6)
        else:
            assert np.array_equal(logits, alone)


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if not case.published])
def test_saved_state_is_what_transformers_reads(case: str, tmp_path: Path) -> None:
    make_reference(case).save_pretrained(tmp_path / "a")
    checkpoint = open_checkpoint(tmp_path / "a")
    config = read_config(checkpoint)
    rules = as_published(find_family(checkpoint).rules(config), checkpoint.tensors)
    state = load_weights(checkpoint, rules, config)
    save_state(state, rules, config.num_layers, tmp_path / "b", checkpoint.metadata)
    ops = load_provider("ref")
    model = load_f32(tmp_path / "a", ops)
    expected = reference_logits(read_back(tmp_path / "b"), prompt())
    assert_parity(run_tokens(model, ops, prompt()), expected)


def test_a_bare_model_is_found(tmp_path: Path) -> None:
    reference, ops = make_reference("gpt2"), load_provider("cpu")
    reference.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({name.removeprefix("transformer."): t for name, t in tensors.items()}, path)
    expected = reference_logits(reference, prompt())
    assert_parity(run_tokens(load_f32(tmp_path, ops), ops, prompt()), expected)


@pytest.mark.parametrize("case", ["qwen3-5-moe", "qwen3-5-moe-seeing"])
def test_stacks_of_experts_are_found(case: str, tmp_path: Path) -> None:
    """As Qwen3.5 is published: the gate and the up of all experts in one tensor, the downs in one."""
    reference, ops = make_reference(case), load_provider("cpu")
    reference.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for stem in {name.partition("experts.")[0] for name in tensors if ".experts." in name}:
        gate, up, down = (
            [tensors.pop(f"{stem}experts.{e}.{part}_proj.weight") for e in range(10)]
            for part in ("gate", "up", "down")
        )
        pairs = [np.concatenate(pair) for pair in zip(gate, up, strict=True)]
        tensors[f"{stem}experts.gate_up_proj"] = np.stack(pairs)
        tensors[f"{stem}experts.down_proj"] = np.stack(down)
    save_file(tensors, path)
    expected = reference_logits(reference, prompt())
    assert_parity(run_tokens(load_f32(tmp_path, ops), ops, prompt()), expected)


@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_no_logits_asked_for(case: str, ops: Ops, tmp_path: Path) -> None:
    make_reference(case).save_pretrained(tmp_path)
    model = load_f32(tmp_path, ops)
    batch = make_batch([Span(prompt(), 0, 40, [1, 0])], len(model.kv_specs("f16")))
    batch = replace(batch, logit_rows=np.empty(0, np.int32))
    assert model.forward(batch, make_cache(model, ops, 2, "f16")).shape == (0, VOCAB)
