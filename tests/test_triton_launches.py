"""What is compiled ahead of time is what is launched: calls of the provider's kernels with real shapes,
of which nothing is run, against the cases that the modules name as COMPILED."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from elinvar.base.config import KVSpec  # noqa: E402
from elinvar.ops.triton import attention as attention_module  # noqa: E402
from elinvar.ops.triton import gather, latent, linear, lora, moe, norms, route, rows  # noqa: E402
from elinvar.ops.triton.caches import kv_layers  # noqa: E402
from elinvar.ops.triton.cases import KernelCase, collect  # noqa: E402
from elinvar.ops.triton.matrices import Matrix  # noqa: E402

BF16, F32, I32 = torch.bfloat16, torch.float32, torch.int32
OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": None}
"""What a launch has that says nothing."""
NOT_HERE = "PTX", "ROWS", "CODES", "SCALES"
"""Rows of a program, where that is no part of a tile, are more under the interpreter; strides between
experts are the interpreter's own."""
CASES = {name: case for case in collect() if "/elsewhere" not in (name := case.name)}


def empty(*shape: int, dtype: torch.dtype = BF16) -> Any:
    return torch.empty(shape, dtype=dtype)


def dense(n: int, k: int, experts: int | None = None) -> Matrix:
    shape = (n, k) if experts is None else (experts, n, k)
    return Matrix("bf16", (n, k), empty(*shape), experts=experts)


def q4(n: int, k: int, experts: int | None = None) -> Matrix:
    many = () if experts is None else (experts,)
    codes = empty(*many, k // 64, n, 32, dtype=torch.uint8)
    return Matrix("q4", (n, k), codes, empty(*many, k // 32, n, dtype=I32), experts=experts)


def attend(
    tokens: int, sequences: int, context: int, heads: tuple[int, int, int], kind: Any = "bf16"
) -> None:
    h, kv_heads, d = heads
    (kv,) = kv_layers(KVSpec("full", (0,), kv_heads, d, kind), 1, "cpu")
    where = empty(sequences + 1, dtype=I32), empty(sequences, context // 32, dtype=I32)
    q = empty(tokens, h, d, dtype=torch.float16 if kind == "f16" else BF16)
    attention_module.attention(q, kv, *where, empty(tokens, dtype=I32), d**-0.5)


def attend_latents(tokens: int, context: int) -> None:
    (kv,) = kv_layers(KVSpec("full", (0,), 1, 576, "bf16", latent_dim=512), 1, "cpu")
    where = empty(2, dtype=I32), empty(1, context // 32, dtype=I32), empty(tokens, dtype=I32)
    latent.latent_attention(empty(tokens, 16, 576), kv, *where, 0.07)


def route_and_multiply() -> None:
    experts = moe.DeviceExperts(dense(1536, 2048, 128), dense(2048, 768, 128))
    ids, weights = empty(128, 8, dtype=I32), empty(128, 8, dtype=F32)
    moe.moe(empty(128, 2048), ids, weights, experts, "silu")


GAIN, STREAM = empty(4096, dtype=F32), empty(7, 4096, dtype=F32)
ADAPTERS = lora.Part(0, empty(2, 16, 4096, dtype=F32), empty(2, 4096, 16, dtype=F32))
CALLS: dict[str, Callable[[], object]] = {
    "linear/bf16": lambda: linear.linear(empty(7, 4096), [dense(4096, 4096)], dtype=F32),
    "linear/q4": lambda: linear.linear(empty(7, 4096), [q4(4096, 4096)], dtype=F32),
    "linear/bf16/gated": lambda: linear.gated_linear(empty(7, 4096), dense(8192, 4096), "silu"),
    "linear/bf16/heads": lambda: linear.head_linear(empty(7, 4096), dense(4096, 128), 32),
    "gather/bf16": lambda: gather.embed(empty(7, dtype=I32), dense(128256, 4096), 1.0),
    "gather/quantise": lambda: gather.quantise_rows(empty(7, 4096)),
    "attention/bf16/32x8x128": lambda: attend(512, 1, 1024, (32, 8, 128)),
    "attention/bf16/32x8x128/splits": lambda: attend(1, 1, 4096, (32, 8, 128)),
    "attention/f16/32x8x128": lambda: attend(512, 1, 1024, (32, 8, 128), "f16"),
    "attention/int8/32x8x128": lambda: attend(512, 1, 1024, (32, 8, 128), "int8"),
    "attention/int8/32x8x128/splits": lambda: attend(1, 1, 4096, (32, 8, 128), "int8"),
    "attention/fp8/32x8x128/splits": lambda: attend(1, 1, 4096, (32, 8, 128), "fp8"),
    "attention/bf16/16x8x256/splits": lambda: attend(1, 1, 4096, (16, 8, 256)),
    "latent/bf16/16x512+64": lambda: attend_latents(64, 1024),
    "latent/bf16/16x512+64/splits": lambda: attend_latents(1, 4096),
    "norm/rms-4096": lambda: norms.rms_norm(empty(7, 4096, dtype=F32), GAIN, 1e-5, BF16),
    "norm/add-rms-4096": lambda: norms.add_rms_norm(STREAM, STREAM, GAIN, 1e-5, BF16),
    "gated/silu": lambda: rows.gated(empty(7, 28672, dtype=F32), "silu", BF16),
    "columns/add": lambda: rows.add(STREAM, STREAM),
    "route/softmax": lambda: route.route(empty(7, 128, dtype=F32), 8, "softmax", True, 1.0),
    "lora/down-16": lambda: lora.lora(STREAM, empty(7, 4096), empty(7, dtype=I32), ADAPTERS),
    "lora/up-16": lambda: lora.lora(STREAM, empty(7, 4096), empty(7, dtype=I32), ADAPTERS),
    "experts/bf16/gated": route_and_multiply,
    "experts/bf16/down": route_and_multiply,
    "experts/combine": route_and_multiply,
}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """(kernel, its arguments and options by name) of each launch."""
    found: list[tuple[Any, dict[str, Any]]] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        own = {name: named.pop(name) for name in OPTIONS if name in named}
        bound = inspect.signature(kernel.fn).bind(*args, **named)
        bound.apply_defaults()
        found.append((kernel, {**OPTIONS, **bound.arguments, **own}))

    monkeypatch.setattr(InterpretedFunction, "run", run)
    monkeypatch.setattr(rows, "BLOCK", 1024)  # more under the interpreter
    yield found


def differs(case: KernelCase, launched: dict[str, Any]) -> list[str]:
    """What the case has otherwise."""
    told = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.constexprs}
    tiled = case.name.startswith(("attention/", "latent/"))
    hidden = set(NOT_HERE) - ({"ROWS"} if tiled else set())
    given = case.signature.keys() - case.constexprs.keys()
    wrong = [
        f"{name}: {value!r}, launched with {launched[name]!r}"
        for name, value in told.items()
        if name not in hidden and launched[name] != value
    ]
    return wrong + [f"{name}: launched without" for name in given if launched[name] is None]


@pytest.mark.parametrize("name", CALLS)
def test_a_case_is_what_is_launched(name: str, launches: list[tuple[Any, dict[str, Any]]]) -> None:
    CALLS[name]()
    case = CASES[name]
    told = [differs(case, arguments) for kernel, arguments in launches if kernel is case.kernel]
    assert told and [] in told, told
