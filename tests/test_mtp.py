"""Heads that predict further tokens, against the formula of DeepSeek-V3 (DeepSeek-AI, 2024, section
2.2) over transformers' own decoder layer: transformers itself drops them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from elinvar.base.config import BLOCK_SIZE
from elinvar.base.errors import ModelError
from elinvar.cli.describe import describe_model, readable
from elinvar.models import registry
from elinvar.models.load import load_model, load_parts, mtp_heads, reloaded
from elinvar.models.mtp import mtp_rules
from elinvar.models.registry import read_config
from elinvar.nn.mtp import MTPDecoder
from elinvar.ops import Ops, load_provider
from elinvar.weights.checkpoint import open_checkpoint
from elinvar.weights.save import save_state
from families import CASES
from helpers import F32, Span, assert_parity, make_batch, make_cache, run_tokens
from test_models_tiny import LENGTH, make_reference, prompt

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

HEADS = 2


class Head(torch.nn.Module):
    """h'_i = TRM([norm(Emb(t_i+1)); norm(h_i)] M^T), and what the model's head sees of it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        c, parts = model.config, sys.modules[type(model).__module__]
        family = type(model).__name__.removesuffix("ForCausalLM")
        norm = getattr(parts, f"{family}RMSNorm")
        norms = (norm(c.hidden_size, c.rms_norm_eps) for _ in range(3))
        self.enorm, self.hnorm, self.norm = norms
        self.eh_proj = torch.nn.Linear(2 * c.hidden_size, c.hidden_size, bias=False)
        last = c.num_hidden_layers - 1
        if "full_attention" in (getattr(c, "layer_types", None) or ()):
            last = c.layer_types.index("full_attention")
        self.layer = getattr(parts, f"{family}DecoderLayer")(c, last)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, float(parameter.dim() < 2), 0.2)
        for buffer in self.buffers():
            torch.nn.init.normal_(buffer, 0.0, 0.2)

    def forward(self, model: Any, h: Any, ids: Any) -> Any:
        """h [T, D] of tokens whose next ones are ids [T]."""
        x = self.enorm(model.model.embed_tokens(ids)), self.hnorm(h)
        x = self.eh_proj(torch.cat(x, -1))[None]
        positions = torch.arange(len(ids))[None]
        mask = torch.full((len(ids), len(ids)), -torch.inf).triu(1)[None, None]
        rope = model.model.rotary_emb(x, positions)
        x = self.layer(x, attention_mask=mask, position_ids=positions, position_embeddings=rope)
        return self.norm(x[0] if isinstance(x, tuple) else x)[0]

    def published(self, m: int) -> dict[str, np.ndarray]:
        """Its tensors as files hold them."""
        found = {}
        for name, tensor in self.state_dict().items():
            stem = name.removeprefix("layer.")
            values = tensor.numpy()
            if stem == "mlp.experts.gate_up_proj":
                for e, both in enumerate(values):
                    gate, up = np.split(both, 2)
                    found[f"mlp.experts.{e}.gate_proj.weight"] = gate.copy()
                    found[f"mlp.experts.{e}.up_proj.weight"] = up.copy()
            elif stem == "mlp.experts.down_proj":
                for e, down in enumerate(values):
                    found[f"mlp.experts.{e}.down_proj.weight"] = down.copy()
            else:
                found["shared_head.norm.weight" if name == "norm.weight" else stem] = values
        return {f"model.layers.{m}.{name}": values for name, values in found.items()}


