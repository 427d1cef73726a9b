"""What a run is said to take, and what it takes; the speed that its memory allows."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from elinvar.base.config import EngineConfig, ModelConfig
from elinvar.base.errors import InputError, ModelError
from elinvar.cli import app
from elinvar.engine.described import Described, describe
from elinvar.engine.devices import CHIPS, Chip, find_chip
from elinvar.engine.forecast import Reads, Run, sequences
from elinvar.engine.llm import LLM
from elinvar.engine.memory import available_memory
from elinvar.models.load import load_parts
from elinvar.nn.attention import kv_specs
from elinvar.ops.triton.sizes import TAKEN
from elinvar.weights.cache import cache_root
from elinvar.weights.checkpoint import open_checkpoint
from elinvar.weights.packfile import Entry
from engines import provider, tiny_model
from families import ENGINES

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
HERE = Chip("cpu", "here", 8 * 2**30, 40e9, 500e9, measured=True)


@pytest.fixture
def llama_8b(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return tmp_path


@pytest.mark.parametrize("family", sorted(ENGINES))
@pytest.mark.parametrize("dtype", ["f16", "int8"])
def test_the_cache_follows_from_the_configuration(family: str, dtype: Any) -> None:
    model = tiny_model(provider(), family)
    assert kv_specs(model.config, dtype) == model.kv_specs(dtype)


@pytest.mark.model
def test_a_real_engine_takes_what_was_forecast(smollm2_gguf: Path) -> None:
    with LLM(smollm2_gguf, max_context=4096, kv_memory=300 << 20) as llm:
        config = llm.engine.config
        run = Run(describe(smollm2_gguf), config, replace(HERE, memory=available_memory()))
        caches: Any = llm.engine.runner.kv
        held = sum(cache.k.nbytes + cache.v.nbytes for cache in caches)
        checkpoint = open_checkpoint(smollm2_gguf)
        weights = load_parts(checkpoint, cache_dir=cache_root()).weights
        taken = held + sum(each.nbytes for each in weights.values())
    assert run.weights + run.kv.num_bytes == pytest.approx(taken, rel=0.03)
    assert run.facts()["kv"]["max_context"] == llm.engine.max_context


@pytest.mark.parametrize("case", ["llama", "llama-tied", "gpt-oss-plain"])
def test_a_configuration_alone_tells_what_a_checkpoint_holds(case: str, tmp_path: Path) -> None:
    from test_models_tiny import make_reference, save

    save(case, make_reference(case), tmp_path / "whole")
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "whole/config.json", tmp_path / "alone")
    whole, alone = describe(tmp_path / "whole"), describe(tmp_path / "alone/config.json")
    assert whole.exact and not alone.exact
    assert describe(tmp_path / "alone") == alone
    assert alone.config == whole.config
    assert set(alone.entries) <= set(whole.entries)
    more = set(whole.entries) - set(alone.entries)
    assert all(entry.name.endswith("bias") for entry in more)


def test_a_configuration_that_names_a_quantisation(llama_8b: Path) -> None:
    settings = {"quant_method": "gptq", "bits": 4}
    (llama_8b / "config.json").write_text(json.dumps({**LLAMA_8B, "quantization_config": settings}))
    kinds = {entry.name: entry.kind for entry in describe(llama_8b).entries}
    assert (kinds["layers.0.q"], kinds["embed"], kinds["norm"]) == ("q4", "bf16", "vector")


@pytest.mark.parametrize(
    ("settings", "here", "there"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "q8", "fp8-blocks"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "q8", "q8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "q8", "nvfp4"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "q8", "fp8"),
    ],
)
def test_formats_that_a_gpu_takes(settings: Any, here: str, there: str, llama_8b: Path) -> None:
    (llama_8b / "config.json").write_text(json.dumps({**LLAMA_8B, "quantization_config": settings}))
    for stored, kind in ((frozenset(), here), (TAKEN, there)):
        entries = describe(llama_8b, stored=stored).entries
        assert {e.kind for e in entries if e.name.startswith("layers.0.")} == {kind, "vector"}


def test_llama_8b_on_an_h200(llama_8b: Path) -> None:
    run = Run(describe(llama_8b), EngineConfig(device="cuda", max_context=32768), CHIPS["h200"])
    facts = run.facts()
    assert facts["bytes"]["weights"] == pytest.approx(8.03e9 * 2, rel=0.001)
    assert facts["kv"]["groups"][0]["block_bytes"] == 32 * 32 * 2 * 8 * 128 * 2
    assert CHIPS["h200"].memory * 0.99 < facts["bytes"]["total"] <= CHIPS["h200"].memory
    one = run.decode(1, 2048)
    # All but the embedding, of which a row is read, and 2,048 tokens of 128 KiB.
    assert one["weight_bytes"] == pytest.approx((8.03e9 - 128256 * 4096) * 2, rel=0.001)
    assert one["kv_bytes"] == 2048 * 32 * 2 * 8 * 128 * 2
    assert one["tokens_per_s"] == pytest.approx(4.3e12 / (one["weight_bytes"] + one["kv_bytes"]))
    assert one["bound"] == "memory"
    assert run.decode(128, 2048)["kv_bytes"] == 128 * one["kv_bytes"]
    # Nobody's memory helps a long prompt: 2 * 7.5e9 products a token, and attention's.
    assert run.prefill(8192)["tokens_per_s"] == pytest.approx(780e12 / 17.2e9, rel=0.02)


def test_steps_read_the_experts_that_their_rows_go_to() -> None:
    config = ENGINES["qwen3_moe"]
    assert config.moe is not None
    entries = [Entry("embed", "bf16", (10, 8)), Entry("head", "bf16", (10, 8))]
    entries += [Entry(f"layers.0.experts.{e}.up", "bf16", (16, 8)) for e in range(8)]
    moe = replace(config.moe, num_experts=8, top_k=2)
    model = Described(replace(config, moe=moe, tied_head=False), entries, True)
    reads = Reads.of(model, (), [160, 160, *[256] * 8])
    assert reads.weight_bytes(1) == 160 + 2 * 256
    assert reads.weight_bytes(2) == 160 + 256 * 8 * (1 - 0.75**2)
    assert reads.active == 80 + 2 * 128
    tied = Reads.of(replace(model, config=replace(model.config, tied_head=True)), (), [160] * 10)
    assert tied.always == 320


def test_windows_and_states_bound_what_a_step_reads() -> None:
    def growth(config: ModelConfig) -> float:
        reads = Reads(config, kv_specs(config, "f16"), 0, 0, 0)
        return reads.kv_bytes(100_000) / reads.kv_bytes(50_000)

    assert growth(ENGINES["llama"]) == 2
    sliding = replace(ENGINES["gemma3"], layer_kinds=("sliding",) * ENGINES["gemma3"].num_layers)
    assert growth(sliding) == 1
    assert 1 < growth(ENGINES["qwen3_next"]) < 2


def test_what_does_not_fit_is_told(llama_8b: Path) -> None:
    config = EngineConfig(device="cuda", max_rows=8)
    small = replace(CHIPS["l4"], memory=16 * 10**9)
    with pytest.raises(InputError, match=r"^19\.\d GB and a KV cache .* 16\.0 GB of NVIDIA L4;"):
        Run(describe(llama_8b), config, small)
    with pytest.raises(InputError, match="max_context must be between 1 and 131072"):
        Run(describe(llama_8b), replace(config, max_context=10**6), CHIPS["h200"])
    with pytest.raises(InputError, match="No device 'h20' is known; choose cpu or one of h200"):
        find_chip("h20")


def test_the_kv_that_was_asked_for(llama_8b: Path) -> None:
    config = EngineConfig(device="cuda", max_context=8192, kv_memory=10 * 2**30)
    run = Run(describe(llama_8b), config, CHIPS["h200"])
    assert run.kv.num_bytes == 10 * 2**30
    assert sequences(run.specs, run.kv, config.max_step_tokens) == 10


def plan(*arguments: str | Path) -> str:
    command = ["plan", *map(str, arguments)]
    return CliRunner().invoke(app, command, catch_exceptions=False).stdout


def test_command(llama_8b: Path) -> None:
    facts = json.loads(plan(llama_8b, "--device", "H200", "--max-len", "32768", "--json"))
    assert [step["batch"] for step in facts["decode"]] == [1, 8, 32, 128]
    assert facts["device"]["measured"] and facts["kv"]["max_context"] == 32768
    told = plan(llama_8b, "--device", "mi300x", "--rows", "16").splitlines()
    assert told[0] == f"model           {llama_8b}, by its config.json alone"
    assert "datasheet" in told[1] and told[-2].startswith("batch 8 ")
    with pytest.raises(ModelError, match="elinvar pull"):
        plan("hf:somebody/something", "--device", "h200")


def test_command_for_this_machine(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elinvar.cli.plan.this_machine", lambda: HERE)
    facts = json.loads(plan(tiny_gguf, "--json"))
    assert facts["exact"] and facts["bytes"]["graphs"] == 0
    assert "40.0 GB/s" in plan(tiny_gguf)
