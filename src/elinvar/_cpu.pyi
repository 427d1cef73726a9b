"""The C++ extension (csrc/bind*.cpp): bound weights and caches, ops on NumPy arrays."""

from collections.abc import Sequence
from typing import Any

def available() -> list[str]:
    """Instruction sets of this machine, widest first."""

def ceilings(num_threads: int, simd: str) -> dict[str, Any]:
    """The fields of ops.ceilings.Ceilings, measured."""

def exist(paths: list[bytes]) -> list[bool]:
    """Whether there is a file of each name."""

class Matrix:
    def __init__(self, kind: str, n: int, k: int, data: Any) -> None: ...

class Experts:
    def __init__(
        self,
        gates: list[Matrix],
        ups: list[Matrix],
        downs: list[Matrix],
        gate_bias: Any | None,
        up_bias: Any | None,
        down_bias: Any | None,
    ) -> None: ...

class Lora:
    def __init__(self, columns: list[int], num_adapters: int) -> None: ...
    def set(self, target: int, adapter: int, a: Matrix, b: Matrix, scale: float) -> None: ...

class Cache:
    def __init__(self, k: Any, v: Any, dtype: str) -> None: ...

class State:
    def __init__(self, tails: Any, states: Any, key_heads: int, value_dim: int) -> None: ...

class Recording:
    def __call__(self) -> Any: ...
    def timed(self) -> tuple[Any, list[int]]:
        """The same, and the clock in ns before the first op and after each."""