@cache
def reference(case: str = "deepseek3") -> tuple[Any, list[Head]]:
    with pytest.MonkeyPatch.context() as patch:
        one = CASES[case]
        settings = one.settings | {"tie_word_embeddings": False, "num_nextn_predict_layers": HEADS}
        if "mlp_only_layers" in settings:  # a head's experts are those of the last layer
            settings["mlp_only_layers"] = []
        patch.setitem(CASES, case, replace(one, settings=settings))
        model = make_reference(case)
    return model, [Head(model) for _ in range(1 if case == "qwen3-next" else HEADS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("mtp"), "deepseek3")


def write(path: Path, case: str) -> Path:
    model, heads = reference(case)
    model.save_pretrained(path)
    file, layers = path / "model.safetensors", model.config.num_hidden_layers
    tensors = load_file(file)
    for m, head in enumerate(heads, layers):
        copies = ("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")
        if case == "qwen3-next":
            tensors |= {_of_qwen(name): t for name, t in head.published(m).items()}
            continue
        tensors |= head.published(m)
        tensors |= {
            f"model.layers.{m}.{name}.weight": tensors[f"{own}.weight"] for name, own in copies
        }
    save_file(tensors, file, {"format": "pt"})
    return path


QWEN = {
    "enorm": "pre_fc_norm_embedding",
    "hnorm": "pre_fc_norm_hidden",
    "eh_proj": "fc",
    "shared_head.norm": "norm",
}


def _of_qwen(name: str) -> str:
    stem = name.split(".", 3)[3]
    known = stem.removesuffix(".weight")
    return f"mtp.{QWEN[known]}.weight" if known in QWEN else f"mtp.layers.0.{stem}"


def load(folder: Path, ops: Ops, **options: Any) -> MTPDecoder:
    model = load_model(open_checkpoint(folder), ops, "f32", drafts=True, **options)
    assert isinstance(model, MTPDecoder)
    return model


def expected(ids: Sequence[int], case: str = "deepseek3") -> list[F32]:
    """Logits of the model and of each head: row i of head n is of token i + 1 + n."""
    model, heads = reference(case)
    tokens = torch.tensor(ids)
    with torch.no_grad():
        h = model.model(tokens[None]).last_hidden_state[0]
        logits = [model.lm_head(h)]
        for n, head in enumerate(heads, 1):
            h = head(model, h[:-1], tokens[n:])
            logits.append(model.lm_head(h))
    return [one.numpy() for one in logits]


def drafted(
    model: MTPDecoder, ops: Ops, sequences: Sequence[Sequence[int]], chunk: int
) -> list[list[F32]]:
    """Of each sequence what `expected` returns: all in one batch that advances `chunk` tokens a step,
    the heads following as far as tokens are known."""
    need = [-(-len(ids) // BLOCK_SIZE) for ids in sequences]
    order = np.random.default_rng(0).permutation(sum(need)).tolist()
    blocks = [[order.pop() for _ in range(n)] for n in need]
    kv = make_cache(model, ops, sum(need), "f32")
    nothing = np.empty((0, model.config.dim), np.float32)
    heads = len(model.heads)
    states = [[nothing for _ in sequences] for _ in range(heads + 1)]
    for start in range(0, max(map(len, sequences)), chunk):
        for n in range(heads + 1):
            spans = {
                i: Span(ids, max(start, n), min(start + chunk, len(ids)), blocks[i])
                for i, ids in enumerate(sequences)
                if max(start, n) < min(start + chunk, len(ids))
            }
            if not spans:
                break
            batch = make_batch([*spans.values()], len(model.kv_specs("f32")))
            if n == 0:
                h = model.hidden(batch, kv, all_tokens=True)
            else:
                before = [states[n - 1][i][s.start - n : s.stop - n] for i, s in spans.items()]
                h = model.draft(batch, np.concatenate(before), kv, n - 1)
            for i, piece in zip(spans, np.split(h, batch.query_start_loc[1:-1]), strict=True):
                states[n][i] = np.concatenate([states[n][i], piece])
    return [[model.logits(states[n][i]) for n in range(heads + 1)] for i in range(len(sequences))]


@pytest.mark.parametrize("case", ["deepseek3", "glm4-moe", "deepseek32", "glm-dsa", "qwen3-next"])
def test_parity_in_pieces(case: str, tmp_path: Path) -> None:
    write(tmp_path, case)
    for provider in ("ref", "cpu"):
        ops = load_provider(provider)
        model = load(tmp_path, ops)
        for chunk in (LENGTH, 33, 1):
            [found] = drafted(model, ops, [prompt()], chunk)
            for ours, theirs in zip(found, expected(prompt(), case), strict=True):
                assert_parity(ours, theirs)


@pytest.mark.parametrize("case", ["deepseek3", "deepseek32"])
def test_bits_do_not_depend_on_pieces_and_neighbours(case: str, tmp_path: Path) -> None:
    ops = load_provider("cpu", 2)
    model = load(write(tmp_path, case), ops)
    sequences = [prompt(seed, length) for seed, length in enumerate((LENGTH, 5, 33, 64))]
    alone = [drafted(model, ops, [ids], LENGTH)[0] for ids in sequences]
    for chunk in (1, 7, 32):
        for one, other in zip(drafted(model, ops, sequences, chunk), alone, strict=True):
            assert all(np.array_equal(*pair) for pair in zip(one, other, strict=True))


def test_the_model_is_the_same_with_heads_and_without(folder: Path) -> None:
    ops = load_provider("cpu")
    plain, model = load_model(open_checkpoint(folder), ops, "f32"), load(folder, ops)
    assert not isinstance(plain, MTPDecoder)
    logits = run_tokens(plain, ops, prompt(), 33)
    assert np.array_equal(run_tokens(model, ops, prompt(), 33), logits)
    [found] = drafted(model, ops, [prompt()], 33)
    assert np.array_equal(found[0], logits)
    [bare], [spec] = plain.kv_specs("f16"), model.kv_specs("f16")
    assert bare.layers == (0, 1, 2)
    assert spec.layers == (0, 1, 2, 3, 4)


def test_a_draft_in_a_loop_is_the_oracles(folder: Path) -> None:
    """One draft a step, as speculation would ask for it: the model's token, then the head's guess at
    the one after it."""
    ops = load_provider("cpu")
    model, start, steps = load(folder, ops), prompt(2, 40), 24
    blocks = [2, 0, 1]
    kv = make_cache(model, ops, len(blocks), "f32")
    ids, proposed = list(start), []
    done = 0
    for _ in range(steps):
        h = model.hidden(make_batch([Span(ids, done, len(ids), blocks)], 1), kv, all_tokens=True)
        ids.append(int(model.logits(h[-1:]).argmax()))
        batch = make_batch([Span(ids, done + 1, len(ids), blocks)], 1)
        batch = replace(batch, logit_rows=batch.query_start_loc[1:] - 1)
        guess = model.draft(batch, h, kv)
        proposed.append(int(model.logits(guess).argmax()))
        done = len(ids) - 1
    own, first_head, _ = expected(ids)
    assert ids[len(start) :] == own[len(start) - 1 : -1].argmax(-1).tolist()
    assert proposed == first_head[len(start) - 1 :].argmax(-1).tolist()


def test_what_is_saved_is_what_was_read(folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder)
    parts = load_parts(checkpoint, drafts=True)
    save_state(parts.weights, parts.rules, parts.config.num_layers, tmp_path, checkpoint.metadata)
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_packed_files_are_two(folder: Path, tmp_path: Path) -> None:
    ops, notes = load_provider("cpu"), []
    load_model(open_checkpoint(folder), ops, cache_dir=tmp_path)
    [plain] = (tmp_path / "packed").iterdir()
    load_model(open_checkpoint(folder), ops, cache_dir=tmp_path, drafts=True, log=notes.append)
    assert f"Mapped the packed weights {plain}." in notes
    assert len(list((tmp_path / "packed").iterdir())) == 2


def test_checkpoints_without_heads(folder: Path, tmp_path: Path) -> None:
    """Whatever config.json says."""
    reference()[0].save_pretrained(tmp_path)
    assert read_config(open_checkpoint(tmp_path)).mtp_layers == HEADS
    assert mtp_heads(open_checkpoint(tmp_path)) == 0
    with pytest.raises(ModelError, match="holds no heads that predict further tokens"):
        load_model(open_checkpoint(tmp_path), load_provider("cpu"), drafts=True)
    assert "2 MTP heads" in readable(describe_model(folder) | {"path": ""})
    assert "MTP" not in readable(describe_model(tmp_path) | {"path": ""})


def test_names_in_gguf_files(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    family, config = registry.find_family(checkpoint), read_config(checkpoint)
    assert family.mtp is not None
    rules = {rule.name: rule.gguf for rule in mtp_rules(config, family.rules, family.mtp)}
    parts = {"join": "EH_PROJ", "embed_norm": "ENORM", "hidden_norm": "HNORM"}
    for name, part in {**parts, "last_norm": "SHARED_HEAD_NORM"}.items():
        known = gguf.TENSOR_NAMES[getattr(gguf.MODEL_TENSOR, f"NEXTN_{part}")]
        assert rules[f"mtp.1.{name}"] == f"{known.format(bid=4)}.weight"
    assert rules["mtp.0.q_a"] == "blk.3.attn_q_a.weight"


def test_a_draft_can_be_recorded(folder: Path) -> None:
    """It calls ops alone, as a step of decode does."""
    ops = load_provider("cpu")
    model = load(folder, ops)
    kv = make_cache(model, ops, 4, "f32")
    spans = [Span(prompt(), 40, 41, [3, 1]), Span(prompt(1), 7, 8, [2])]
    batch = make_batch(spans, 1)
    before = np.random.default_rng(1).standard_normal((2, model.config.dim)).astype(np.float32)
    replay = ops.record(lambda: model.logits(model.draft(batch, before, kv)))
    assert np.array_equal(replay(), model.logits(model.draft(batch, before, kv)))


def test_pushed_weights_are_those_of_the_heads_too(folder: Path) -> None:
    ops = load_provider("cpu")
    model = load(folder, ops)
    arrays = load_file(folder / "model.safetensors")
    copies = ("embed_tokens", "shared_head.head")
    pushed = {
        k: v
        for k, v in arrays.items()
        if not k.startswith("model.layers.") or not any(name in k for name in copies)
    }
    again = reloaded(model, pushed, "f32").build(ops)
    assert isinstance(again, MTPDecoder)
    pairs = zip(
        drafted(model, ops, [prompt()], 33)[0], drafted(again, ops, [prompt()], 33)[0], strict=True
    )
    assert all(np.array_equal(*pair) for pair in pairs)
    without = {k: v for k, v in pushed.items() if "eh_proj" not in k}
    with pytest.raises(ModelError, match=r"missing are model\.layers\.3\.eh_proj\.weight"):
        reloaded(model, without, "f32")
