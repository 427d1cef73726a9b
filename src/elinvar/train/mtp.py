"""A head as DeepSeek V3 has one (DeepSeek-AI, 2024) to be trained: models/load.py reads what it becomes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from elinvar.train.head import MLP, Attention, Head, Past, RMSNorm, Stored, Target, linear


class MTP(Head):
    def __init__(self, target: Target) -> None:
        """It begins by handing on the state before a token."""
        super().__init__()
        c = target.config
        ones = torch.ones(c.dim)
        self.enorm, self.hnorm = RMSNorm(ones, c.norm_eps), RMSNorm(ones, c.norm_eps)
        self.eh_proj = linear(2 * c.dim, c.dim, 0.0)
        with torch.no_grad():
            self.eh_proj.weight[:, c.dim :] = torch.eye(c.dim)
        self.input_layernorm = RMSNorm(ones, c.norm_eps)
        self.self_attn = Attention(c, c.dim)
        self.post_attention_layernorm = RMSNorm(ones, c.norm_eps)
        self.mlp = MLP(c.dim, c.ff_dim)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(target.norm, c.norm_eps)})

    def first(self, states: Tensor) -> Tensor:
        return states[..., : self.input_layernorm.weight.numel()]

    def onward(
        self, target: Target, embedded: Tensor, x: Tensor, past: Past
    ) -> tuple[Tensor, Tensor]:
        x = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(x)), -1))
        x = x + self.self_attn(self.input_layernorm(x), past)
        x = x + self.mlp(self.post_attention_layernorm(x))
        x = self.shared_head["norm"](x)
        return x, target.logits(x)

    def published(self, target: Target) -> dict[str, Stored]:
        layer = f"model.layers.{target.config.num_layers}."
        return {layer + name: stored for name, stored in super().published(target).items()}

    def described(self, target: Target) -> dict[str, Any]:
        return super().described(target) | {
            "architectures": ["NextNHead"],
            "num_hidden_layers": target.config.num_layers,
            "num_nextn_predict_layers": 1,
        }
