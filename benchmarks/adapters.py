"""What LoRA adapters cost a step of decode: everybody without one, all with the same, each with another.

    .venv/bin/python benchmarks/adapters.py
    .venv/bin/python benchmarks/adapters.py --model smollm2-135m --rank 64 --batch 1,8 --threads 2

The model is of Llama's names; the adapters change every matrix of its layers and hold random numbers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from elinvar.base.config import EngineConfig, ModelConfig
from elinvar.base.handling import OFFLINE
from elinvar.base.sampling import SamplingParams
from elinvar.engine.core import Engine
from elinvar.weights.safetensors import write_safetensors

PROMPT, TOKENS, ROUNDS = 64, 48, 5


def save_adapter(folder: Path, config: ModelConfig, rank: int) -> Path:
    """As PEFT saves it, in f16."""
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    d, f = config.dim, config.ff_dim
    shapes = {"self_attn.q": (d, heads), "self_attn.k": (d, kv), "self_attn.v": (d, kv)}
    shapes |= {"self_attn.o": (heads, d), "mlp.gate": (d, f), "mlp.up": (d, f), "mlp.down": (f, d)}
    entries = [
        (f"base_model.model.model.layers.{i}.{name}_proj.lora_{half}.weight", "F16", shape)
        for i in range(config.num_layers)
        for name, (k, n) in shapes.items()
        for half, shape in (("A", (rank, k)), ("B", (n, rank)))
    ]
    sizes = {name: shape for name, _, shape in entries}
    rng = np.random.default_rng(rank)
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 1}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    write_safetensors(
        folder / "adapter_model.safetensors",
        entries,
        lambda name: (rng.standard_normal(sizes[name]) / 64).astype(np.float16),
    )
    return folder


def ms_a_step(engine: Engine, adapters: list[str | None]) -> float:
    """Median of the steps that decode for all; one request for each of `adapters`."""
    for i, name in enumerate(adapters):
        params = SamplingParams(TOKENS, temperature=0, ignore_eos=True, adapter=name)
        engine.add([1 + (i * 31 + j * 7) % 1000 for j in range(PROMPT)], params, handling=OFFLINE)
    while engine.scheduler.num_waiting or any(
        live.request.num_tokens == PROMPT for live in engine._live.values()
    ):
        engine.step()
    times = []
    while len(engine._live) == len(adapters):
        began = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - began)
    while engine.has_work:
        engine.step()
    return 1000 * median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", default="1,4,16,32")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    batches = [int(size) for size in args.batch.split(",")]
    config = EngineConfig(num_threads=args.threads, kv_memory=2**29, max_adapters=max(batches))
    engine = Engine.load(args.model, config)
    with tempfile.TemporaryDirectory() as folder:
        path = save_adapter(Path(folder) / "adapter", engine.model_config, args.rank)
        for i in range(max(batches)):
            engine.load_adapter(str(i), path)
    print(f"{args.model}, rank {args.rank}, {engine.ops.num_threads} threads; ms a decode step")  # type: ignore[attr-defined]
    print(f"{'batch':>5} {'without':>9} {'the same':>9} {'each its own':>13}")
    for size in batches:
        kinds: list[list[str | None]] = [[None] * size, ["0"] * size, [str(i) for i in range(size)]]
        rounds = [[ms_a_step(engine, kind) for kind in kinds] for _ in range(ROUNDS)]
        without, same, own = (median(column) for column in zip(*rounds, strict=True))
        print(f"{size:>5} {without:9.2f} {same:9.2f} {own:13.2f}")


if __name__ == "__main__":
    main()
