"""Encoders against transformers in float32, on tiny random models; and the contract: the bits of a text's
vectors are those of the text alone, whatever texts share its batch, on whatever threads."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elinvar import _cpu
from elinvar.base.errors import ModelError
from elinvar.models.load import load_encoder
from elinvar.models.registry import ENCODERS, find_encoder, find_family, read_config
from elinvar.nn.encoder import Encoder
from elinvar.nn.pooling import Pooling
from elinvar.ops import Ops, load_provider
from elinvar.run.texts import Text, TextRunner, batches
from elinvar.weights.checkpoint import open_checkpoint
from elinvar.weights.load import load_weights
from elinvar.weights.rules import bind
from elinvar.weights.save import save_state
from encoder_families import CASES, ENGINES
from engines import random_weight
from families.base import SIZES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FAMILY = {family.name: family for family in ENCODERS}
CONFIG = {config.family: config for config in ENGINES}
BERT_SIZES = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
LENGTHS = (1, 75, 3, 32, 33, 128)


def make_reference(case: str) -> Any:
    """Random weights, as in test_models_tiny.py; biases and norms, too."""
    one = CASES[case]
    torch.manual_seed(len(case))
    settings = getattr(transformers, one.config)(**deepcopy(BERT_SIZES | one.settings))
    model = getattr(transformers, one.architecture)(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.25) if parameter.dim() > 1 else parameter.add_(
                torch.randn_like(parameter) * 0.2
            )
    return model.eval()


def token_ids(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([length, seed]).integers(3, SIZES["vocab_size"], length).tolist()


def load(path: Path, ops: Ops) -> Encoder:
    found = load_encoder(open_checkpoint(path), ops, weight_format="f32")
    assert isinstance(found, Encoder)
    return found


def close(ours: Any, theirs: Any, tolerance: float = 3e-5) -> None:
    """Within `tolerance` of the largest number there."""
    theirs = theirs.numpy()
    assert np.abs(ours - theirs).max() <= tolerance * max(1.0, np.abs(theirs).max())


@pytest.mark.parametrize("provider", ["ref", "cpu"])
@pytest.mark.parametrize("case", CASES)
def test_parity_with_transformers(case: str, provider: str, tmp_path: Path) -> None:
    reference, ops = make_reference(case), load_provider(provider)
    reference.save_pretrained(tmp_path)
    reference.double()  # in float32 its own error is as large as ours
    model = load(tmp_path, ops)
    typed = reference.config.type_vocab_size > 1
    texts = [Text(token_ids(n), [int(typed and i > n // 2) for i in range(n)]) for n in LENGTHS]
    runner, every = TextRunner(model, ops), Pooling(("mean",), ops).rows
    hidden, starts = runner.hidden(texts, every)
    first, _ = runner.hidden(texts, Pooling(("cls",), ops).rows)
    assert np.array_equal(first, hidden[starts[:-1]]) or provider == "ref"
    for i, text in enumerate(texts):
        inputs = {"input_ids": torch.tensor([text.ids])}
        if typed:
            inputs["token_type_ids"] = torch.tensor([text.type_ids])
        with torch.no_grad():
            expected = reference(**inputs, output_hidden_states=True)
        close(hidden[starts[i] : starts[i + 1]], expected.hidden_states[-1][0])
        if model.encoder.num_labels:
            assert expected.logits.shape[1] == model.encoder.num_labels
            close(model.scores(first[i : i + 1]), expected.logits)


def test_every_family_and_architecture_is_here() -> None:
    assert set(CONFIG) == set(FAMILY)
    for family in ENCODERS:
        cases = [case for case in CASES.values() if case.family == family.name]
        assert {case.architecture for case in cases} == set(family.hf_architectures)


@pytest.mark.parametrize("case", ["bert-scores", "bert-masked", "xlm-roberta-scores"])
def test_saved_state_is_what_transformers_reads(case: str, tmp_path: Path) -> None:
    reference, ops = make_reference(case), load_provider("cpu")
    reference.save_pretrained(tmp_path / "a")
    checkpoint = open_checkpoint(tmp_path / "a")
    family, config = find_encoder(checkpoint), read_config(checkpoint)
    assert family is not None
    rules = family.rules(config)
    state = load_weights(checkpoint, rules, config)
    save_state(state, rules, config.num_layers, tmp_path / "b", checkpoint.metadata)
    text = Text(token_ids(40))
    found = [
        TextRunner(load(tmp_path / name, ops), ops).hidden([text], Pooling(("mean",), ops).rows)[0]
        for name in "ab"
    ]
    assert np.array_equal(*found)


@cache
def weights(family: str, kind: str) -> dict[str, Any]:
    config, rng = CONFIG[family], np.random.default_rng(7)
    found: dict[str, Any] = {}
    for binding in bind(FAMILY[family].rules(config), "safetensors", config.num_layers):
        assert binding.shape is not None
        if len(binding.shape) == 2:
            found[binding.name] = random_weight(rng, kind, *binding.shape)
        else:
            found[binding.name] = rng.uniform(0.5, 1.5, binding.shape).astype(np.float32)
    return found


@pytest.mark.parametrize("kind", ["q4", "q8", "bf16", "f32"])
@pytest.mark.parametrize("family", FAMILY)
def test_bits_of_a_text_are_its_own(family: str, kind: str) -> None:
    """Alone and among 64 others, on every instruction set, on one thread and several."""
    rng = np.random.default_rng(3)
    lengths = [40, 1, 500, *rng.integers(1, 90, 61).tolist()]
    texts = [Text(token_ids(n, seed)) for seed, n in enumerate(lengths)]
    threads = [(level, n) for level in _cpu.available() for n in (1, 3)]
    found = [vectors(family, kind, one, texts) for one in threads]
    for other in found:
        assert other.tobytes() == found[0].tobytes()
    backwards = vectors(family, kind, threads[0], texts[::-1])
    assert backwards[::-1].tobytes() == found[0].tobytes()
    for i in (0, 1, 2, 63):
        assert vectors(family, kind, threads[0], [texts[i]])[0].tobytes() == found[0][i].tobytes()


def vectors(family: str, kind: str, threads: tuple[str, int], texts: list[Text]) -> Any:
    """Pooled in three ways, and what the head says."""
    ops = load_provider("cpu", threads[1], threads[0])
    model = FAMILY[family].build(CONFIG[family], weights(family, kind), ops)
    pooling = Pooling(("mean", "max", "weightedmean"), ops)
    hidden, starts = TextRunner(model, ops).hidden(texts, pooling.rows)
    first = np.ascontiguousarray(hidden[starts[:-1]])
    scores = [model.scores(first)] if model.encoder.num_labels else []
    return np.concatenate([pooling(hidden, starts), *scores], axis=1)


def test_batches_hold_their_budget_and_their_order() -> None:
    texts = [Text([0] * n) for n in (33, 1, 200, 64, 1, 1)]
    assert [[t.num_blocks for t in b] for b in batches(texts, 4)] == [[2, 1], [7], [2, 1, 1]]
    assert list(batches([], 4)) == []


def test_an_encoder_generates_nothing(tmp_path: Path) -> None:
    make_reference("bert").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"is an encoder \(BertModel\).*elinvar embed"):
        find_family(open_checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"id2label": []}, "id2label"),
        ({"id2label": "x"}, "id2label"),
        ({"type_vocab_size": 0}, "type_vocab_size"),
        ({"hidden_act": "mish"}, "hidden_act"),
        ({"layer_norm_eps": None}, "layer_norm_eps"),
    ],
)
def test_bad_configurations_are_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    make_reference("bert-scores").save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.metadata.update(changes)
    with pytest.raises(ModelError, match=words):
        read_config(checkpoint)


def test_a_table_of_positions_that_holds_padding_alone(tmp_path: Path) -> None:
    make_reference("roberta").save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.metadata["max_position_embeddings"] = 2
    with pytest.raises(ModelError, match="max_position_embeddings"):
        read_config(checkpoint)
