"""Vectors and scores on the provider for GPUs, under Triton's interpreter: close to the CPU's, and a text
alone has the bits that it has in a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
pytest.importorskip("transformers")

from elinvar import Embedder  # noqa: E402
from elinvar.nn.pooling import Pooling  # noqa: E402
from elinvar.ops import load_provider  # noqa: E402
from elinvar.ops.triton.provider import TritonOps  # noqa: E402
from elinvar.run.texts import Text, TextRunner  # noqa: E402
from test_encoders import CONFIG, FAMILY, token_ids, weights  # noqa: E402
from text_models import TEXTS, change, save_model, save_recipe  # noqa: E402

SOME = [TEXTS[i] for i in (0, 1, 3, 4, 11)]
MODELS = {
    "bert": ("BertModel", ["mean"], ["Dense", "Normalize"]),
    "nomic": ("NomicBertModel", ["max", "cls", "weightedmean"], []),
    "xlm-roberta": ("XLMRobertaModel", ["cls"], ["Normalize"]),
    "qwen3": ("Qwen3Model", ["lasttoken"], ["Normalize"]),
}


@pytest.mark.parametrize("kind", MODELS)
def test_vectors_are_those_of_the_cpu_and_do_not_depend_on_company(
    kind: str, tmp_path: Path
) -> None:
    architecture, modes, more = MODELS[kind]
    save_model(tmp_path, kind, architecture)
    save_recipe(tmp_path, {"pooling_mode": modes if len(modes) > 1 else modes[0]}, *more)
    embedder = Embedder(tmp_path, device="cuda")
    found = embedder.embed(SOME)
    np.testing.assert_allclose(found, Embedder(tmp_path).embed(SOME), atol=2e-5)
    assert found.dtype == np.float32 and found.shape[1] == embedder.model.num_dims
    for i in (1, 4):
        assert np.array_equal(embedder.embed([SOME[i]])[0], found[i])
    short = embedder.embed(SOME[:1], dimensions=16)
    assert short.shape == (1, 16)


DOCUMENTS = ["a metal", "", "it does not grow " * 3]


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "qwen3", "vectors"])
def test_scores_are_those_of_the_cpu_and_do_not_depend_on_company(
    kind: str, tmp_path: Path
) -> None:
    """By a head, with its sigmoid; by yes or no; by comparing vectors."""
    if kind == "qwen3":
        save_model(tmp_path, kind, "Qwen3ForCausalLM", tie_word_embeddings=True)
        change(tmp_path / "tokenizer_config.json", model_max_length=400)
    elif kind == "vectors":
        save_model(tmp_path, "bert", "BertModel")
        save_recipe(tmp_path, {"pooling_mode": "mean"})
    else:
        name = {"bert": "Bert", "xlm-roberta": "XLMRoberta"}[kind]
        save_model(tmp_path, kind, f"{name}ForSequenceClassification", num_labels=1)
    embedder = Embedder(tmp_path, device="cuda")
    found = embedder.rank("metal?", DOCUMENTS)
    expected = Embedder(tmp_path).rank("metal?", DOCUMENTS)
    assert [one.index for one in found] == [one.index for one in expected]
    np.testing.assert_allclose(
        [one.score for one in found], [one.score for one in expected], atol=2e-5
    )
    for one in found[-1:]:
        assert embedder.rank("metal?", [DOCUMENTS[one.index]])[0].score == one.score


@pytest.mark.parametrize(("family", "kind"), [("bert", "f16"), ("roberta", "bf16")])
def test_encoders_of_half_precision(family: str, kind: str) -> None:
    """Keys and values are kept as they were computed."""
    texts = [Text(token_ids(n, n)) for n in (35, 1, 9)]

    def vectors(device: Any, texts: list[Text]) -> np.ndarray:
        ops = load_provider(device)
        config, own = CONFIG[family], weights(family, kind)
        ops.prepare(own)
        assert ops.widest_kv == (kind if device == "cuda" else "f32")
        model = FAMILY[family].build(config, own, ops)
        pooling = Pooling(("mean", "max"), ops)
        hidden, starts = TextRunner(model, ops).hidden(texts, pooling.rows)
        return ops.fetch(pooling(hidden, starts))

    found = vectors("cuda", texts)
    np.testing.assert_allclose(found, vectors("cpu", texts), atol=0.05, rtol=0.02)
    for i, text in enumerate(texts):
        assert np.array_equal(vectors("cuda", [text])[0], found[i])


def test_on_a_device_a_model_takes_its_memory_when_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path, "bert", "BertModel")
    save_recipe(tmp_path, {"pooling_mode": "mean"})
    monkeypatch.setattr(TritonOps, "available_memory", lambda self: 2**30)
    monkeypatch.setattr(TritonOps, "full_batch", 4 * 32)
    model: Any = Embedder(tmp_path, device="cuda").model
    assert model.batch_blocks == model._runner._num_blocks == 4
    assert model._ops._matrices._joined