class Provider:
    simd: str
    num_threads: int

    def __init__(self, num_threads: int, simd: str) -> None: ...
    def begin_recording(self) -> None: ...
    def end_recording(self, out: Any | None) -> Any: ...
    def embed(self, ids: Any, w: Matrix, scale: float) -> Any: ...
    def rms_norm(self, x: Any, gain: Any, eps: float) -> Any: ...
    def add_rms_norm(self, x: Any, y: Any, gain: Any, eps: float) -> Any: ...
    def add(self, x: Any, y: Any) -> Any: ...
    def concat(self, x: Any, y: Any) -> Any: ...
    def layer_norm(self, x: Any, gain: Any, bias: Any | None, eps: float) -> Any: ...
    def add_layer_norm(self, x: Any, y: Any, gain: Any, bias: Any | None, eps: float) -> Any: ...
    def scale(self, x: Any, factor: float) -> Any: ...
    def rope_queries(
        self, q: Any, positions: Any, table: Any, heads: int, gain: Any, eps: float
    ) -> Any: ...
    def mul(self, x: Any, y: Any, start: int) -> Any: ...
    def mix(self, xs: list[Any], coefs: Any) -> Any: ...
    def sparsify(self, x: Any, deviations: float) -> Any: ...
    def match_rms(self, x: Any, y: Any) -> Any: ...
    def scale_heads(self, q: Any, positions: Any, factors: Any) -> Any: ...
    def softcap(self, x: Any, cap: float) -> Any: ...
    def activate(self, x: Any, activation: int) -> Any: ...
    def linear(self, x: Any, ws: list[Matrix], bias: Any | None) -> Any: ...
    def gated_linear(self, x: Any, gate: Matrix, up: Matrix, activation: int) -> Any: ...
    def gated(self, x: Any, activation: int) -> Any: ...
    def lora(self, y: Any, x: Any, adapters: Any, lora: Lora) -> None: ...
    def route(
        self,
        logits: Any,
        top_k: int,
        sigmoid: bool,
        renormalise: bool,
        scaling: float,
        bias: Any | None,
        num_groups: int,
        top_groups: int,
    ) -> tuple[Any, Any]: ...
    def moe(
        self,
        x: Any,
        ids: Any,
        weights: Any,
        experts: Experts,
        activation: int,
        scale_inputs: bool,
    ) -> Any: ...
    def rope_write(
        self,
        qkv: Any,
        positions: Any,
        table: Any,
        kv: Cache,
        slots: Any,
        heads: int,
        q_gain: Any | None,
        k_gain: Any | None,
        eps: float,
        v_gain: Any | None,
    ) -> Any: ...
    def head_linear(self, x: Any, w: Matrix, heads: int) -> Any: ...
    def latent_query(self, q: Any, w: Matrix, positions: Any, table: Any, heads: int) -> Any: ...
    def latent_write(
        self, x: Any, positions: Any, table: Any, kv: Cache, slots: Any, gain: Any, eps: float
    ) -> None: ...
    def attention(
        self,
        q: Any,
        kv: Cache,
        query_start: Any,
        tables: Any,
        positions: Any,
        scale: float,
        window: int,
        softcap: float,
        sinks: Any | None,
        chunk: int,
        first: int,
    ) -> Any: ...
    def block_shares(
        self,
        q: Any,
        kv: Cache,
        query_start: Any,
        tables: Any,
        positions: Any,
        scale: float,
        shares: Any,
        softcap: float,
        sinks: Any | None,
    ) -> None: ...
    def index_select(
        self,
        q: Any,
        weights: Any,
        kv: Cache,
        query_start: Any,
        tables: Any,
        positions: Any,
        k: int,
        first: int,
    ) -> Any: ...
    def sparse_attention(
        self,
        q: Any,
        kv: Cache,
        query_start: Any,
        tables: Any,
        positions: Any,
        chosen: Any,
        scale: float,
    ) -> Any: ...
    def causal_conv(
        self, x: Any, w: Any, state: State, query_start: Any, seq_lens: Any, tables: Any
    ) -> Any: ...
    def delta_rule(
        self,
        qkv: Any,
        x: Any,
        a_log: Any,
        dt_bias: Any,
        state: State,
        query_start: Any,
        seq_lens: Any,
        tables: Any,
    ) -> Any: ...
    def gated_rms_norm(self, x: Any, gate: Any, first: int, gain: Any, eps: float) -> Any: ...
    def sigmoid_gate(self, x: Any, gate: Any) -> Any: ...
    def pool(self, x: Any, starts: Any, weights: Any) -> Any: ...
    def score(self, logits: Any, ids: Any, num_top: int) -> Any: ...
    def sample(
        self,
        logits: Any,
        seeds: Any,
        positions: Any,
        temperature: Any,
        top_k: Any,
        top_p: Any,
        min_p: Any,
        num_logprobs: int | None,
        typical_p: Any = None,
        penalties: Any = None,
        biases: Any = None,
        masks: Any = None,
        mask_rows: Any = None,
    ) -> Any: ...

class Chances:
    def __init__(self) -> None: ...
    def of(
        self,
        behind: Sequence[tuple[int, int, int]],
        tokens: Sequence[Sequence[int]],
        said: Sequence[Sequence[float]],
        least: float,
    ) -> list[list[float]]: ...
    def expected(self, row: int, count: int, at_first: float) -> list[float]: ...
    def learn(
        self,
        behind: Sequence[tuple[int, int, int]],
        tokens: Sequence[Sequence[int]],
        said: Sequence[Sequence[float]],
        came: Sequence[Sequence[int]],
    ) -> None: ...
    def forget(self, row: int) -> None: ...

def best_counts(
    chances: Sequence[Sequence[float]],
    seconds: Sequence[float],
    rows: int,
    margin: float,
    slow_down: float,
) -> list[int]: ...

class Suffixes:
    def __init__(
        self, token_ids: Any, most_kept: int, most_shared: int, most_running: int
    ) -> None: ...
    def begin(self, row: int, space: bytes) -> None: ...
    def propose(
        self, asks: Sequence[tuple[int, int, int]], least: float, ahead: Sequence[int]
    ) -> list[tuple[list[int], list[float]]]: ...
    def forget(self, row: int, start: int, stop: int) -> None: ...
    def num_kept(self) -> int: ...
    def num_running(self) -> int: ...
    def bytes(self) -> int: ...
