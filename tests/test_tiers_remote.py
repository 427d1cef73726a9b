"""Contents of KV blocks at a server that is a process: from its start to its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time

import pytest

from elinvar.kv.tiers import wire
from elinvar.kv.tiers.hierarchy import Tiers
from elinvar.kv.tiers.host import HostTier
from elinvar.kv.tiers.remote import RemoteTier
from elinvar.kv.tiers.tier import MAX_KEY_BYTES, TierError
from elinvar.kv.tiers.wire import Answer, Request
from kv_servers import (
    BLOCK,
    SECRET,
    content,
    is_cut_off,
    kv_server,
    raw,
    read,
)
from processes import ENVIRONMENT, assert_fails, run
from tiers import wait_for


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
        wait_for(lambda: RemoteTier(server.address).stats()["bytes_in_use"] > 0)
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
        wait_for(lambda: answers(tier))
        assert tier.has([b"big"]) == [False]
        tier.write(b"k", content(2))
        assert read(tier, b"k") == content(2)


def test_below_host_memory_a_server_may_come_and_go(caplog: pytest.LogCaptureFixture) -> None:
    def save(numbers: range) -> None:
        for i in numbers:
            assert tiers.put(bytes([i]) * 32, content(i))
            assert tiers.flush()

    def fetch(numbers: range) -> list[bool]:
        """Which are there, each after the other, through host memory that holds three."""
        there = []
        for i in numbers:
            key, into = bytes([i]) * 32, bytearray(BLOCK)
            ticket = tiers.fetch([key], [BLOCK])
            while not ticket.done:
                time.sleep(0.001)
            there.append(tiers.get(key, memoryview(into)))
            ticket.release()
            assert into == (content(i) if there[-1] else bytes(BLOCK))
        return there

    with kv_server() as server:
        tiers = Tiers(HostTier(None, 3 * BLOCK + 4096, [BLOCK]), [RemoteTier(server.address)])
        save(range(12))
        assert all(fetch(range(12)))
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        assert sum(fetch(range(12))) <= 3
        assert [r.message for r in caplog.records if server.address in r.message] == [
            "remote: reading fails, requests go on without it: "
            f"{server.address} cannot be used: Connection refused."
        ]
    with kv_server(port=server.port):
        wait_for(lambda: tiers.ask([b"x"], [BLOCK]).done and "works again" in caplog.text)
        # What was there is believed to be until it is asked for.
        assert sum(fetch(range(12))) <= 3
        save(range(20, 32))
        assert all(fetch(range(20, 32)))
        tiers.close()


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


@pytest.mark.parametrize("memory", ["500T", "900000000T"])
def test_more_memory_than_there_is_is_one_sentence(memory: str) -> None:
    assert_fails(run("kv-server", "--port", "0", "--memory", memory), 1, "memory", "--memory less")


def test_a_short_secret_is_none(tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "secret")
    with open(path, "w") as file:
        file.write("hunter2\n")
    assert_fails(run("kv-server", "--secret-file", path), 2, "--secret-file", "openssl rand")
