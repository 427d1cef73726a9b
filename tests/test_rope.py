"""The rotary table: right to half an ulp or so, the same bits however it grew."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest

from elinvar.base.config import RopeConfig, YarnConfig
from elinvar.models.keys import Keys, rope_from_hf
from elinvar.nn.rope import MAX_POSITIONS, RopeTable, inverse_frequencies, yarn_mscale

LLAMA31 = (8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    "config",
    [
        RopeConfig(10_000.0, 16),
        RopeConfig(100_000.0, 64),
        RopeConfig(1_000_000.0, 256, factor=8.0),
        RopeConfig(500_000.0, 128, llama3=LLAMA31),
        RopeConfig(10_000.0, 10, divisors=(1.0, 1.0, 1.5, 2.0, 8.0)),
        RopeConfig(10_000.0, 32, yarn=YarnConfig(4.0, 64), attention_factor=1.25),
        RopeConfig(10_000.0, 0),
    ],
)
def test_table_is_the_cosine_and_sine_of_the_angle(config: RopeConfig) -> None:
    table = RopeTable(config).upto(3000)
    half = config.dim // 2
    angles = np.arange(len(table), dtype=np.float32)[:, None] * inverse_frequencies(config)
    for p in [*range(40), *range(40, 3000, 97)]:
        for i in range(half):
            angle = float(angles[p, i])
            assert abs(table[p, i] - math.cos(angle) * config.attention_factor) < 1.5e-7
            assert abs(table[p, half + i] - math.sin(angle) * config.attention_factor) < 1.5e-7


def test_far_positions_keep_their_precision() -> None:
    # The first frequency is 1: its angles are the positions, up to a million radians.
    table = RopeTable(RopeConfig(10_000.0, 2)).upto(MAX_POSITIONS)
    for p in [*range(MAX_POSITIONS - 2000, MAX_POSITIONS), 355, 104348, 208341, 312689, 833719]:
        assert abs(table[p, 0] - math.cos(p)) < 1e-7
        assert abs(table[p, 1] - math.sin(p)) < 1e-7


def test_growing_gives_the_same_bits() -> None:
    config = RopeConfig(500_000.0, 64, llama3=LLAMA31)
    whole = RopeTable(config).upto(5000)
    grown = RopeTable(config)
    for num_positions in (1, 2, 513, 700, 2049, 5000):
        part = grown.upto(num_positions)
        assert len(part) >= num_positions
        assert np.array_equal(part[:5000], whole[: len(part)])


def test_logarithms_of_scaling_are_portable() -> None:
    # Written down once, as above: libm has no say.
    config = RopeConfig(150_000.0, 64, yarn=YarnConfig(32.0, 4096, truncate=False))
    digest = hashlib.sha256(inverse_frequencies(config).astype("<f4").tobytes()).hexdigest()
    assert digest == "82f7190c61e6e3b52b4a3bc083cbc060ea3c55b6dd8d8fe68c284625a434cc54"
    assert yarn_mscale(40.0, 0.707).hex() == "0x1.42c4094ea1a44p+0"


def test_bits_are_the_same_on_every_machine() -> None:
    # The digest was written down once: another machine, numpy or libm must give these bits.
    table = RopeTable(RopeConfig(10_000.0, 64)).upto(4096)[:4096]
    digest = hashlib.sha256(table.astype("<f4").tobytes()).hexdigest()
    assert digest == "b0f1380875c5ca873dfe646e955dd57a2e94f938a38f6fa75b7b896263dd9648"


def test_frequencies_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {
        "rope_type": "llama3",
        "factor": LLAMA31[0],
        "low_freq_factor": LLAMA31[1],
        "high_freq_factor": LLAMA31[2],
        "original_max_position_embeddings": LLAMA31[3],
    }
    for ours, theirs in (
        (RopeConfig(10_000.0, 64), {"rope_type": "default", "rope_theta": 10_000.0}),
        (RopeConfig(500_000.0, 64, llama3=LLAMA31), {"rope_theta": 500_000.0} | scaling),
        (
            RopeConfig(10_000.0, 64, factor=4.0),
            {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0},
        ),
    ):
        hf = transformers.LlamaConfig(
            hidden_size=256, num_attention_heads=4, rope_parameters=theirs
        )
        expected = LlamaRotaryEmbedding(hf).inv_freq.numpy()
        np.testing.assert_allclose(inverse_frequencies(ours), expected, rtol=3e-7)


YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 150_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": np.linspace(0.99, 1.5, 24).tolist(),
    "long_factor": np.geomspace(1.0, 60.0, 24).tolist(),
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.75,
}
SCALED: dict[str, tuple[str, int, dict[str, Any]]] = {
    "yarn": ("Llama", 512, YARN),
    "yarn-mscale": ("Llama", 512, YARN | {"mscale": 1.0, "mscale_all_dim": 0.707}),
    "yarn-attention": ("Llama", 512, YARN | {"attention_factor": 0.9, "beta_fast": 8.0}),
    "yarn-fractions": ("Llama", 512, YARN | {"truncate": False, "beta_slow": 0.5}),
    "longrope-long": ("Phi3", 512, LONGROPE),
    "longrope-short": ("Phi3", 64, LONGROPE),
    "partial": ("Phi", 512, {"rope_theta": 10_000.0, "partial_rotary_factor": 0.25}),
}


@pytest.mark.parametrize("case", SCALED)
def test_tables_are_those_of_transformers(case: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from importlib import import_module

    family, context, params = SCALED[case]
    settings = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": context}
    if family == "Phi3":  # where its files have it
        settings["original_max_position_embeddings"] = params["original_max_position_embeddings"]
    hf = getattr(transformers, f"{family}Config")(**settings, rope_parameters=dict(params))
    module = import_module(f"transformers.models.{family.lower()}.modeling_{family.lower()}")
    rotary = getattr(module, f"{family}RotaryEmbedding")(hf)
    positions = np.arange(context)
    cos, sin = rotary(torch.zeros(1), torch.tensor(positions)[None])
    config = rope_from_hf(Keys(params, "config.json"), 10_000.0, 64, context, partial=1.0)
    table, half = RopeTable(config).upto(context)[:context], config.dim // 2
    assert cos.shape[-1] == config.dim
    # Frequencies may differ in their last bits, and angles as much.
    tolerance = 1e-6 + 2.5e-7 * positions[:, None] * inverse_frequencies(config)
    assert (np.abs(table[:, :half] - cos[0, :, :half].numpy()) <= tolerance).all()
    assert (np.abs(table[:, half:] - sin[0, :, :half].numpy()) <= tolerance).all()
