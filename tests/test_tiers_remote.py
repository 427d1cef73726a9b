"""Contents of KV blocks over real sockets: a server as a process, and servers that lie."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elinvar.base.errors import InputError
from elinvar.kv.tiers import wire
from elinvar.kv.tiers.cache_server import CacheServer, Limits
from elinvar.kv.tiers.remote import RemoteTier
from elinvar.kv.tiers.tier import MAX_KEY_BYTES, TierError
from elinvar.kv.tiers.wire import Answer, Line, Request
from kv_servers import SECRET, KVServer, fake_server, kv_server
from processes import ENVIRONMENT, assert_fails, run
from serving import eventually

BLOCK = 100_000


def content(seed: int, size: int = BLOCK) -> memoryview:
    return memoryview(seed.to_bytes(4, "little") * (size // 4 + 1))[:size]


def read(tier: RemoteTier, key: bytes, size: int = BLOCK) -> bytes | None:
    into = bytearray(size)
    return bytes(into) if tier.read(key, memoryview(into)) else None


@pytest.fixture
def server() -> Iterator[CacheServer]:
    """In a thread of this process: quick, and one can look inside."""
    limits = Limits(1 << 20, max_value=1 << 19, greeting_seconds=0.2, transfer_seconds=0.2)
    server = CacheServer("127.0.0.1", 0, limits)
    thread = threading.Thread(target=server.run)
    thread.start()
    yield server
    server.stop(0)
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture
def tier(server: CacheServer) -> Iterator[RemoteTier]:
    tier = RemoteTier(server.address)
    yield tier
    tier.close()


# The process, from its start to its end.


def test_what_is_written_is_read_until_the_server_is_told_to_stop() -> None:
    with kv_server("--memory", "64M") as server:
        tier = RemoteTier(server.address)
        keys = [b"k" * MAX_KEY_BYTES, b"\0", *(os.urandom(32) for _ in range(2000))]
        assert tier.has(keys) == [False] * len(keys)
        sizes = [1, 4, 8192, 8193, 737_280, 4 << 20]
        for i, size in enumerate(sizes):
            tier.write(keys[i], content(i, size))
        assert tier.has(keys) == [i < len(sizes) for i in range(len(keys))]
        for i, size in enumerate(sizes):
            assert read(tier, keys[i], size) == content(i, size)
        assert read(tier, keys[-1]) is None
        tier.write(keys[0], content(9, 5))
        assert read(tier, keys[0], 5) == content(9, 5)
        server.process.send_signal(signal.SIGTERM)
        code, said = server.ends()
        assert code == 0
        assert said[0]["writes"] == len(sizes) + 1 and said[0]["hits"] == len(sizes) + 1
        with pytest.raises(TierError, match=server.address):
            read(tier, keys[0], 5)


def test_who_amid_a_transfer_is_served_before_the_server_ends() -> None:
    with kv_server() as server, raw(server) as busy, raw(server) as idle:
        head = Request(wire.PUT, 1, 0, BLOCK, 7).pack() + b"k"
        busy.sendall(head + bytes(BLOCK // 2))
        assert eventually(lambda: RemoteTier(server.address).stats()["bytes_in_use"] > 0)
        server.process.send_signal(signal.SIGTERM)
        assert is_cut_off(idle)
        busy.sendall(bytes(BLOCK // 2))
        answer = busy.recv(wire.ANSWER_BYTES, socket.MSG_WAITALL)
        assert Answer.parse(answer).status == wire.OK
        assert server.ends()[0] == 0


def test_a_running_server_tells_how_it_is() -> None:
    with kv_server(secret=SECRET) as server:
        RemoteTier(server.address, secret=SECRET.encode()).write(b"k", content(1))
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(ENVIRONMENT, "ELINVAR_KV_SECRET", SECRET)
            shown = run("kv-server", "--status", server.address)
            said = run("kv-server", "--status", server.address, "--json")
    assert shown.returncode == 0 and "bytes in use" in shown.stdout
    assert json.loads(said.stdout)["contents"] == 1


def test_two_clients_share_what_is_kept() -> None:
    with kv_server() as server:
        tiers = [RemoteTier(server.address, connections=2) for _ in range(2)]

        def work(mine: int) -> None:
            for i in range(60):
                tiers[mine].write(bytes([mine, i]), content(1000 * mine + i))
                for other in range(2):
                    found = read(tiers[1 - mine], bytes([other, i]))
                    assert found is None or found == content(1000 * other + i)
                    done.append(found is not None)

        done: list[bool] = []
        threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(done) == 4 * 60 * 2 and sum(done) >= 4 * 60
        assert tiers[0].stats()["connections"] <= 4


def test_its_memory_stays_what_was_said_and_the_oldest_go_first() -> None:
    with kv_server("--memory", "16M", "--max-value", "1M") as server:
        tier = RemoteTier(server.address)
        before = server.memory()
        for i in range(200):
            tier.write(i.to_bytes(2, "big"), content(i, 737_280))
            assert read(tier, b"\0\0", 737_280) == content(0, 737_280)  # so it is not the oldest
        stats = tier.stats()
        assert stats["bytes_in_use"] <= stats["max_bytes"] == 16 << 20
        assert stats["contents"] == 22 and stats["evicted"] == 178
        kept = [i for i in range(200) if tier.has([i.to_bytes(2, "big")])[0]]
        assert kept == [0, *range(179, 200)]
        assert server.memory() - before < (16 << 20) + (8 << 20)


def test_a_kill_amid_a_transfer_is_an_error_and_a_new_server_is_found() -> None:
    with kv_server() as server:
        tier = RemoteTier(server.address, timeout=2)
        big = content(1, 32 << 20)
        failed: list[TierError] = []

        def write() -> None:
            try:
                while True:
                    tier.write(b"big", big)
            except TierError as error:
                failed.append(error)

        writer = threading.Thread(target=write)
        writer.start()
        time.sleep(0.1)
        server.process.send_signal(signal.SIGKILL)
        writer.join(10)
        assert not writer.is_alive() and len(failed) == 1
        port = server.port
    with kv_server(port=port):
        assert eventually(lambda: answers(tier))
        assert tier.has([b"big"]) == [False]
        tier.write(b"k", content(2))
        assert read(tier, b"k") == content(2)


def answers(tier: RemoteTier) -> bool:
    try:
        tier.stats()
    except TierError:
        return False
    return True


def test_who_does_not_know_the_secret_is_refused_on_either_side() -> None:
    with kv_server("--host", "0.0.0.0", secret=SECRET) as server:
        address = f"tcp://127.0.0.1:{server.port}"
        for secret, words in ((None, "ELINVAR_KV_SECRET"), (b"x" * 32, "does not accept")):
            with pytest.raises(TierError, match=words):
                RemoteTier(address, secret=secret).has([b"k"])
        tier = RemoteTier(address, secret=SECRET.encode())
        tier.write(b"k", content(1))
        assert read(tier, b"k") == content(1)
        done = run("kv-server", "--status", address)
        assert_fails(done, 1, "ELINVAR_KV_SECRET")
    with kv_server() as server, pytest.raises(TierError, match="does not accept the secret"):
        RemoteTier(server.address, secret=SECRET.encode()).has([b"k"])


def test_a_server_that_says_yes_to_any_secret_is_not_believed() -> None:
    def answer(sock: socket.socket) -> None:
        sock.sendall(wire.Hello(wire.WANTS_SECRET, 1 << 20, bytes(16)).pack())
        sock.recv(wire.PROOF_BYTES, socket.MSG_WAITALL)
        sock.sendall(Answer(wire.OK).pack() + bytes(wire.DIGEST_BYTES))

    with fake_server(answer) as address, pytest.raises(TierError, match="does not know the secret"):
        RemoteTier(address, secret=SECRET.encode()).has([b"k"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], ["--host", "--secret-file", "--no-secret"]),
        (["--memory", "much"], ["--memory", "800M"]),
        (["--memory", "10M"], ["--max-value"]),
        (["--memory", "1K"], ["--memory"]),
        (["--secret-file", "/none"], ["--secret-file"]),
        (["--status", "localhost"], ["--status", "tcp://host:port"]),
    ],
)
def test_a_mistake_in_the_command_line_exits_2(arguments: list[str], words: list[str]) -> None:
    assert_fails(run("kv-server", *arguments), 2, *words)


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_fails(run("kv-server", "--port", port), 1, str(port), "--port")


def test_a_short_secret_is_none(tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "secret")
    with open(path, "w") as file:
        file.write("hunter2\n")
    assert_fails(run("kv-server", "--secret-file", path), 2, "--secret-file", "openssl rand")


# What a client believes.


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
        assert eventually(lambda: not server._lines)


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
    ["", "tcp://", "tcp://h", "tcp://h:x", "tcp://h:70000", "tcp://:1", "tcp://h:1/p", "udp://h:1"],
)
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(InputError, match=r"tcp://host:port"):
        RemoteTier(address)


# What a server endures.


def raw(server: CacheServer | KVServer, greeted: bool = True) -> socket.socket:
    host, _, port = server.address[6:].rpartition(":")
    sock = socket.create_connection((host, int(port)), 5)
    if greeted:
        hello = wire.Hello.parse(sock.recv(wire.HELLO_BYTES, socket.MSG_WAITALL))
        assert hello.flags == 0
        sock.sendall(wire.Proof(bytes(16), bytes(32)).pack())
        sock.recv(wire.ANSWER_BYTES + wire.DIGEST_BYTES, socket.MSG_WAITALL)
    return sock


def is_cut_off(sock: socket.socket) -> bool:
    """Whatever was still on its way."""
    with suppress(ConnectionError):
        while sock.recv(1 << 16):
            pass
    return True


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
    assert eventually(lambda: not server._lines)
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


def test_a_client_that_does_not_read_its_answer_is_cut_off(
    server: CacheServer, tier: RemoteTier
) -> None:
    tier.write(b"k", content(1, 1 << 19))
    tier.close()
    with raw(server) as sock:
        for _ in range(40):
            sock.sendall(Request(wire.GET, 1, 0, 1 << 19).pack() + b"k")
        assert eventually(lambda: not server._lines)


def test_what_others_write_at_this_moment_is_never_given_up_for_more(
    server: CacheServer, tier: RemoteTier
) -> None:
    with raw(server) as one, raw(server) as two:
        for sock in (one, two):
            sock.sendall(Request(wire.PUT, 1, 0, 1 << 19, 7).pack() + b"k")
        assert eventually(lambda: server._kept.num_free_pages == 0)
        with pytest.raises(TierError, match="at this moment"):
            tier.write(b"x", content(1))
    assert eventually(lambda: server._kept.num_free_pages == server._kept.num_pages)
    tier.write(b"x", content(1))
    assert read(tier, b"x") == content(1)


def test_more_connections_than_allowed_are_told_so() -> None:
    server = CacheServer("127.0.0.1", 0, Limits(1 << 20, 1 << 19, max_connections=2))
    thread = threading.Thread(target=server.run)
    thread.start()
    held = [raw(server), raw(server)]
    with pytest.raises(TierError, match="--max-connections"):
        RemoteTier(server.address).has([b"k"])
    for sock in held:
        sock.close()
    assert eventually(lambda: not server._lines)
    assert RemoteTier(server.address).has([b"k"]) == [False]
    server.stop(0)
    thread.join(10)
