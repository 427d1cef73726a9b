"""Embedder against transformers and sentence-transformers, on tiny random models and on a real one."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elinvar import Embedder
from elinvar.base.errors import InputError, ModelError
from elinvar.models.load import forgets
from elinvar.nn.decoder import Decoder
from elinvar.nn.pooling import Pooling
from elinvar.run.texts import Text, TextRunner
from engines import provider, tiny_model
from families import ENGINES
from helpers import run_tokens

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from text_models import (  # noqa: E402
    TEXTS,
    change,
    reference_vectors,
    save_model,
    save_recipe,
    write,
)

MODES = ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
LONGEST = 50
"""Of the folders that save_recipe writes."""


def close(ours: np.ndarray, theirs: Any, tolerance: float = 1e-5) -> None:
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    assert np.abs(ours - theirs).max() <= tolerance * max(1.0, np.abs(theirs).max())


def normalised(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def sentence_transformers_vectors(folder: Path, texts: list[str], **options: Any) -> Any:
    from sentence_transformers import SentenceTransformer

    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    return SentenceTransformer(str(folder), device="cpu").encode(texts, **options)


def cross_encoder_scores(folder: Path, pairs: list[tuple[str, str]]) -> Any:
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(folder), device="cpu").predict(pairs)


@pytest.mark.parametrize("mode", [*MODES, "cls+mean"])
@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "qwen3"])
def test_every_pooling(kind: str, mode: str, tmp_path: Path) -> None:
    architecture = {"bert": "BertModel", "xlm-roberta": "XLMRobertaModel", "qwen3": "Qwen3Model"}
    model = save_model(tmp_path, kind, architecture[kind])
    modes = mode.split("+")
    save_recipe(tmp_path, {"pooling_mode": modes if len(modes) > 1 else mode})
    found = Embedder(tmp_path).embed(TEXTS)
    close(found, reference_vectors(tmp_path, model, TEXTS, modes, LONGEST))
    theirs = sentence_transformers_vectors(tmp_path, TEXTS)
    close(found, theirs)


OLD = {f"pooling_mode_{name}": False for name in ("cls_token", "mean_tokens", "lasttoken")}


@pytest.mark.parametrize("more", [["Normalize"], ["Dense", "Normalize"], ["Dense"]])
def test_what_follows_pooling(more: list[str], tmp_path: Path) -> None:
    """With the keys of older files."""
    model = save_model(tmp_path, "bert", "BertModel")
    save_recipe(tmp_path, OLD | {"pooling_mode_mean_tokens": True}, *more)
    embedder = Embedder(tmp_path)
    found = embedder.embed(TEXTS)
    expected = reference_vectors(tmp_path, model, TEXTS, ["mean"], LONGEST)
    if "Dense" in more:
        from safetensors.numpy import load_file

        dense = load_file(tmp_path / "2_Dense" / "model.safetensors")
        expected = np.tanh(expected @ dense["linear.weight"].T + dense["linear.bias"])
    if "Normalize" in more:
        expected = normalised(expected)
    close(found, expected)
    assert embedder.model.num_dims == found.shape[1]
    theirs = sentence_transformers_vectors(tmp_path, TEXTS)
    close(found, theirs)


def test_a_decoder_without_files_says_what_is_assumed(tmp_path: Path) -> None:
    model = save_model(tmp_path, "qwen3", "Qwen3ForCausalLM", tie_word_embeddings=False)
    embedder = Embedder(tmp_path)
    assert "last token" in (embedder.model.notes(ranking=False) or "")
    expected = reference_vectors(tmp_path, model, TEXTS, ["lasttoken"], 64)
    close(embedder.embed(TEXTS), normalised(expected))


def test_prompts(tmp_path: Path) -> None:
    model = save_model(tmp_path, "qwen3", "Qwen3Model")
    prompts = {"query": "Instruct: find it\nQuery:", "document": ""}
    save_recipe(tmp_path, {"pooling_mode": "lasttoken"}, "Normalize", prompts=prompts)
    embedder, texts = Embedder(tmp_path), ["what is it?", "who?"]
    asked = [prompts["query"] + text for text in texts]
    expected = normalised(reference_vectors(tmp_path, model, asked, ["lasttoken"], LONGEST))
    found = embedder.embed(texts, prompt_name="query")
    close(found, expected)
    assert np.array_equal(found, embedder.embed(texts, prompt=prompts["query"]))
    theirs = sentence_transformers_vectors(tmp_path, texts, prompt_name="query")
    close(found, theirs)
    with pytest.raises(InputError, match="no prompt 'passage'; it has query, document"):
        embedder.embed(texts, prompt_name="passage")
    change(tmp_path / "config_sentence_transformers.json", default_prompt_name="query")
    assert np.array_equal(found, Embedder(tmp_path).embed(texts))
    documents = ["it is a cat", "nobody"]
    ranked = embedder.rank("what is it?", documents)
    likeness = embedder.embed(documents) @ embedder.embed(["what is it?"], prompt_name="query")[0]
    assert [r.index for r in ranked] == np.argsort(-likeness).tolist()
    assert [r.score for r in ranked] == pytest.approx(-np.sort(-likeness), abs=1e-6)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    save_model(folder, "bert", "BertModel")
    save_recipe(folder, {"pooling_mode": "mean"}, "Normalize")
    return folder


def test_vectors_do_not_depend_on_company(bert: Path) -> None:
    embedder = Embedder(bert, num_threads=1)
    together = embedder.embed(TEXTS * 4)
    for threads in (1, 3):
        alone = Embedder(bert, num_threads=threads)
        for text, vector in zip(TEXTS, together, strict=False):
            assert alone.embed([text]).tobytes() == vector.tobytes()
    assert np.array_equal(embedder.embed(TEXTS[::-1] * 4)[::-1], together)


def test_long_texts_are_cut_and_counted(bert: Path, caplog: pytest.LogCaptureFixture) -> None:
    embedder = Embedder(bert)
    with caplog.at_level(logging.WARNING, "elinvar"):
        embedder.embed(["short", "long " * 100, "long " * 200])
    assert "2 of 3 texts were cut to 50 tokens" in caplog.text
    found = list(embedder.stream(["short", "long " * 100]))
    assert [one.truncated for one in found] == [False, True] and found[1].num_tokens == 50
    with pytest.raises(InputError, match="Text 1 is longer than the 50 tokens"):
        embedder.embed(["short", "long " * 100], truncate=False)
    assert Embedder(bert, max_context=20).model.max_tokens == 20
    with pytest.raises(InputError, match="max_context must be above 3 tokens"):
        Embedder(bert, max_context=3)


def test_token_ids_are_taken_as_they_are(bert: Path) -> None:
    embedder = Embedder(bert)
    [text] = embedder.model.embedding(["the metal"]).texts
    assert np.array_equal(embedder.embed([text.ids]), embedder.embed(["the metal"]))
    assert next(iter(embedder.stream([[5] * 60]))).truncated
    for bad in ([10**6], [-1], [1.5], [True]):
        with pytest.raises(InputError, match="Token ids of text 0 must be from 0 to"):
            embedder.embed([bad])  # type: ignore[list-item]
    with pytest.raises(InputError, match="Text 0 has no token"):
        embedder.embed([[]])
    assert embedder.embed([]).shape == (0, 48)


def test_dimensions(bert: Path) -> None:
    embedder = Embedder(bert)
    whole, some = embedder.embed(TEXTS), embedder.embed(TEXTS, dimensions=16)
    close(some, normalised(whole[:, :16]))
    for wrong in (0, 49):
        with pytest.raises(InputError, match="dimensions must be from 1 to 48"):
            embedder.embed(TEXTS, dimensions=wrong)


def test_progress_and_order_over_many_batches(bert: Path) -> None:
    embedder = Embedder(bert)
    texts = [f"number {i} " * (i % 23) for i in range(300)]
    seen: list[int] = []
    found = embedder.embed(texts, progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == 300 and len(seen) > 3
    for i in (0, 17, 150, 299):
        assert np.array_equal(found[i], embedder.embed([texts[i]])[0])


def pairs_reference(folder: Path, model: Any, query: str, documents: list[str]) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    logits = []
    for document in documents:
        # Of lists: an empty text beside a text would be taken for none.
        inputs = tokenizer([query], [document], truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            logits.append(model(**inputs).logits[0, 0].item())
    return np.array(logits)


DOCUMENTS = ["a metal", "The balance wheel of a watch.", "", "it does not grow " * 30, "日本"]


@pytest.mark.parametrize("activation", [None, "linear.Identity", "activation.Sigmoid"])
@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("generation", [0, 1, 2])
def test_rerankers(generation: int, kind: str, activation: str | None, tmp_path: Path) -> None:
    """What is over the score is said in another file in each generation."""
    name = "Bert" if kind == "bert" else "XLMRoberta"
    model = save_model(tmp_path, kind, f"{name}ForSequenceClassification", num_labels=1)
    said = activation and f"torch.nn.modules.{activation}"
    if generation == 0:
        change(tmp_path / "config.json", sbert_ce_default_activation_function=said)
    elif generation == 1 and said:
        change(tmp_path / "config.json", sentence_transformers={"activation_fn": said})
    elif generation == 2:
        settings = {"activation_fn": said, "model_type": "CrossEncoder"}
        write(tmp_path / "config_sentence_transformers.json", settings)
        logits = {"text": {"method": "forward", "method_output_name": "logits"}}
        kinds = {"transformer_task": "sequence-classification", "module_output_name": "scores"}
        write(tmp_path / "sentence_bert_config.json", kinds | {"modality_config": logits})
        module = "sentence_transformers.base.modules.transformer.Transformer"
        write(tmp_path / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": module}])
    embedder = Embedder(tmp_path)
    query = "which metal does not grow?"
    ranked = embedder.rank(query, DOCUMENTS)
    logits = pairs_reference(tmp_path, model, query, DOCUMENTS)
    expected = logits if activation == "linear.Identity" else 1 / (1 + np.exp(-logits))
    scores = np.zeros(len(DOCUMENTS))
    scores[[r.index for r in ranked]] = [r.score for r in ranked]
    assert np.abs(scores - expected).max() <= 1e-5
    assert [r.score for r in ranked] == sorted(scores, reverse=True)
    assert [r.index for r in ranked if r.truncated] == [3]
    assert embedder.rank(query, DOCUMENTS, top_n=2) == ranked[:2]
    theirs = cross_encoder_scores(tmp_path, [(query, document) for document in DOCUMENTS])
    if generation:
        assert np.abs(scores - theirs).max() <= 1e-5
    alone = [embedder.rank(query, [document])[0].score for document in DOCUMENTS]
    assert alone == scores.tolist()
    with pytest.raises(ModelError, match="is a reranker and makes no vectors"):
        embedder.embed(["text"])
    with pytest.raises(InputError, match="Document 3"):
        embedder.rank(query, DOCUMENTS, truncate=False)


@pytest.mark.parametrize("new", [False, True])
def test_yes_or_no(new: bool, tmp_path: Path) -> None:
    """Qwen3-Reranker, by its published recipe: the prompt, the last token, yes against no."""
    model = save_model(tmp_path, "qwen3", "Qwen3ForCausalLM", tie_word_embeddings=True)
    change(tmp_path / "tokenizer_config.json", model_max_length=400)
    embedder = Embedder(tmp_path)
    assert "Qwen3-Reranker" in (embedder.model.notes(ranking=True) or "")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    before = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and"
        ' the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
        "<|im_start|>user\n"
    )
    after = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    if new:
        modules = [{"type": f"x.{name}", "path": ""} for name in ("Transformer", "LogitScore")]
        write(tmp_path / "modules.json", modules)
        assert Embedder(tmp_path).rank("metal?", DOCUMENTS) == embedder.rank("metal?", DOCUMENTS)
    expected = []
    for document in DOCUMENTS:
        asked = ids(f"<Instruct>: find it\n<Query>: metal?\n<Document>: {document}")
        room = 400 - len(ids(before)) - len(ids(after))
        whole = torch.tensor([ids(before) + asked[:room] + ids(after)])
        with torch.no_grad():
            last = model(whole).logits[0, -1, [tokenizer.get_vocab()[w] for w in ("no", "yes")]]
        expected.append(torch.log_softmax(last, -1)[1].exp().item())
    ranked = embedder.rank("metal?", DOCUMENTS, instruction="find it")
    assert {r.index: pytest.approx(r.score, abs=1e-5) for r in ranked} == dict(enumerate(expected))
    assert [r.score for r in ranked] == sorted((r.score for r in ranked), reverse=True)
    short = Embedder(tmp_path, max_context=100)
    with pytest.raises(InputError, match=r"above the \d+ tokens of this model's question, got 100"):
        short.rank("metal?", DOCUMENTS)


def test_what_cannot_be_run_is_said(tmp_path: Path) -> None:
    save_model(tmp_path, "bert", "BertModel")
    save_recipe(tmp_path, {"pooling_mode": "mean"}, "Normalize")

    def refused(words: str) -> None:
        with pytest.raises(ModelError, match=words) as caught:
            Embedder(tmp_path)
        assert "\n" not in str(caught.value)

    modules = json.loads((tmp_path / "modules.json").read_text())
    for broken, words in (
        ([*modules, modules[1] | {"type": "x.LSTM"}], "a module LSTM"),
        (modules[:1], "names no Pooling"),
        ([{"type": 3}], "no list of modules"),
        ({"a": 1}, "no list of modules"),
        ([modules[0], modules[1] | {"path": "../elsewhere"}], "no list of modules"),
    ):
        write(tmp_path / "modules.json", broken)
        refused(words)
    (tmp_path / "modules.json").write_text("{")
    refused("modules.json cannot be read as JSON")
    write(tmp_path / "modules.json", modules)
    for said, words in (
        ({"pooling_mode": "median"}, "pooling_mode"),
        ({"pooling_mode": [3]}, "pooling_mode"),
        ({"include_prompt": False}, "include_prompt"),
    ):
        write(tmp_path / "1_Pooling" / "config.json", said)
        refused(words)
    save_recipe(tmp_path, {"pooling_mode": "mean"}, "Dense")
    change(tmp_path / "2_Dense" / "config.json", out_features=21)
    refused("linear.weight of shape")
    save_recipe(tmp_path, {"pooling_mode": "mean"}, prompts={"query": 3})
    refused("prompts")
    save_recipe(tmp_path, {"pooling_mode": "mean"}, default_prompt_name="query")
    refused("default_prompt_name")


def test_a_tokenizer_of_another_model_is_refused(bert: Path, tmp_path: Path) -> None:
    """An id beyond a table would be read from wherever it points."""
    save_model(tmp_path, "bert", "BertModel")
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    added = described["added_tokens"][0] | {"id": 5000, "content": "beyond"}
    for broken in (
        described | {"added_tokens": [*described["added_tokens"], added]},
        json.loads(json.dumps(described).replace('"type_id": 0', '"type_id": 7')),
    ):
        if broken["added_tokens"] != described["added_tokens"]:
            broken["model"] = described["model"] | {
                "vocab": described["model"]["vocab"] | {"beyond": 5000}
            }
        write(tmp_path / "tokenizer.json", broken)
        with pytest.raises(ModelError, match="do not belong together"):
            Embedder(tmp_path).embed(["one beyond two"])


def test_a_classifier_cannot_rank(tmp_path: Path) -> None:
    save_model(tmp_path, "bert", "BertForSequenceClassification", num_labels=3)
    with pytest.raises(ModelError, match="tells 3 labels apart and cannot rank"):
        Embedder(tmp_path)


def test_vocab_txt_alone(bert: Path, tmp_path: Path) -> None:
    """The list of words of an old BERT, without tokenizer.json."""
    for path in bert.rglob("*.*"):
        if path.is_file() and not path.name.startswith("tokenizer"):
            (tmp_path / path.relative_to(bert)).parent.mkdir(exist_ok=True)
            (tmp_path / path.relative_to(bert)).write_bytes(path.read_bytes())
    with pytest.raises(ModelError, match="holds no tokenizer"):
        Embedder(tmp_path)
    vocabulary = json.loads((bert / "tokenizer.json").read_text())["model"]["vocab"]
    words = sorted(vocabulary, key=vocabulary.get)
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    assert np.array_equal(Embedder(tmp_path).embed(TEXTS), Embedder(bert).embed(TEXTS))
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(ModelError, match="lacks"):
        Embedder(tmp_path)


def test_the_real_one(minilm: Path) -> None:
    """all-MiniLM-L6-v2 itself: 30 texts."""
    texts = [*TEXTS, *(" ".join(text.split()[::-1]) for text in TEXTS[3:13])]
    embedder = Embedder(minilm)
    assert embedder.model.max_tokens == 256
    found = embedder.embed(texts)
    model = transformers.BertModel.from_pretrained(minilm).eval()
    close(found, normalised(reference_vectors(minilm, model, texts, ["mean"], 256)))
    theirs = sentence_transformers_vectors(minilm, texts)
    close(found, theirs)
    ranked = embedder.rank("Where do cats sleep?", ["Stocks fell.", "The cat naps on the sofa."])
    assert ranked[0].index == 1 and ranked[0].score > 0.4 > ranked[1].score + 0.2


POOLING = {"bert": "mean", "nomic-bert": "mean", "qwen3": "lasttoken"}


def write_gguf(folder: Path, arch: str, state: dict[str, np.ndarray], config: Any) -> Path:
    """As llama.cpp's converter does it: names by the gguf package, marks of words, kinds of pooling."""
    gguf = pytest.importorskip("gguf")
    path, described = folder / "model.gguf", json.loads((folder / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_pooling_type(
        {"mean": gguf.PoolingType.MEAN, "lasttoken": gguf.PoolingType.LAST}[POOLING[arch]]
    )
    model = described["model"]
    words = sorted(model["vocab"], key=model["vocab"].get)
    if arch == "qwen3":
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        added = described["added_tokens"]
        words += [token["content"] for token in added[len(added) - 3 :]]
        special = {token["content"] for token in added if not token["single_word"]}
        writer.add_token_list(words)
        writer.add_token_types([3 if word in special else 1 for word in words])
        writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
        writer.add_eos_token_id(0)
        writer.add_add_eos_token(True)
    else:
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_causal_attention(False)
        if arch == "nomic-bert":
            writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        plain = [w[2:] if w[:2] == "##" else "\u2581" + w for w in words]
        named = [w[0] == "[" and w[-1] == "]" for w in words]
        writer.add_tokenizer_model("bert")
        writer.add_token_list([w if n else p for w, n, p in zip(words, named, plain, strict=True)])
    architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[arch], config.num_hidden_layers)
    for name, values in state.items():
        stem, _, last = name.rpartition(".")
        if (stored := names.get_name(stem)) is not None:
            writer.add_tensor(f"{stored}.{last}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("arch", POOLING)
def test_gguf(arch: str, tmp_path: Path) -> None:
    """The vectors of the folder that the file was made of."""
    from safetensors.numpy import load_file

    kind = {"bert": "bert", "nomic-bert": "nomic", "qwen3": "qwen3"}[arch]
    classes = {"bert": "BertModel", "nomic": "NomicBertModel", "qwen3": "Qwen3Model"}
    model = save_model(tmp_path, kind, classes[kind])
    save_recipe(tmp_path, {"pooling_mode": POOLING[arch]}, "Normalize")
    state = load_file(tmp_path / "model.safetensors")
    expected = Embedder(tmp_path).embed(TEXTS)
    state = {name if arch != "qwen3" else f"model.{name}": v for name, v in state.items()}
    path = write_gguf(tmp_path, arch, state, model.config)
    embedder = Embedder(path, max_context=LONGEST)
    assert embedder.model.recipe.note is None
    close(embedder.embed(TEXTS), expected)


@pytest.mark.parametrize("family", sorted(ENGINES))
def test_layers_of_every_family_forget_or_are_refused(family: str) -> None:
    """Where all layers may use the arrays of one, vectors are those that caches of their own give."""
    ops = provider()
    model = tiny_model(ops, family, "f32")
    if not isinstance(model, Decoder) or not forgets(model):
        config = ENGINES[family]
        assert config.delta or config.streams or config.index
        return
    texts = [list(range(3, 60)), [7, 8, 9]]
    found, _ = TextRunner(model, ops).hidden(
        [Text(ids) for ids in texts], Pooling(["max"], ops).rows
    )
    logits = np.concatenate([run_tokens(model, ops, ids) for ids in texts])
    assert np.array_equal(model.logits(found), logits)
