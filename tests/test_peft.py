"""Adapters as PEFT saves them: parity with PEFT itself, bases of either format, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adapters import AdaptedModel, save_adapter
from elinvar.base.errors import ModelError
from elinvar.base.sampling import SamplingParams
from elinvar.engine.adapters import Adapters
from elinvar.engine.llm import LLM
from elinvar.models.load import Loaded, load_parts
from elinvar.ops import load_provider
from elinvar.ops.adapted import AdaptedOps
from elinvar.weights.checkpoint import open_checkpoint
from engines import provider
from helpers import assert_parity, greedy, run_tokens

torch = pytest.importorskip("torch")
pytest.importorskip("gguf")
peft = pytest.importorskip("peft")

from gguf_models import write_model  # noqa: E402
from test_models_tiny import LENGTH, make_reference, prompt, reference_logits  # noqa: E402

TARGETS: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": "all-linear"},
    "llama-3": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"v_proj": 3, r"layers\.[01]\.mlp\.down_proj": 9},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 11},
        "use_rslora": True,
    },
    "qwen2": {"target_modules": r".*\.(q_proj|k_proj|gate_proj|o_proj)", "use_rslora": True},
    "phi3": {"target_modules": "all-linear"},
    "gemma3": {"target_modules": ["q_proj", "k_proj", "up_proj", "o_proj"]},
    "gemma3-types": {"target_modules": ["k_proj", "gate_proj"], "layers_to_transform": [0, 2]},
    "glm": {"target_modules": "all-linear"},
    "gpt2": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "gpt-neox": {"target_modules": ["query_key_value", "dense_4h_to_h"]},
    "deepseek3": {"target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"]},
    "qwen3-moe": {"target_modules": ["q_proj", "o_proj"]},
    "llama-head": {"target_modules": ["lm_head", "k_proj"]},
}


def make_adapter(case: str, reference: Any, folder: Path, **settings: Any) -> Any:
    """A PEFT model around the reference, its adapter random and saved."""
    config = {"r": 5, "lora_alpha": 7} | TARGETS[case] | settings
    torch.manual_seed(len(case))
    model = peft.get_peft_model(reference, peft.LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.25)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


def load_adapted(base: Path, adapter: Path, name: str = "cpu") -> tuple[AdaptedModel, AdaptedOps]:
    ops = AdaptedOps(load_provider(name))
    parts = load_parts(open_checkpoint(base), "f32")
    adapters = Adapters(parts, ops, 1)
    adapters.add("x", adapters.read(adapter))
    return AdaptedModel(parts.build(ops), ops), ops


@pytest.mark.parametrize("case", TARGETS)
def test_parity_with_peft(case: str, tmp_path: Path) -> None:
    """A prompt in pieces, 32 greedy steps, and the merged weights in transformers."""
    reference = make_reference(case.removesuffix("-head"))
    reference.save_pretrained(tmp_path / "base")
    tuned = make_adapter(case, reference, tmp_path / "adapter")
    expected = reference_logits(tuned, prompt())
    with tuned.disable_adapter():
        assert np.abs(reference_logits(tuned, prompt()) - expected).max() > 0.5
    for name in ("cpu", "ref"):
        model, ops = load_adapted(tmp_path / "base", tmp_path / "adapter", name)
        for chunk in (LENGTH, 33):
            assert_parity(run_tokens(model, ops, prompt(), chunk), expected)
    model, ops = load_adapted(tmp_path / "base", tmp_path / "adapter")
    start = prompt(1, 40)
    sequence = (*start, *greedy(model, ops, [start], 32)[0])
    expected = reference_logits(tuned, sequence)
    assert_parity(run_tokens(model, ops, sequence, 1), expected)
    assert expected[39:-1].argmax(-1).tolist() == list(sequence[40:])
    assert_parity(reference_logits(tuned.merge_and_unload(), sequence), expected)


@pytest.mark.parametrize("case", ["llama-3", "gemma3"])
def test_a_gguf_base_takes_it_too(case: str, tmp_path: Path) -> None:
    """Its q and k lie in another order, which the rules undo before anything is added."""
    reference = make_reference(case)
    if case == "gemma3":
        for layer in reference.model.layers:
            layer.self_attn.scaling = reference.config.head_dim**-0.5
    write_model(reference, case.split("-")[0], tmp_path / "tiny.gguf")
    tuned = make_adapter(case, reference, tmp_path / "adapter", target_modules="all-linear")
    model, ops = load_adapted(tmp_path / "tiny.gguf", tmp_path / "adapter")
    assert_parity(run_tokens(model, ops, prompt()), reference_logits(tuned, prompt()))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("llama")
    make_reference("llama").save_pretrained(folder)
    return load_parts(open_checkpoint(folder))


Q = "model.layers.1.self_attn.q_proj"


def read(parts: Loaded, folder: Path) -> Any:
    return Adapters(parts, AdaptedOps(provider()), 1).read(folder)


def test_identity_is_the_content(parts: Loaded, tmp_path: Path) -> None:
    """Not the folder nor the file: equal contents are one, another scale is another."""
    a = read(parts, save_adapter(tmp_path / "a", {Q: (64, 64)}))
    assert a.digest == read(parts, save_adapter(tmp_path / "b", {Q: (64, 64)}, revision="x")).digest
    others = [
        save_adapter(tmp_path / "c", {Q: (64, 64)}, seed=1),
        save_adapter(tmp_path / "d", {Q: (64, 64)}, lora_alpha=9),
        save_adapter(tmp_path / "e", {Q.replace("1", "0"): (64, 64)}),
    ]
    assert len({a.digest, *(read(parts, folder).digest for folder in others)}) == 4
    assert a.nbytes == 64 * 4 * (16 + 4)


def test_names_of_a_model_that_also_sees(parts: Loaded, tmp_path: Path) -> None:
    plain = read(parts, save_adapter(tmp_path / "a", {Q: (64, 64)}))
    for i, outer in enumerate(("model.language_model.", "language_model.model.")):
        folder = save_adapter(tmp_path / str(i), {Q.replace("model.", outer): (64, 64)})
        assert read(parts, folder).digest == plain.digest
    twice = {name: (64, 64) for name in (Q, Q.replace("model.", "model.language_model."))}
    with pytest.raises(ModelError, match="which are one"):
        read(parts, save_adapter(tmp_path / "twice", twice))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3', and it must be LORA"),
        ({"use_dora": True}, "use_dora True, which is not supported"),
        ({"bias": "lora_only"}, "bias 'lora_only', which is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"of_the_future": {"x": 1}}, "of_the_future"),
        ({"r": 0}, "r 0, and it must be a whole number"),
        ({"lora_alpha": "x"}, "lora_alpha 'x', and it must be a number"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern .* by modules' names"),
        ({"rank_pattern": {"(.*a)*b": 3}}, "rank_pattern .* simple patterns"),
        ({"rank_pattern": {"q_proj": 3.5}}, "rank_pattern .* whole number"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern .* a number by modules' names"),
        ({"rank_pattern": {"q_proj": 3}}, r"shape \[4, 64\], and rank 3 on this model needs"),
    ],
)
def test_settings_that_are_refused(
    parts: Loaded, tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelError, match=reason):
        read(parts, save_adapter(tmp_path, {Q: (64, 64)}, **config))


def test_what_changes_nothing_is_taken(parts: Loaded, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1).to_dict()
    config |= {"target_modules": ["q_proj"], "peft_type": "LORA", "task_type": "CAUSAL_LM"}
    assert read(parts, save_adapter(tmp_path, {Q: (64, 64)}, **config)).pairs


def with_tensors(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    path = save_adapter(folder, {Q: (64, 64)}) / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return folder


A, B = (f"base_model.model.{Q}.lora_{half}.weight" for half in "AB")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop(B), "lora_A of .*q_proj without its lora_B"),
        (lambda t: t.pop(A), "lora_B of .*q_proj without its lora_A"),
        (lambda t: t.update({A: t[A][:, :60]}), r"shape \[4, 60\], and rank 4 .* needs \[4, 64\]"),
        (lambda t: t.update({B: t[B][:-1].copy()}), r"lora_B .* needs \[64, 4\]"),
        (lambda t: t.update({A: t[A].reshape(-1)}), r"shape \[256\]"),
        (lambda t: t.update({A: t[A] * np.float32(np.nan)}), "NaN or infinity"),
        (lambda t: t.update({A: t[A].astype(np.int8)}), "as I8; save it as F32, F16 or BF16"),
        (
            lambda t: t.update({A.replace("lora_A.weight", "lora_magnitude_vector"): t[A]}),
            "lora_magnitude_vector, which is no lora_A",
        ),
        (
            lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": t[A]}),
            "lora_embedding_A, which is no lora_A",
        ),
        (
            lambda t: t.update({A.replace(".1.", ".9."): t[A], B.replace(".1.", ".9."): t[B]}),
            "layers.9.self_attn.q_proj, which this model does not have",
        ),
        (
            lambda t: t.update({f"base_model.model.model.embed_tokens.lora_{h}.weight": t[A] for h in "AB"}),
            "embed_tokens, which is not supported",
        ),
        (lambda t: t.clear(), "adapts nothing"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(
    parts: Loaded, tmp_path: Path, change: Callable[[dict[str, Any]], Any], reason: str
) -> None:
    with pytest.raises(ModelError, match=reason) as info:
        read(parts, with_tensors(tmp_path, change))
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("case", "module"),
    [
        ("deepseek3", "model.layers.0.self_attn.kv_b_proj"),
        ("qwen3-moe", "model.layers.1.mlp.gate"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.0.w1"),
    ],
)
def test_latent_attention_and_experts_are_refused_by_name(
    case: str, module: str, tmp_path: Path
) -> None:
    make_reference(case).save_pretrained(tmp_path / "base")
    loaded = load_parts(open_checkpoint(tmp_path / "base"))
    with pytest.raises(ModelError, match=f"adapts {module}, which"):
        read(loaded, save_adapter(tmp_path / "adapter", {module: (64, 64)}))


def test_folders_that_are_none(parts: Loaded, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a LoRA adapter"):
        read(parts, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        read(parts, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ModelError, match=r"holds no adapter_model\.safetensors"):
        read(parts, tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="is a pickle"):
        read(parts, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    for raw in (b"", b"\xff" * 8 + b"{}", (2**31).to_bytes(8, "little") + b"{}"):
        path.write_bytes(raw)
        with pytest.raises(ModelError):
            read(parts, tmp_path)


def test_an_engine_of_files(tmp_path: Path) -> None:
    """From the folders to answers, by LLM, at two precisions of the base."""
    reference = make_reference("llama")
    reference.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text(TOKENIZER)
    tuned = make_adapter("llama", reference, tmp_path / "adapter")
    with LLM(tmp_path / "base", kv_memory=2**22, kv_dtype="f32") as llm:
        llm.load_adapter("mine", tmp_path / "adapter")
        params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
        plain = llm.generate([list(prompt())], params)[0].token_ids
        got = llm.generate([list(prompt())], params, adapter="mine")[0].token_ids
        assert llm.engine.fingerprint_of("mine") != llm.engine.fingerprint
    expected = reference_logits(tuned, (*prompt(), *got))
    assert got == expected[LENGTH - 1 : -1].argmax(-1).tolist() != plain


TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [],
        "model": {
            "type": "WordLevel",
            "vocab": {f"w{i}": i for i in range(101)},
            "unk_token": "w0",
        },
        "pre_tokenizer": {"type": "Whitespace"},
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        },
    }
)
