"""How memory becomes KV blocks, and how much memory there is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elinvar.base.config import DeltaConfig, KVSpec
from elinvar.base.errors import InputError
from elinvar.engine.memory import available_memory
from elinvar.engine.plan_kv import DEFAULT_LIMIT, describe_blocks, plan_kv
from elinvar.kv.manager import KVManager

FULL = KVSpec("full", (0, 1), 2, 64)
STATES = KVSpec("linear", (5,), 2, 64, state=DeltaConfig(2, 4, 16, 32, 4))
SLIDING = KVSpec("sliding", (2, 3, 4), 2, 64, window=100)
GIB = 2**30


@given(
    st.sampled_from([(FULL,), (FULL, SLIDING), (SLIDING,), (FULL, STATES), (STATES,)]),
    st.integers(1, 5000),
    st.integers(2**19, 2**26),
    st.integers(1, 64),
    st.integers(1, 512),
)
def test_one_longest_sequence_always_fits(
    specs: tuple[KVSpec, ...], context: int, memory: int, rows: int, chunk: int
) -> None:
    plan = plan_kv(specs, context, 0, kv_memory=memory, max_rows=rows, max_step_tokens=chunk)
    assert plan.num_bytes <= memory
    assert plan.num_bytes == sum(
        n * s.block_bytes for n, s in zip(plan.num_blocks, specs, strict=True)
    )
    assert 1 <= plan.max_context <= context
    manager = KVManager(specs, plan.num_blocks)
    assert manager.max_sequence >= plan.max_context
    assert manager.need.can_admit(
        manager.find_prefix(manager.new_sequence(), [0]), plan.max_context, chunk, [0] * len(specs)
    )


def test_default_is_a_bounded_share() -> None:
    assert plan_kv((FULL,), 1 << 20, 64 * GIB, max_rows=1024).num_bytes <= DEFAULT_LIMIT
    quarter = plan_kv((FULL,), 4096, GIB).num_bytes
    assert GIB // 5 < quarter <= GIB // 4


def test_default_grows_for_one_sequence_of_full_length() -> None:
    # 32768 tokens need 32 MiB; a quarter of 100 MiB is less, half of it is enough.
    plan = plan_kv((FULL,), 32768, 100 * 2**20)
    assert plan.max_context == 32768
    assert plan_kv((FULL,), 32768, 40 * 2**20).max_context == 20480


def test_no_more_than_all_rows_can_use() -> None:
    assert plan_kv((FULL, SLIDING), 64, 0, kv_memory=GIB, max_rows=4).num_blocks == (8, 8)


def test_short_sequences_do_not_starve_the_sliding_group() -> None:
    full, sliding = plan_kv((FULL, SLIDING), 32768, 0, kv_memory=GIB).num_blocks
    assert full > 1024 and sliding > 200


def test_states_do_not_grow_with_the_context() -> None:
    short, long = (plan_kv((FULL, STATES), n, 0, kv_memory=GIB, max_rows=8) for n in (2048, 65536))
    assert short.num_blocks[1] == 8 * 2, "as many as all rows can use: two each"
    assert 2 <= long.num_blocks[1] <= 16
    text = describe_blocks((FULL, STATES), short.num_blocks)
    assert text == "512 full blocks of 32768 bytes, 16 linear states of 10496 bytes"


def test_what_cannot_be_had_is_refused_with_numbers() -> None:
    with pytest.raises(InputError, match=r"1024 tokens needs 1048576 bytes.* 100000 ") as error:
        plan_kv((FULL,), 4096, 0, kv_memory=100_000, max_context=1024)
    assert error.value.field == "kv_memory"
    with pytest.raises(InputError, match="kv_memory"):
        plan_kv((FULL,), 4096, 0, kv_memory=100)
    with pytest.raises(InputError) as error:
        plan_kv((FULL,), 4096, GIB, max_context=8192)
    assert error.value.field == "max_context"


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_memory_of_the_machine(tmp_path: Path) -> None:
    write(tmp_path / "proc", meminfo="MemTotal: 4000 kB\nMemAvailable:    3000 kB\n")
    assert available_memory(tmp_path / "proc", tmp_path / "cgroup") == 3000 * 1024


def test_memory_limit_of_cgroup_v2_and_its_parents(tmp_path: Path) -> None:
    write(tmp_path / "proc", meminfo="MemAvailable: 3000 kB\n")
    write(tmp_path / "proc" / "self", cgroup="0::/a/b\n")
    write(tmp_path / "cgroup" / "a" / "b", memory__max="max\n", memory__current="5\n")
    usage = {"memory__current": "900000\n", "memory__stat": "anon 7\ninactive_file 100000\n"}
    write(tmp_path / "cgroup" / "a", memory__max="1000000\n", **usage)
    assert available_memory(tmp_path / "proc", tmp_path / "cgroup") == 200_000


def test_memory_limit_of_cgroup_v1_seen_from_a_container(tmp_path: Path) -> None:
    write(tmp_path / "proc", meminfo="MemAvailable: 3000 kB\n")
    write(tmp_path / "proc" / "self", cgroup="4:cpu,memory:/of/the/host\n0::/\n")
    files = {"memory__limit_in_bytes": "1000000\n", "memory__usage_in_bytes": "1200000\n"}
    write(tmp_path / "cgroup" / "memory", **files)
    assert available_memory(tmp_path / "proc", tmp_path / "cgroup") == 0
