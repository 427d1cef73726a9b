"""`elinvar kv-server` as a process and in a thread, servers that are not what they should be, and clients
that are not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from elinvar.kv.tiers import wire
from elinvar.kv.tiers.cache_server import CacheServer, Limits
from elinvar.kv.tiers.remote import RemoteTier
from processes import ELINVAR, ENVIRONMENT

SECRET = "0123456789abcdef0123456789abcdef"


@dataclass(frozen=True)
class KVServer:
    process: subprocess.Popen[str]
    address: str

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def ends(self) -> tuple[int, list[dict[str, Any]]]:
        """Its exit code, and what it still says."""
        out, err = self.process.communicate(timeout=30)
        assert "Traceback" not in err, err
        return self.process.returncode, [json.loads(line) for line in out.splitlines()]

    def memory(self) -> int:
        """Bytes of it in RAM."""
        with open(f"/proc/{self.process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def kv_server(*arguments: object, secret: str | None = None, port: int = 0) -> Iterator[KVServer]:
    command = [ELINVAR, "kv-server", "--port", str(port), "--json", *map(str, arguments)]
    environment = {**ENVIRONMENT, **({"ELINVAR_KV_SECRET": secret} if secret else {})}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        yield KVServer(process, json.loads(process.stdout.readline())["address"])
    finally:
        process.kill()
        process.communicate()


@contextmanager
def fake_server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Its address. `answer` has each connection, which is closed when it returns."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(sock: socket.socket) -> None:
        with sock, suppress(OSError):
            answer(sock)

    def run() -> None:
        with suppress(OSError):
            while True:
                sock, _ = listener.accept()
                threading.Thread(target=serve, args=(sock,), daemon=True).start()

    threading.Thread(target=run, daemon=True).start()
    try:
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


BLOCK = 100_000


def content(seed: int, size: int = BLOCK) -> memoryview:
    return memoryview(seed.to_bytes(4, "little") * (size // 4 + 1))[:size]


def read(tier: RemoteTier, key: bytes, size: int = BLOCK) -> bytes | None:
    into = bytearray(size)
    return bytes(into) if tier.read(key, memoryview(into)) else None


@contextmanager
def in_thread(**limits: Any) -> Iterator[CacheServer]:
    """In a thread of this process: quick, and one can look inside."""
    limits = {"max_bytes": 1 << 20, "max_value": 1 << 19} | limits
    server = CacheServer("127.0.0.1", 0, Limits(**limits))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop(0)
        thread.join(10)
        assert not thread.is_alive()


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
