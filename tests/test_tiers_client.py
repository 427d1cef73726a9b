"""What a client of a cache server believes: of servers that hang, lie, or have forgotten."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elinvar.base.errors import InputError
from elinvar.kv.tiers import wire
from elinvar.kv.tiers.cache_server import CacheServer
from elinvar.kv.tiers.line import Line
from elinvar.kv.tiers.remote import RemoteTier
from elinvar.kv.tiers.tier import TierError
from elinvar.kv.tiers.wire import Answer, Request
from kv_servers import (
    BLOCK,
    SECRET,
    content,
    fake_server,
    in_thread,
    read,
)
from tiers import wait_for


@pytest.fixture
def server() -> Iterator[CacheServer]:
    with in_thread() as server:
        yield server


@pytest.fixture
def tier(server: CacheServer) -> Iterator[RemoteTier]:
    tier = RemoteTier(server.address)
    yield tier
    tier.close()


def test_a_server_that_says_yes_to_any_secret_is_not_believed() -> None:
    def answer(sock: socket.socket) -> None:
        sock.sendall(wire.Hello(wire.WANTS_SECRET, 1 << 20, bytes(16)).pack())
        sock.recv(wire.PROOF_BYTES, socket.MSG_WAITALL)
        sock.sendall(Answer(wire.OK).pack() + bytes(wire.DIGEST_BYTES))

    with fake_server(answer) as address, pytest.raises(TierError, match="does not know the secret"):
        RemoteTier(address, secret=SECRET.encode()).has([b"k"])


def greet(sock: socket.socket) -> Line:
    line = Line(sock)
    end = time.monotonic() + 5
    line.send([wire.Hello(0, 1 << 20, bytes(16)).pack()], end)
    line.receive(wire.PROOF_BYTES, end)
    line.send([Answer(wire.OK).pack(), bytes(wire.DIGEST_BYTES)], end)
    return line


def request(line: Line) -> Request:
    found = Request.parse(line.receive(wire.REQUEST_BYTES, time.monotonic() + 5))
    line.receive(found.key_bytes, time.monotonic() + 5)
    return found


def hangs_at_once(sock: socket.socket) -> None:
    sock.recv(1)


def hangs_before_the_answer(sock: socket.socket) -> None:
    request(greet(sock))
    sock.recv(1)


def hangs_amid_the_answer(sock: socket.socket) -> None:
    request(greet(sock))
    sock.sendall(Answer(wire.OK, BLOCK, 1).pack() + bytes(BLOCK // 2))
    sock.recv(1)


def drips(sock: socket.socket) -> None:
    request(greet(sock))
    sock.sendall(Answer(wire.OK, BLOCK, 1).pack())
    while True:
        sock.sendall(b"x")
        time.sleep(0.01)


def closes_at_once(sock: socket.socket) -> None:
    pass


def closes_amid_the_answer(sock: socket.socket) -> None:
    request(greet(sock))
    sock.sendall(Answer(wire.OK, BLOCK, 1).pack() + bytes(BLOCK // 2))


def answers_too_much(sock: socket.socket) -> None:
    request(greet(sock))
    sock.sendall(Answer(wire.OK, 2**32 - 1, 1).pack())
    while True:
        sock.sendall(bytes(1 << 20))


def speaks_of_something_else(sock: socket.socket) -> None:
    sock.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
    sock.recv(1)


def speaks_a_later_version(sock: socket.socket) -> None:
    hello = bytearray(wire.Hello(0, 1 << 20, bytes(16)).pack())
    hello[4] = 2
    sock.sendall(hello)
    sock.recv(1)


@pytest.mark.parametrize(
    "answer",
    [
        hangs_at_once,
        hangs_before_the_answer,
        hangs_amid_the_answer,
        drips,
        closes_at_once,
        closes_amid_the_answer,
        answers_too_much,
        speaks_of_something_else,
        speaks_a_later_version,
    ],
)
def test_a_server_that_is_none_costs_a_time_out_and_then_nothing(
    answer: Callable[[socket.socket], None],
) -> None:
    with fake_server(answer) as address:
        tier = RemoteTier(address, timeout=0.3)
        with pytest.raises(TierError, match=address):
            read(tier, b"k")
        with pytest.raises(TierError, match="tried again in a while"):
            tier.has([b"k"])
        with pytest.raises(TierError):
            tier.write(b"k", content(1))


@given(st.binary(max_size=300), st.booleans())
@settings(max_examples=60, deadline=None)
def test_no_answer_makes_a_client_believe_a_wrong_byte(garbage: bytes, greeted: bool) -> None:
    def answer(sock: socket.socket) -> None:
        if greeted:
            request(greet(sock))
        sock.sendall(garbage)

    with fake_server(answer) as address:
        tier = RemoteTier(address, timeout=1)
        with suppress(TierError):
            assert read(tier, b"k", 64) is None
        tier.close()


def test_a_content_that_is_not_what_was_written_is_forgotten(
    server: CacheServer, tier: RemoteTier
) -> None:
    for key in (b"bit", b"other", b"short", b"long"):
        tier.write(key, content(1))
    for key, change in ((b"bit", 0), (b"other", None)):
        with server._kept.reading(key) as kept:
            assert kept is not None
            if change is None:
                kept.tag = wire.content_tag(b"bit", content(1))  # right, of another key
            else:
                kept.views[-1][-1] ^= 1
        assert read(tier, key) is None
    assert read(tier, b"short", BLOCK - 1) is None
    assert read(tier, b"long", BLOCK + 1) is None
    assert tier.has([b"bit", b"other", b"short", b"long"]) == [False] * 4


def test_a_connection_that_the_server_closed_is_replaced_without_a_word(
    server: CacheServer, tier: RemoteTier
) -> None:
    for i in range(3):
        tier.write(b"k", content(i))
        for line in list(server._lines):
            line.shut()
        wait_for(lambda: not server._lines)


def test_what_is_too_large_is_said_and_the_server_stays_in_use(tier: RemoteTier) -> None:
    with pytest.raises(TierError, match="--max-value"):
        tier.write(b"k", content(1, (1 << 19) + 1))
    tier.write(b"k", content(1, 1 << 19))
    assert read(tier, b"k", 1 << 19) == content(1, 1 << 19)


def test_a_closed_tier_says_so(tier: RemoteTier) -> None:
    tier.write(b"k", content(1))
    tier.close()
    with pytest.raises(TierError, match="closed"):
        tier.has([b"k"])


@pytest.mark.parametrize(
    "address",
    [
        "",
        "tcp://",
        "tcp://h",
        "tcp://h:x",
        "tcp://h:70000",
        "tcp://:1",
        "tcp://h:1/p",
        "udp://h:1",
        "tcp://me:hidden@h:1",
    ],
)
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(InputError, match=r"tcp://host:port") as caught:
        RemoteTier(address)
    assert "hidden" not in str(caught.value)
