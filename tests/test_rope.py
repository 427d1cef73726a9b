"""The rotary table: right to half an ulp or so, the same bits however it grew."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest

from elinvar.base.config import RopeConfig
from elinvar.nn.rope import MAX_POSITIONS, RopeTable, inverse_frequencies

LLAMA31 = (8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    "config",
    [
        RopeConfig(10_000.0, 16),
        RopeConfig(100_000.0, 64),
        RopeConfig(1_000_000.0, 256, factor=8.0),
        RopeConfig(500_000.0, 128, llama3=LLAMA31),
        RopeConfig(10_000.0, 10, divisors=(1.0, 1.0, 1.5, 2.0, 8.0)),
    ],
)
def test_table_is_the_cosine_and_sine_of_the_angle(config: RopeConfig) -> None:
    table = RopeTable(config).upto(3000)
    half = config.dim // 2
    angles = np.arange(len(table), dtype=np.float32)[:, None] * inverse_frequencies(config)
    for p in [*range(40), *range(40, 3000, 97)]:
        for i in range(half):
            angle = float(angles[p, i])
            assert abs(table[p, i] - math.cos(angle)) < 1e-7
            assert abs(table[p, half + i] - math.sin(angle)) < 1e-7


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
