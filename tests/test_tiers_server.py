"""What a cache server endures: hostile bytes, slow clients, more than it has room for."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elinvar.kv.tiers import wire
from elinvar.kv.tiers.cache_server import CacheServer, Limits
from elinvar.kv.tiers.remote import RemoteTier
from elinvar.kv.tiers.tier import TierError
from elinvar.kv.tiers.wire import Request
from kv_servers import content, in_thread, is_cut_off, raw, read
from tiers import wait_for


@pytest.fixture
def server() -> Iterator[CacheServer]:
    with in_thread(greeting_seconds=0.2, transfer_seconds=0.2) as server:
        yield server


@pytest.fixture
def tier(server: CacheServer) -> Iterator[RemoteTier]:
    tier = RemoteTier(server.address)
    yield tier
    tier.close()


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=200),
            st.builds(
                lambda *fields: Request(*fields).pack(),
                st.integers(0, 7),
                st.integers(0, 255),
                st.integers(0, 2**16 - 1),
                st.one_of(st.integers(0, 2**32 - 1), st.integers(0, 300)),
                st.integers(0, 2**64 - 1),
            ),
        ),
        max_size=6,
    ),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_hostile_bytes_leave_the_server_as_it_was(parts: list[bytes], greeted: bool) -> None:
    server = hostile_target()
    with raw(server, greeted) as sock:
        with suppress(OSError):  # it has cut us off
            for part in parts:
                sock.sendall(part)
            sock.shutdown(socket.SHUT_WR)
        assert is_cut_off(sock)
    wait_for(lambda: not server._lines)
    kept = server._kept
    held = sum(len(c.pages) for c in kept._found.values())
    assert held + kept.num_free_pages == kept.num_pages
    tier = RemoteTier(server.address)
    tier.write(b"k", content(3))
    assert read(tier, b"k") == content(3)
    tier.close()


_target: list[CacheServer] = []


def hostile_target() -> CacheServer:
    """One server for all examples."""
    if not _target:
        limits = Limits(1 << 20, max_value=1 << 18, greeting_seconds=0.5, transfer_seconds=0.5)
        _target.append(CacheServer("127.0.0.1", 0, limits))
        threading.Thread(target=_target[0].run, daemon=True).start()
    return _target[0]


def test_slow_clients_are_cut_off_wherever_they_stop(server: CacheServer, tier: RemoteTier) -> None:
    put = Request(wire.PUT, 1, 0, 1000, 7).pack()
    for said in (put + b"k" + bytes(999), put, Request(wire.HAS, 0, 2, 60).pack()):
        with raw(server) as sock:
            sock.sendall(said)
            assert is_cut_off(sock)
    with raw(server, greeted=False) as sock:
        assert is_cut_off(sock)
    assert tier.has([b"k"]) == [False]
    assert server._kept.num_free_pages == server._kept.num_pages


def test_a_content_of_no_bytes_is_refused(server: CacheServer) -> None:
    with raw(server) as sock:
        sock.sendall(Request(wire.PUT, 1, 0, 0, 7).pack() + b"k")
        assert is_cut_off(sock)
    assert server.stats()["contents"] == 0


def test_a_client_that_does_not_read_its_answer_is_cut_off(
    server: CacheServer, tier: RemoteTier
) -> None:
    tier.write(b"k", content(1, 1 << 19))
    tier.close()
    with raw(server) as sock:
        for _ in range(40):
            sock.sendall(Request(wire.GET, 1, 0, 1 << 19).pack() + b"k")
        wait_for(lambda: not server._lines)


def test_what_others_write_at_this_moment_is_never_given_up_for_more(
    server: CacheServer, tier: RemoteTier
) -> None:
    with raw(server) as one, raw(server) as two:
        for sock in (one, two):
            sock.sendall(Request(wire.PUT, 1, 0, 1 << 19, 7).pack() + b"k")
        wait_for(lambda: server._kept.num_free_pages == 0)
        with pytest.raises(TierError, match="at this moment"):
            tier.write(b"x", content(1))
    wait_for(lambda: server._kept.num_free_pages == server._kept.num_pages)
    tier.write(b"x", content(1))
    assert read(tier, b"x") == content(1)


def test_more_connections_than_allowed_are_told_so() -> None:
    with in_thread(max_connections=2) as server:
        with raw(server), raw(server), pytest.raises(TierError, match="--max-connections"):
            RemoteTier(server.address).has([b"k"])
        wait_for(lambda: not server._lines)
        assert RemoteTier(server.address).has([b"k"]) == [False]
