"""What an engine on the provider for GPUs takes, counted tensor by tensor under Triton's interpreter,
against what `elinvar plan` says of it before."""

from __future__ import annotations

import weakref
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from elinvar.base.config import EngineConfig  # noqa: E402
from elinvar.base.sampling import SamplingParams  # noqa: E402
from elinvar.engine.described import Described  # noqa: E402
from elinvar.engine.devices import CHIPS  # noqa: E402
from elinvar.engine.forecast import Run, device_room  # noqa: E402
from elinvar.ops import Weight, load_provider  # noqa: E402
from elinvar.ops.arguments import Experts  # noqa: E402
from elinvar.ops.triton import matrices, panels  # noqa: E402
from elinvar.ops.triton.device import DeviceBlocks  # noqa: E402
from elinvar.ops.triton.sizes import arriving_bytes, matrix_bytes  # noqa: E402
from elinvar.weights.packfile import Entry  # noqa: E402
from engines import tiny_engine, tiny_parts  # noqa: E402


class Meter(TorchDispatchMode):
    """Bytes of tensors that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        at, size = storage.data_ptr(), storage.nbytes()
        if not size or at in self._alive:
            return
        self._alive[at] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, at)

    def _gone(self, at: int) -> None:
        self.now -= self._alive.pop(at, 0)


def described(family: str, kind: str) -> Described:
    parts = tiny_parts(family, kind)
    entries = [
        Entry(name, w.kind if isinstance(w, Weight) else "vector", w.shape)
        for name, w in parts.weights.items()
    ]
    return Described(parts.config, entries, True)


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "q4"), ("llama", "bf16"), ("qwen3_moe", "q4")]
)
def test_a_run_takes_what_was_planned(family: str, kind: str) -> None:
    options: dict[str, Any] = {"kv_memory": 4 << 20, "max_rows": 16, "max_step_tokens": 32}
    options |= {"max_context": 512, "kv_dtype": "f32"}
    with Meter() as meter:
        engine = tiny_engine(family, kind, load_provider("cuda"), **options)
        cache: Any = engine.runner.kv[0]
        kv_bytes = meter.now
        params = SamplingParams(max_tokens=3, temperature=0.0)
        for length in (5, 32):  # weights and tables come with the first
            meter.peak = meter.now
            engine.add([7 * i % 250 for i in range(length)], params)
            while engine.has_work:
                engine.step()
    run = Run(described(family, kind), EngineConfig(device="cuda", **options), CHIPS["h200"])
    assert isinstance(cache.blocks, DeviceBlocks)
    assert kv_bytes == pytest.approx(run.kv.num_bytes, rel=0.03)
    planned = run.weights + run.kv.num_bytes + run.workspace
    assert meter.peak == pytest.approx(planned, rel=0.03)


@pytest.mark.parametrize("kind", ["q4", "q5", "q8", "bf16", "fp8-blocks", "nvfp4"])
def test_what_weights_take_while_they_arrive(kind: str) -> None:
    """All are there in the end, and beside them there was no more than was said."""
    weights = {
        name: w for name, w in tiny_parts("llama", kind).weights.items() if isinstance(w, Weight)
    }
    ops: Any = load_provider("cuda")
    with Meter() as meter:
        for w in weights.values():
            ops._matrices.one(w)
    named = [(name, w.kind, w.shape) for name, w in weights.items()]
    assert meter.now == sum(matrix_bytes(w.kind, w.shape) for w in weights.values())
    assert 0 < meter.peak - meter.now <= arriving_bytes(named)


@pytest.mark.parametrize("kind", ["q4", "bf16"])
def test_experts_arrive_a_layer_at_a_time(kind: str) -> None:
    def of(part: str) -> list[Any]:
        return [weights[f"layers.0.experts.{e}.{part}"] for e in range(count)]

    weights = tiny_parts("qwen3_moe", kind).weights
    count = sum(name.startswith("layers.0.experts.") for name in weights) // 3
    ops: Any = load_provider("cuda")
    parts = [of(part) for part in ("gate", "up", "down")]
    experts = Experts(*parts)
    with Meter() as meter:
        ops._matrices.experts(experts)
    named = [("layers.0.experts.0.up", w.kind, w.shape) for part in parts for w in part]
    assert meter.now == sum(matrix_bytes(w.kind, w.shape) for part in parts for w in part)
    assert 0 < meter.peak - meter.now <= arriving_bytes(named)


def test_an_engine_leaves_what_is_not_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the formula of `elinvar plan`."""
    ops: Any = load_provider("cuda")
    options: dict[str, Any] = {"max_rows": 256, "max_context": 512}
    room = device_room(tiny_parts().config, EngineConfig(device="cuda", **options), 1 << 30)
    free = (1 << 30) - room + (4 << 20)
    monkeypatch.setattr(ops, "available_memory", lambda: free)
    engine = tiny_engine("llama", "q4", ops, kv_memory=None, **options)
    assert 0.9 * (4 << 20) < engine.kv_bytes <= 4 << 20


def test_a_matrix_arrives_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tiny_parts("llama", "q5").weights
    for w in (weights["embed"], weights["layers.0.gate"]):
        whole = matrices.from_weight(w, torch.bfloat16, "cpu")
        with monkeypatch.context() as patched:
            patched.setattr(panels, "ARRIVING", 16 * w.shape[1])
            sliced = matrices.from_weight(w, torch.bfloat16, "cpu")
        assert whole.shape == sliced.shape
        for one, other in zip(whole.tensors, sliced.tensors, strict=True):
            assert one is other is None or torch.equal(one, other)
