"""What heads to be trained are made of, and how they learn.

A head learns to say what the target says after a token, from the target's states before it. It also sees
what it will see when it drafts, its own states in the place of the target's, for `depth` drafts one after
the other (as EAGLE-3 is trained: Li et al., 2025).

Legend: B answers, N tokens of each (from the second on), D dim, C tokens that are learned, X what the
target's `hidden` gives of all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from elinvar.base.config import ModelConfig

FADE = 0.8
"""What a draft's loss counts for beside that of the one before it."""
Past = list[tuple[Tensor, Tensor]]
"""Keys and values of the drafts so far."""
Stored = tuple[str, NDArray[Any]]
"""Type, as safetensors files name it, and elements."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a head needs of its model, as f32 tensors."""

    config: ModelConfig
    embed: Tensor
    """[V, D], with the embedding's scale."""
    head: Tensor
    """[C, D] rows of its head."""
    norm: Tensor
    """[D] gains of its last norm."""
    tokens: Tensor
    """[C] their ids, ascending."""

    def logits(self, h: Tensor) -> Tensor:
        logits = h @ self.head.T
        cap = self.config.final_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


class Head(nn.Module):
    """Its parameters have the names that published heads give them."""

    taps: Sequence[int] = ()
    """Layers of the target that it sees beside the last."""

    def first(self, states: Tensor) -> Tensor:
        """What it makes of the target's states [B, N, X] -> [B, N, D]."""
        raise NotImplementedError

    def onward(
        self, target: Target, embedded: Tensor, x: Tensor, past: Past
    ) -> tuple[Tensor, Tensor]:
        """Of tokens [B, N, D] and the states before them: its states of them, for the next draft, and the
        logits [B, N, C] of the tokens after."""
        raise NotImplementedError

    def losses(
        self, target: Target, ids: Tensor, states: Tensor, wanted: Tensor, depth: int
    ) -> tuple[Tensor, Tensor]:
        """The loss, and by draft the share of tokens that it has likeliest as the target has.

        ids [B, N + 1]; states [B, N + 1, (1 + taps) D] of the target, the head's first; wanted
        [B, N + 1]: tokens after which drafts count."""
        dim = target.config.dim
        with torch.no_grad():
            said = target.logits(states[:, 1:, :dim])
            chances, likeliest = said.softmax(-1), said.argmax(-1)
        embedded, counted = target.embed[ids[:, 1:]], wanted[:, 1:].float()
        x, past = self.first(states[:, :-1]), Past()
        loss, right = torch.zeros(()), []
        for i in range(depth):
            x, logits = self.onward(target, embedded, x, past)
            # Of the first tokens there were not so many drafts before.
            counted = counted if i == 0 else later(counted[..., None], 1)[..., 0] * counted
            crossed = -(chances * logits.log_softmax(-1)).sum(-1)
            loss = loss + FADE**i * (crossed * counted).sum() / counted.sum().clamp(min=1)
            hits = (logits.argmax(-1) == likeliest) * counted
            right.append(hits.sum() / counted.sum().clamp(min=1))
            x = later(x, 1)
        return loss, torch.stack(right).detach()

    def published(self, target: Target) -> dict[str, Stored]:
        """Its tensors, as files hold them."""
        return {
            name: ("BF16", tensor.detach().to(torch.bfloat16).view(torch.int16).numpy())
            for name, tensor in self.state_dict().items()
        }

    def described(self, target: Target) -> dict[str, Any]:
        """Its config.json."""
        c = target.config
        return {
            "model_type": "llama",
            "hidden_size": c.dim,
            "intermediate_size": c.ff_dim,
            "num_attention_heads": c.num_heads,
            "num_key_value_heads": c.num_kv_heads,
            "head_dim": c.head_dim,
            "vocab_size": c.vocab_size,
            "rms_norm_eps": c.norm_eps,
            "rope_theta": c.rope["full"].base,
            "max_position_embeddings": c.max_context,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
        }


class RMSNorm(nn.Module):
    def __init__(self, gain: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(gain.clone()), eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    def __init__(self, c: ModelConfig, inputs: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_heads, c.num_kv_heads, c.head_dim
        self.q_proj = linear(inputs, c.num_heads * c.head_dim)
        self.k_proj = linear(inputs, c.num_kv_heads * c.head_dim)
        self.v_proj = linear(inputs, c.num_kv_heads * c.head_dim)
        self.o_proj = linear(c.num_heads * c.head_dim, c.dim, 0.0)
        self.base = c.rope["full"].base

    def forward(self, x: Tensor, past: list[tuple[Tensor, Tensor]]) -> Tensor:
        """x [B, N, inputs] -> [B, N, D]. past: keys and values of the drafts before this one, to which its
        own are added. Token p of draft j sees the target's tokens up to p - j, and of each draft i
        before it the one at p - j + i."""
        b, n, _ = x.shape
        q = self._rotated(self.q_proj(x).view(b, n, self.heads, -1).transpose(1, 2))
        k = self._rotated(self._spread(self.k_proj(x)))
        v = self._spread(self.v_proj(x))
        past.append((k, v))
        depth, scale = len(past) - 1, self.head_dim**-0.5
        places = torch.arange(n)
        seen = places[None, :] <= places[:, None] - depth
        scores = (q @ past[0][0].transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
        others = [(later(k, depth - i), later(v, depth - i)) for i, (k, v) in enumerate(past) if i]
        parts = [scores, *((q * k).sum(-1, keepdim=True) * scale for k, _ in others)]
        weights = torch.cat(parts, -1).softmax(-1)
        out = weights[..., :n] @ past[0][1]
        for i, (_, v) in enumerate(others):
            out = out + weights[..., n + i, None] * v
        result: Tensor = self.o_proj(out.transpose(1, 2).reshape(b, n, -1))
        return result

    def _spread(self, x: Tensor) -> Tensor:
        """[B, N, Hkv d] -> [B, H, N, d]"""
        b, n, _ = x.shape
        x = x.view(b, n, self.kv_heads, -1).transpose(1, 2)
        return x.repeat_interleave(self.heads // self.kv_heads, 1)

    def _rotated(self, x: Tensor) -> Tensor:
        half = self.head_dim // 2
        frequencies = self.base ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(1, x.shape[2] + 1, dtype=torch.float64)[:, None] * frequencies
        cos, sin = angles.cos().float(), angles.sin().float()
        first, second = x[..., :half], x[..., half:]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class MLP(nn.Module):
    def __init__(self, dim: int, ff_dim: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = linear(dim, ff_dim), linear(dim, ff_dim)
        self.down_proj = linear(ff_dim, dim, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


def linear(inputs: int, outputs: int, deviation: float = 0.02) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, 0.0, deviation)
    return layer


def later(x: Tensor, count: int) -> Tensor:
    """[..., N, D], each row `count` places further; the first ones are 0."""
    return x if count == 0 else functional.pad(x[..., :-count, :], (0, 0, count, 0))
