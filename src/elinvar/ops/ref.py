"""The `ref` provider: numpy in float64, obviously right, slow. Every other provider is swept
against it. It rounds where the definition of an op rounds by design (int8 activations, the
cache's dtype), and nowhere else. Its ops lie by topic in the files ref_*.py."""

from __future__ import annotations

from collections.abc import Callable

from elinvar.ops.api import F32
from elinvar.ops.host import HostOps
from elinvar.ops.ref_attention import AttentionRef
from elinvar.ops.ref_moe import MoeRef
from elinvar.ops.ref_recurrent import RecurrentRef
from elinvar.ops.ref_sample import SampleRef


class RefOps(HostOps, AttentionRef, MoeRef, RecurrentRef, SampleRef):
    name = "ref"

    def record(self, run: Callable[[], F32]) -> Callable[[], F32]:
        return run
