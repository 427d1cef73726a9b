"""An EAGLE-3 head (Li et al., 2025) to be trained: models/eagle.py reads what it becomes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from elinvar.base.config import ModelConfig
from elinvar.train.head import MLP, Attention, Head, Past, RMSNorm, Stored, Target, linear


class Layer(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        ones = torch.ones(c.dim)
        self.input_layernorm = RMSNorm(ones, c.norm_eps)
        self.hidden_norm = RMSNorm(ones, c.norm_eps)
        self.self_attn = Attention(c, 2 * c.dim)
        self.post_attention_layernorm = RMSNorm(ones, c.norm_eps)
        self.mlp = MLP(c.dim, c.ff_dim)

    def forward(self, embedded: Tensor, x: Tensor, past: Past) -> Tensor:
        both = torch.cat((self.input_layernorm(embedded), self.hidden_norm(x)), -1)
        x = x + self.self_attn(both, past)
        result: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return result


class Eagle(Head):
    def __init__(self, target: Target, taps: Sequence[int]) -> None:
        """It begins as the target would end if its highest tap were its last layer."""
        super().__init__()
        c, self.taps = target.config, taps
        self.fc = linear(len(taps) * c.dim, c.dim, 0.0)
        with torch.no_grad():
            self.fc.weight[:, -c.dim :] = torch.eye(c.dim)
        self.midlayer = Layer(c)
        self.norm = RMSNorm(target.norm, c.norm_eps)
        self.lm_head = nn.Linear(c.dim, len(target.head), bias=False)
        self.lm_head.weight = nn.Parameter(target.head.clone())

    def first(self, states: Tensor) -> Tensor:
        x: Tensor = self.fc(states[..., self.norm.weight.numel() :])
        return x

    def onward(
        self, target: Target, embedded: Tensor, x: Tensor, past: Past
    ) -> tuple[Tensor, Tensor]:
        x = self.midlayer(embedded, x, past)
        return x, self.lm_head(self.norm(x))

    def published(self, target: Target) -> dict[str, Stored]:
        ids = target.tokens.numpy()
        vocabulary = {
            "d2t": ("I64", ids - np.arange(len(ids))),
            "t2d": ("BOOL", np.isin(np.arange(target.config.vocab_size), ids)),
        }
        return super().published(target) | vocabulary

    def described(self, target: Target) -> dict[str, Any]:
        return super().described(target) | {
            "architectures": ["LlamaForCausalLMEagle3"],
            "num_hidden_layers": 1,
            "draft_vocab_size": len(target.tokens),
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(self.taps)},
        }
