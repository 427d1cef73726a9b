"""The loop that trains a head, and the folder that it becomes.

A checkpoint holds all that the loop goes by, so that one that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elinvar.nn.decoder import Decoder
from elinvar.ops.api import Ops
from elinvar.run.replay import Recorded
from elinvar.train.head import Head, Target
from elinvar.weights.atomic import atomic_file
from elinvar.weights.safetensors import SINGLE, write_safetensors

BATCH = 8
"""Answers in a step."""
WARM_UP = 20
"""Steps in which the rate rises."""
SAVE_S = 60.0
"""Seconds between checkpoints."""


@dataclass(frozen=True, slots=True)
class Settings:
    epochs: int
    rate: float
    depth: int
    """Drafts in a row that it learns."""
    num_tokens: int
    """That it can draft."""


Told = Callable[[int, int, float, list[float]], bool]
"""(steps done, in all, loss, likeliest tokens right by draft) -> whether to go on."""


def make_target(model: Decoder, ops: Ops, answers: Sequence[Recorded], num_tokens: int) -> Target:
    """num_tokens: the commonest of the answers, and where they have fewer, those that vocabularies begin
    with, as these are common, too."""
    config = model.config
    count = min(num_tokens, config.vocab_size)
    times = np.zeros(config.vocab_size, np.int64)
    for answer in answers:
        np.add.at(times, np.array(answer.token_ids[answer.num_prompt :], np.int64), 1)
    tokens = np.sort(np.argsort(-times, kind="stable")[:count]).astype(np.int32)
    everything = np.arange(config.vocab_size, dtype=np.int32)
    norm: Any = model.next_norms[-1]
    return Target(
        config,
        torch.from_numpy(ops.embed(everything, model.embed, config.embed_scale).copy()),
        torch.from_numpy(ops.embed(tokens, model.head[0], 1.0).copy()),
        torch.from_numpy(np.array(norm.gain)),
        torch.from_numpy(tokens.astype(np.int64)),
    )


def fit(
    head: Head,
    target: Target,
    shards: Sequence[Path],
    work: Path,
    settings: Settings,
    told: Told,
) -> bool:
    """Trains `head`; whether to the end: where `told` said stop there is a checkpoint."""
    optimiser = torch.optim.AdamW(head.parameters(), settings.rate, (0.9, 0.95), weight_decay=0.01)
    path, done = work / "checkpoint.pt", 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        head.load_state_dict(saved["head"])
        optimiser.load_state_dict(saved["optimiser"])
        done = saved["steps"]
    per_epoch = sum(-(-_count(shard) // BATCH) for shard in shards)
    total, saved_at = per_epoch * settings.epochs, time.monotonic()
    for epoch in range(done // per_epoch, settings.epochs):
        for at, batch in enumerate(_batches(shards, epoch), epoch * per_epoch):
            if at < done:
                continue
            for group in optimiser.param_groups:
                group["lr"] = settings.rate * _share(at, total)
            optimiser.zero_grad()
            loss, right = head.losses(target, *batch, settings.depth)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimiser.step()
            go_on = told(at + 1, total, loss.item(), right.tolist())
            if not go_on or time.monotonic() - saved_at > SAVE_S:
                _save(path, head, optimiser, at + 1)
                saved_at = time.monotonic()
            if not go_on:
                return False
    return True


def _share(step: int, total: int) -> float:
    """Of the rate: it rises, then falls as a cosine."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(total - WARM_UP, 1)))


def _save(path: Path, head: Head, optimiser: torch.optim.Optimizer, steps: int) -> None:
    told = {"head": head.state_dict(), "optimiser": optimiser.state_dict(), "steps": steps}
    with atomic_file(path, 0) as file:
        torch.save(told, file)


def _count(shard: Path) -> int:
    with np.load(shard) as arrays:
        return len(arrays["lengths"])


def _batches(shards: Sequence[Path], epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """ids [B, N], states [B, N, X] and which tokens are wanted [B, N], padded; in an order that follows
    from the epoch."""
    order = np.random.default_rng(epoch)
    for number in order.permutation(len(shards)):
        with np.load(shards[number]) as arrays:
            ids, states = arrays["ids"], arrays["states"]
            lengths, prompts = arrays["lengths"], arrays["prompts"]
        ends = np.cumsum(lengths)
        places = order.permutation(len(lengths))
        for first in range(0, len(places), BATCH):
            some = places[first : first + BATCH]
            longest = lengths[some].max()
            batch_ids = np.zeros((len(some), longest), np.int64)
            batch_states = np.zeros((len(some), longest, states.shape[1]), np.float32)
            wanted = np.zeros((len(some), longest), bool)
            for row, i in enumerate(some):
                span = slice(ends[i] - lengths[i], ends[i])
                batch_ids[row, : lengths[i]] = ids[span]
                batch_states[row, : lengths[i]] = states[span]
                wanted[row, prompts[i] - 1 : lengths[i]] = True
            yield (
                torch.from_numpy(batch_ids),
                torch.from_numpy(batch_states),
                torch.from_numpy(wanted),
            )


def publish(head: Head, target: Target, folder: Path) -> None:
    """A folder as such heads are published. Raises ModelError where it cannot be written."""
    text = json.dumps(head.described(target), indent=2).encode()
    with atomic_file(folder / "config.json", len(text)) as file:
        file.write(text)
    arrays = head.published(target)
    entries = [(name, kind, array.shape) for name, (kind, array) in arrays.items()]
    write_safetensors(folder / SINGLE, entries, lambda name: np.ascontiguousarray(arrays[name][1]))
