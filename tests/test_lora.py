"""LoRA adapters: the op, parity with PEFT, what the contract says of them, and their life."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adapters import (
    AdaptedModel,
    adaptable,
    adapted_engine,
    random_adapter,
    save_adapter,
)
from elinvar.base.errors import InputError, ModelError
from elinvar.base.sampling import SamplingParams
from elinvar.engine.adapters import Adapters
from elinvar.engine.llm import LLM
from elinvar.engine.output import CompletionBuilder
from elinvar.models.registry import FAMILIES as REGISTRY
from elinvar.models.registry import Loaded, load_parts
from elinvar.ops import Ops, Weight, load_provider
from elinvar.ops.adapted import AdaptedOps
from elinvar.ops.api import Lora, LoraPair
from elinvar.ops.layout import pack_float, unpack
from elinvar.weights.checkpoint import open_checkpoint
from engines import Answer, answers, provider, random_weight, tiny_engine, tiny_parts
from helpers import assert_parity, run_tokens
from test_invariance import FAMILIES, LEVELS, PARAMS, PROMPTS

# ---- the op -------------------------------------------------------------------------------------

K, OUTPUTS = 72, (83, 16, 40)


def lora_of(kind: str, ranks: tuple[int, ...] = (1, 16, 37)) -> Lora:
    """Three adapters for the first and the last of three matrices; the second of them changes only
    the first, and the third shares one A between both."""
    rng = np.random.default_rng(len(kind))

    def pair(r: int, n: int, a: Weight | None = None) -> LoraPair:
        a = a or random_weight(rng, kind, r, K)
        return LoraPair(a, random_weight(rng, kind, n, r), 0.5)

    first = [pair(r, OUTPUTS[0]) for r in ranks]
    last = [pair(ranks[0], OUTPUTS[2]), None, pair(ranks[2], OUTPUTS[2], first[2].a)]
    return Lora((0, OUTPUTS[0] + OUTPUTS[1]), (first, last))


def applied(ops: Ops, y: np.ndarray, x: np.ndarray, adapters: np.ndarray, lora: Lora) -> np.ndarray:
    y = y.copy()
    ops.lora(y, x, adapters, lora)
    return y


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("rows", [1, 2, 3, 17, 97, 150])
def test_the_op(rows: int, kind: str, level: str) -> None:
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, K), np.float32)
    y = rng.standard_normal((rows, sum(OUTPUTS)), np.float32)
    y[:, ::3] = -0.0
    adapters = rng.integers(-1, 3, rows).astype(np.int32)
    lora = lora_of(kind)
    ops = load_provider("cpu", 3, level)
    got = applied(ops, y, x, adapters, lora)
    wanted = applied(load_provider("ref"), y, x, adapters, lora)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)
    # What nobody changes keeps its bits, the signs of zeros, too.
    same = np.ones_like(y, bool)
    for t, adapter in enumerate(adapters):
        same[t, : OUTPUTS[0]] = adapter < 0
        same[t, -OUTPUTS[2] :] = adapter in (-1, 1)
    assert np.array_equal(got.view(np.int32)[same], y.view(np.int32)[same])
    alone = [
        applied(provider(), y[t : t + 1], x[t : t + 1], adapters[t : t + 1], lora)
        for t in range(rows)
    ]
    assert np.array_equal(np.concatenate(alone), got)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "swiglu_oai"])
@pytest.mark.parametrize("kind", ["q4", "bf16"])
def test_gated_ends_what_gated_linear_does(kind: str, activation: Any) -> None:
    rng = np.random.default_rng(3)
    gate, up = (random_weight(rng, kind, 83, 96) for _ in range(2))
    for rows in (1, 19):
        x = rng.standard_normal((rows, 96), np.float32)
        for level in LEVELS:
            ops = load_provider("cpu", 2, level)
            got = ops.gated(ops.linear(x, (gate, up)), activation)
            assert np.array_equal(got, provider().gated_linear(x, gate, up, activation))
        wanted = load_provider("ref").gated(ops.linear(x, (gate, up)), activation)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


# ---- every family ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [family.name for family in REGISTRY])
def test_every_family_equals_merged_weights(family: str) -> None:
    """Each matrix that may be adapted is, wherever the family multiplies it."""
    parts, ops = tiny_parts(family, "f32"), AdaptedOps(provider())
    adapter = random_adapter(parts, 4, kind="f32")
    ops.set_adapter(0, adapter.pairs)
    ids = [i * 7 % 256 for i in range(40)]
    plain = run_tokens(parts.build(ops), ops, ids)
    got = run_tokens(AdaptedModel(parts.build(ops), ops), ops, ids, 33)
    assert np.abs(got - plain).max() > 0.1
    for name, w in adaptable(parts).items():
        pair = adapter.pairs[w]
        merged = unpack(w) + np.float32(pair.scale) * unpack(pair.b) @ unpack(pair.a)
        one = replace(parts, weights=parts.weights | {name: pack_float("f32", merged)})
        ops.set_adapter(0, {key: p for key, p in adapter.pairs.items() if key is not w})
        # The others as adapters, this one merged.
        assert_parity(run_tokens(AdaptedModel(one.build(ops), ops), ops, ids), got)


# ---- the contract -------------------------------------------------------------------------------

NAMES = [None, "one", "two", "one", "two", "one", None, "two"]
ASKED = [replace(one, adapter=name) for one, name in zip(PARAMS, NAMES, strict=True)]
_alone: dict[tuple[str, str], list[Answer]] = {}


def expected(family: str, kind: str = "q4") -> list[Answer]:
    """Every request by itself; those without adapters on an engine that has none."""
    if (family, kind) not in _alone:
        plain = tiny_engine(family, kind, prefix_cache=False)
        adapted = adapted_engine(family, kind, prefix_cache=False)
        _alone[family, kind] = [
            answers(adapted if asked.adapter else plain, [ids], [asked])[0]
            for ids, asked in zip(PROMPTS, ASKED, strict=True)
        ]
    return _alone[family, kind]


@pytest.mark.parametrize("kind", ["q4", "f32"])
@pytest.mark.parametrize("family", [family.name for family in REGISTRY])
def test_neighbours_chunks_threads_and_prefixes(family: str, kind: str) -> None:
    engine = adapted_engine(family, kind, provider(num_threads=3), max_step_tokens=21)
    assert answers(engine, PROMPTS, ASKED) == expected(family, kind)
    before = engine.metrics.cached_tokens
    assert answers(engine, PROMPTS, ASKED) == expected(family, kind)
    assert engine.metrics.cached_tokens - before >= 32 * 6, "the second round must hit"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_vector_width(family: str, level: str) -> None:
    engine = adapted_engine(family, inner=provider("cpu", 1, level), max_step_tokens=50)
    assert answers(engine, PROMPTS, ASKED) == expected(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_preemption(family: str) -> None:
    engine = adapted_engine(family, max_step_tokens=40)
    builders = {engine.add(p, s): CompletionBuilder(p) for p, s in zip(PROMPTS, ASKED, strict=True)}
    done = {}
    step = 0
    while engine.has_work:
        for delta in engine.step():
            if completion := builders[delta.request_id].push(delta):
                done[delta.request_id] = completion
        running = [i for i in builders if i not in done][1:]
        if running and step % 3 == 0:
            engine.scheduler.preempt(running[step // 3 % len(running)])
        step += 1
    assert engine.metrics.preemptions > 0
    assert [(done[i].token_ids, done[i].logprobs, done[i].text) for i in builders] == expected(
        family
    )


def test_adapters_matter_and_share_no_cached_block() -> None:
    engine = adapted_engine()
    ids, base = PROMPTS[4], SamplingParams(max_tokens=8, temperature=0, seed=0, logprobs=0)
    three = [replace(base, adapter=name) for name in (None, "one", "two")]
    first = [answers(engine, [ids], [asked])[0] for asked in three]
    assert engine.metrics.cached_tokens == 0
    assert len({logprobs[0].logprob for _, logprobs, _ in first}) == 3
    assert [answers(engine, [ids], [asked])[0] for asked in three] == first
    assert engine.metrics.cached_tokens == 3 * 96


# ---- their life -----------------------------------------------------------------------------------


def test_unloading_waits_for_those_who_run() -> None:
    engine = adapted_engine(max_adapters=3)
    asked = replace(PARAMS[0], adapter="one")
    wanted = answers(adapted_engine(), [PROMPTS[3]], [asked])[0]
    builder = CompletionBuilder(PROMPTS[3])
    engine.add(PROMPTS[3], asked)
    for delta in engine.step():
        builder.push(delta)
    engine.unload_adapter("one")
    assert engine.adapters.names == ["two"] and engine.metrics.adapters == 1
    with pytest.raises(InputError, match="no adapter 'one'; there are two"):
        engine.add(PROMPTS[3], asked)
    # Its name is free, its memory is not: this is another adapter.
    engine.add_adapter("one", random_adapter(tiny_parts(), 9))
    with pytest.raises(InputError, match="3 adapters in memory, and max_adapters is 3"):
        engine.add_adapter("four", random_adapter(tiny_parts(), 10))
    while engine.has_work:
        for delta in engine.step():
            done = builder.push(delta)
    assert done is not None
    assert (done.token_ids, done.logprobs, done.text) == wanted
    assert engine.adapters.num_held == 2
    other = answers(engine, [PROMPTS[3]], [asked])[0]
    assert other != wanted
    fresh = adapted_engine()
    fresh.unload_adapter("one")
    fresh.add_adapter("one", random_adapter(tiny_parts(), 9))
    assert answers(fresh, [PROMPTS[3]], [asked])[0] == other


def test_however_a_request_ends_it_lets_go() -> None:
    engine = adapted_engine()
    asked = replace(PARAMS[0], adapter="two")
    request_id = engine.add(PROMPTS[0], asked)
    engine.step()
    engine.unload_adapter("two")
    assert engine.adapters.num_held == 2
    engine.abort(request_id)
    assert engine.adapters.num_held == 1
    engine.add(PROMPTS[0], replace(asked, adapter="one"), "id")
    with pytest.raises(InputError, match="in use"):
        engine.add(PROMPTS[0], replace(asked, adapter="one"), "id")
    engine.unload_adapter("one")
    engine.runner.graphs.applied = None  # the step fails
    deltas = engine.step() + engine.step()
    assert deltas[-1].finish_reason == "error"
    assert engine.adapters.num_held == 0


def test_names() -> None:
    engine = adapted_engine()
    adapter = random_adapter(tiny_parts(), 5)
    for name, reason in (("", "1 to 200"), ("a\n", "printable"), ("one", "already")):
        with pytest.raises(InputError, match=reason):
            engine.add_adapter(name, adapter)
    with pytest.raises(InputError, match="no adapter 'three'"):
        engine.unload_adapter("three")
    with pytest.raises(InputError, match="none is loaded"):
        answers(tiny_engine(), [[1]], [SamplingParams(adapter="one")])
    with pytest.raises(ModelError, match="without files"):
        tiny_engine().load_adapter("x", "x")
    with pytest.raises(InputError, match="must be a name"):
        SamplingParams(adapter=3)  # type: ignore[arg-type]


def test_llm_takes_an_adapter_for_all_or_one_a_prompt() -> None:
    llm = LLM(adapted_engine())
    greedy = SamplingParams(max_tokens=6, temperature=0, seed=0)
    one, two = ([replace(greedy, adapter=name)] for name in ("one", "two"))
    ids = PROMPTS[2]
    expected_one = llm.generate([ids], one)[0].token_ids
    expected_two = llm.generate([ids], two)[0].token_ids
    assert llm.generate([ids], greedy, adapter="one")[0].token_ids == expected_one
    mixed = llm.generate([ids, ids], [greedy, *two], adapter="one")
    assert [done.token_ids for done in mixed] == [expected_one, expected_two]
    llm.unload_adapter("one")
    with pytest.raises(InputError, match="no adapter"):
        llm.generate([ids], greedy, adapter="one")


# ---- PEFT's folders -------------------------------------------------------------------------------

torch = pytest.importorskip("torch")
pytest.importorskip("gguf")
peft = pytest.importorskip("peft")

from test_models_tiny import (  # noqa: E402
    LENGTH,
    make_reference,
    prompt,
    reference_logits,
    write_gguf,
)

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
    sequence = list(prompt(1, 40))
    for _ in range(32):
        sequence.append(int(reference_logits(tuned, tuple(sequence))[-1].argmax()))
    found = run_tokens(model, ops, sequence, 1)
    assert found[39:-1].argmax(-1).tolist() == sequence[40:]
    merged = tuned.merge_and_unload()
    assert_parity(found, reference_logits(merged, tuple(sequence)))


@pytest.mark.parametrize("case", ["llama-3", "gemma3"])
def test_a_gguf_base_takes_it_too(case: str, tmp_path: Path) -> None:
    """Its q and k lie in another order, which the rules undo before anything is added."""
    reference = make_reference(case)
    if case == "gemma3":
        for layer in reference.model.layers:
            layer.self_attn.scaling = reference.config.head_dim**-0.5
    write_gguf(reference, case.split("-")[0], tmp_path / "tiny.gguf")
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
        ({"rank_pattern": {"(": 3}}, "rank_pattern"),
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
        greedy = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
        plain = llm.generate([list(prompt())], greedy)[0].token_ids
        got = llm.generate([list(prompt())], greedy, adapter="mine")[0].token_ids
        assert llm.engine.fingerprint_of("mine") != llm.engine.fingerprint
    sequence = list(prompt())
    for _ in range(8):
        sequence.append(int(reference_logits(tuned, tuple(sequence))[-1].argmax()))
    assert got == sequence[LENGTH:] != plain


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
