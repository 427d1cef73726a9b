"""Contents kept smaller: whatever they are, every bit comes back."""

from __future__ import annotations

import random
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from elinvar.base.config import EngineConfig, KVSpec
from elinvar.base.errors import InputError
from elinvar.engine.below import open_tiers
from elinvar.kv.tiers.objects import ObjectTier
from elinvar.kv.tiers.packed import PackedTier
from elinvar.kv.tiers.places import open_tier
from elinvar.kv.tiers.remote import RemoteTier
from kv_servers import kv_server


class DictTier:
    name = "dict"

    def __init__(self) -> None:
        self.kept: dict[bytes, bytes] = {}

    def has(self, keys: Sequence[bytes]) -> list[bool]:
        return [key in self.kept for key in keys]

    def read(self, key: bytes, into: memoryview) -> bool:
        return self.read_up_to(key, into) == len(into)

    def read_up_to(self, key: bytes, into: memoryview) -> int | None:
        found = self.kept.get(key)
        if found is None or len(found) > len(into):
            return None
        into[: len(found)] = found
        return len(found)

    def write(self, key: bytes, data: memoryview) -> None:
        self.kept[key] = bytes(data)

    def drop(self, key: bytes) -> None:
        self.kept.pop(key, None)

    def close(self) -> None:
        self.kept.clear()


def read(tier: PackedTier, key: bytes, size: int) -> bytes | None:
    into = bytearray(size)
    return bytes(into) if tier.read(key, memoryview(into)) else None


def floats(count: int, kind: str) -> bytes:
    """As those of a cache: of one size, more or less. bf16 is the upper half of f32."""
    rng = random.Random(count)
    values = [rng.gauss(0, 1) for _ in range(count)]
    if kind == "bf16":
        return b"".join(struct.pack("<f", x)[2:] for x in values)
    return struct.pack(f"<{count}{kind}", *values)


@given(
    st.one_of(
        st.binary(max_size=2000),
        st.builds(lambda b, n: b * n, st.binary(max_size=20), st.integers(0, 500)),
    ),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
)
@example(b"", 2, 2)
@example(bytes(4096), 2, 4)
def test_every_bit_comes_back(data: bytes, wrote: int, reads: int) -> None:
    inner = DictTier()
    PackedTier(inner, wrote).write(b"k", memoryview(data))
    assert read(PackedTier(inner, reads), b"k", len(data)) == data
    assert len(inner.kept[b"k"]) <= len(data) + 8


@pytest.mark.parametrize(
    ("kind", "width", "ratio"), [("e", 2, 1.1), ("bf16", 2, 1.35), ("f", 4, 1.1)]
)
def test_numbers_of_a_cache_take_less(kind: str, width: int, ratio: float) -> None:
    inner = DictTier()
    data = floats(50_000, kind)
    tier = PackedTier(inner, width)
    tier.write(b"k", memoryview(data))
    assert len(data) / len(inner.kept[b"k"]) > ratio
    assert read(tier, b"k", len(data)) == data


@given(st.data())
def test_no_damage_is_taken_for_the_content(data: st.DataObject) -> None:
    """Where the tier below does not find it, ours may not fail; and never gives another size."""
    inner = DictTier()
    tier = PackedTier(inner, 2)
    content = floats(200, "bf16")
    tier.write(b"k", memoryview(content))
    packed = bytearray(inner.kept[b"k"])
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    inner.kept[b"k"] = bytes(packed[: data.draw(st.integers(0, len(packed)))])
    found = read(tier, b"k", len(content))
    assert tier.has([b"k"]) == [found is not None]


def test_a_frame_that_claims_to_be_huge_is_not_unfolded() -> None:
    inner = DictTier()
    tier = PackedTier(inner, 1)
    bomb = tier._zstd.compress(bytes(100_000_000), 1)
    tier.write(b"k", memoryview(bytes(30_000)))
    inner.kept[b"k"] = inner.kept[b"k"][:8] + bomb
    assert read(tier, b"k", 30_000) is None
    assert not tier.has([b"k"])[0]


def test_over_a_server_and_over_objects() -> None:
    content = floats(100_000, "bf16")
    with kv_server() as server:
        places = [f"packed+{server.address}", "packed+memory://x"]
        for tier in (open_tier(place) for place in places):
            assert isinstance(tier, PackedTier)
            for key in (b"a", b"b"):
                tier.write(key, memoryview(content))
            assert read(tier, b"b", len(content)) == content
            assert read(tier, b"b", len(content) - 2) is None
            assert tier.has([b"a", b"b", b"c"]) == [True, False, False]
        plain = RemoteTier(server.address)
        assert plain.stats()["bytes_in_use"] < 0.8 * len(content)


def test_places_and_what_they_mean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder in (f"{tmp_path}/plain", f"disk:{tmp_path}/named"):
        tier = open_tier(folder, 1 << 20)
        tier.write(b"k", memoryview(b"content"))
        assert tier.has([b"k"]) == [True]
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "named"}
    monkeypatch.setenv("ELINVAR_KV_SECRET", "s" * 32)
    assert isinstance(open_tier("tcp://127.0.0.1:1"), RemoteTier)
    assert isinstance(open_tier("memory://x/y"), ObjectTier)
    for url, words in (
        ("", "kv_tiers must be a folder, tcp://host:port, or s3://"),
        ("disk:", "kv_tiers must be a folder"),
        ("tcp:host:1", "tcp://host:port"),
        ("tcp://host", "tcp://host:port"),
        ("/a/folder", "/a/folder of kv_tiers needs a size: give kv_disk_size"),
        ("packed+/a/folder", "can be packed"),
        ("packed+packed+tcp://h:1", "no place for objects"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            open_tier(url, field="kv_tiers")
        assert caught.value.field == "kv_tiers"
    monkeypatch.setenv("ELINVAR_KV_SECRET", "short")
    with pytest.raises(InputError, match="ELINVAR_KV_SECRET has fewer than 16 bytes"):
        open_tier("tcp://127.0.0.1:1")
    for name in ("compression.zstd", "backports.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"pip install 'elinvar\[packed\]'"):
        open_tier("packed+memory://x")


def test_names_tell_kinds_and_no_addresses(tmp_path: Path) -> None:
    places = (f"{tmp_path}/a", f"{tmp_path}/b", "tcp://h:1", "packed+tcp://h:2", f"{tmp_path}/c")
    config = EngineConfig(kv_host_memory=1 << 20, kv_disk_size=1 << 20, kv_tiers=places)
    tiers = open_tiers(config, [KVSpec("full", (0,), 1, 16)], "model", 0)
    assert tiers is not None
    tiers.close()
    assert tiers.names == ["host", "disk", "disk-2", "remote", "remote-2", "disk-3"]
    assert [stats.name for stats in tiers.stats()] == tiers.names
