"""EAGLE heads in their published layouts, against their formulas over transformers' own layers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from drill import Drill
from elinvar.base.errors import ModelError
from elinvar.base.sampling import SamplingParams
from elinvar.models.drafts import load_heads
from elinvar.models.eagle import is_eagle, load_eagle
from elinvar.nn.decoder import Decoder
from elinvar.nn.eagle import Eagle3Head, EagleHead
from elinvar.ops.layout import unpack
from elinvar.run.drafters.heads import HeadsDrafter
from elinvar.weights.checkpoint import open_checkpoint
from engines import provider, tiny_model
from families.base import LLAMA, VOCAB
from helpers import Span, make_batch, make_cache

torch = pytest.importorskip("torch")
llama = pytest.importorskip("transformers.models.llama.modeling_llama")
transformers = pytest.importorskip("transformers")

D, CAN_DRAFT = LLAMA.dim, 40
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": D,
    "intermediate_size": 80,
    "num_hidden_layers": 1,
    "num_attention_heads": LLAMA.num_heads,
    "num_key_value_heads": LLAMA.num_kv_heads,
    "head_dim": LLAMA.head_dim,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
}
EAGLE3 = CONFIG | {
    "architectures": ["LlamaForCausalLMEagle3"],
    "draft_vocab_size": CAN_DRAFT,
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 0]},
}


class Reference(torch.nn.Module):
    """The layer and what is around it, in f32."""

    def __init__(self, third: bool) -> None:
        super().__init__()
        config = transformers.LlamaConfig(**CONFIG, attn_implementation="eager")
        self.third = third
        self.layer = llama.LlamaDecoderLayer(config, 0)
        self.rope = llama.LlamaRotaryEmbedding(config)
        self.fc = torch.nn.Linear((3 if third else 2) * D, D, bias=not third)
        self.norms = torch.nn.ModuleList(llama.LlamaRMSNorm(D, 1e-5) for _ in range(3))
        self.head = torch.nn.Linear(D, CAN_DRAFT, bias=False)
        if third:
            for name in ("q_proj", "k_proj", "v_proj"):
                old = getattr(self.layer.self_attn, name)
                setattr(self.layer.self_attn, name, torch.nn.Linear(2 * D, old.out_features, False))
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, float(parameter.dim() < 2), 0.2)

    def forward(self, embedded: Any, before: Any) -> Any:
        """[T, D] of tokens 1 .. T and of the states before them -> states [T, D]."""
        rope = self.rope(embedded[None], torch.arange(1, len(embedded) + 1)[None])
        mask = torch.full((len(embedded), len(embedded)), -torch.inf).triu(1)[None, None]
        if self.third:
            x, seen = before, torch.cat((self.norms[0](embedded), self.norms[1](before)), -1)
        else:
            x = seen = self.fc(torch.cat((embedded, before), -1))
        attended = self.layer.self_attn(seen[None], position_embeddings=rope, attention_mask=mask)
        x = x + attended[0][0]
        return x + self.layer.mlp(self.layer.post_attention_layernorm(x))

    def published(self) -> dict[str, np.ndarray]:
        prefix = "midlayer." if self.third else "layers.0."
        layer = {
            prefix + name: t.numpy()
            for name, t in self.layer.state_dict().items()
            if name != "input_layernorm.weight"
        }
        found = layer | {f"fc.{name}": t.numpy() for name, t in self.fc.state_dict().items()}
        if not self.third:
            return found
        ids = np.sort(np.random.default_rng(5).permutation(VOCAB)[:CAN_DRAFT])
        return found | {
            "midlayer.input_layernorm.weight": self.norms[0].weight.detach().numpy(),
            "midlayer.hidden_norm.weight": self.norms[1].weight.detach().numpy(),
            "norm.weight": self.norms[2].weight.detach().numpy(),
            "lm_head.weight": self.head.weight.detach().numpy(),
            "d2t": ids - np.arange(CAN_DRAFT),
            "t2d": np.isin(np.arange(VOCAB), ids),
        }


def write(folder: Path, third: bool, **config: Any) -> Reference:
    torch.manual_seed(1)
    reference = Reference(third)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps((EAGLE3 if third else CONFIG) | config))
    save_file(reference.published(), folder / "model.safetensors")
    return reference


def load(folder: Path, target: Decoder) -> EagleHead:
    return load_eagle(open_checkpoint(folder), target, target.ops, "f32")


def tiny_target() -> Decoder:
    target = tiny_model(provider(), kind="f32")
    assert isinstance(target, Decoder)
    return target


@pytest.mark.parametrize("third", [False, True])
def test_parity(third: bool, tmp_path: Path) -> None:
    """All tokens at once, then one draft after the other on top of them."""
    reference, target = write(tmp_path, third), tiny_target()
    assert is_eagle(open_checkpoint(tmp_path))
    head = load(tmp_path, target)
    ids, known = np.random.default_rng(2).integers(0, VOCAB, 44).tolist(), 40
    kv, blocks = make_cache(target, provider(), 2, "f32"), [1, 0]
    span = Span(ids, 0, known, blocks)
    features = head.features(target.hidden(make_batch([span], 1), kv, all_tokens=True))
    states = head.draft(make_batch([Span(ids, 1, known, blocks)], 1), features[:-1], kv)
    chain = [states[-1:]]
    for at in range(known, len(ids)):
        batch = make_batch([Span(ids, at, at + 1, blocks)], 1)
        chain.append(head.draft(batch, chain[-1], kv))
    found = np.concatenate([states, *chain[1:]])
    embed = torch.tensor(unpack(target.embed))
    with torch.no_grad():
        before = torch.tensor(features[:-1])
        for at in range(known, len(ids) + 1):
            expected = reference(embed[torch.tensor(ids[1:at])], before)
            before = torch.cat((before, expected[-1:]))
        logits = reference.head(reference.norms[2](expected)).numpy()
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-4, atol=2e-3)
    drafted = head.draft_logits(found)
    if not third:
        assert np.array_equal(drafted, target.logits(found))
        return
    ids_c = reference.published()["d2t"] + np.arange(CAN_DRAFT)
    np.testing.assert_allclose(drafted[:, ids_c], logits, rtol=2e-4, atol=2e-3)
    assert np.isneginf(np.delete(drafted, ids_c, axis=1)).all()
    tapped = target.hidden(make_batch([span], 1), kv, all_tokens=True)[:, D:]
    expected_features = tapped @ reference.fc.weight.detach().numpy().T
    np.testing.assert_allclose(features, expected_features, rtol=2e-4, atol=2e-3)


@pytest.mark.parametrize("third", [False, True])
def test_it_drafts_and_changes_nothing(third: bool, tmp_path: Path) -> None:
    write(tmp_path, third)

    def answers(most: int) -> tuple[list[list[int]], int]:
        target = tiny_target()
        head = load(tmp_path, target)
        one = Drill(
            target, provider(), lambda rows, kv: HeadsDrafter("eagle", head, provider(), kv, rows)
        )
        for row in range(3):
            ids = np.random.default_rng(row).integers(0, 256, 20 + 15 * row).tolist()
            one.start(row, ids, SamplingParams(temperature=0.5 * row, seed=row))
        for _ in range(24):
            one.step(most)
        ids = [one.rows.token_ids[row, : 44 + 15 * row].tolist() for row in range(3)]
        return ids, sum(p.num_proposed for p in one.live.values())

    plain, none = answers(0)
    drafted, some = answers(3)
    assert drafted == plain
    assert none == 0 and some == 3 * 23 * 3


def test_as_they_are_used_matrices_have_8_bits(tmp_path: Path) -> None:
    write(tmp_path, third=True)
    head = load_heads(open_checkpoint(tmp_path), tiny_target(), provider())
    assert isinstance(head, Eagle3Head)
    exact = load(tmp_path, tiny_target())
    assert [w.kind for w in (*head.join, *head.head)] == ["q8", "q8"]
    h_LD = np.random.default_rng(3).normal(size=(5, D)).astype(np.float32)
    found, expected = head.draft_logits(h_LD), exact.draft_logits(h_LD)
    finite = np.isfinite(expected)
    np.testing.assert_allclose(found[finite], expected[finite], atol=0.05 * expected[finite].std())


def test_heads_that_do_not_fit(tmp_path: Path) -> None:
    write(tmp_path / "wide", False, hidden_size=128)
    with pytest.raises(ModelError, match="has hidden_size = 128, and heads for this model need 64"):
        load(tmp_path / "wide", tiny_target())
    write(tmp_path / "far", True, eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 7]})
    with pytest.raises(ModelError, match=r"the layers 0 to 1"):
        load(tmp_path / "far", tiny_target())
    small = tiny_target()
    small.config = replace(small.config, vocab_size=100)
    write(tmp_path / "more", True)
    with pytest.raises(ModelError, match="names tokens that the model does not have"):
        load(tmp_path / "more", small)
