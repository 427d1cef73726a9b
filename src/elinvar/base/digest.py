"""blake2b, without `hashlib`: its import loads OpenSSL for the other digests, and OpenSSL stays in
memory, 3 MB of it. A process that generates needs this one digest."""

from __future__ import annotations

try:
    from _blake2 import blake2b
except ImportError:  # another Python, which has it elsewhere
    from hashlib import blake2b

__all__ = ["blake2b"]
