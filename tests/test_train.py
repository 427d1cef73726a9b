"""Training heads: from prompts to a folder that drafts, stopped and gone on with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elinvar.base.errors import EngineError
from elinvar.base.plan import StepPlan
from elinvar.base.sampling import SamplingParams
from elinvar.models import llama
from elinvar.models.eagle import load_eagle
from elinvar.models.load import is_mtp
from elinvar.models.mtp import NEXTN, mtp_rules
from elinvar.nn.decoder import Decoder
from elinvar.nn.mtp import MTPDecoder
from elinvar.run.ahead import Begun
from elinvar.run.drafters.heads import HeadsDrafter
from elinvar.run.replay import Recorded, Replay
from elinvar.weights.checkpoint import open_checkpoint
from elinvar.weights.load import load_weights
from engines import provider, tiny_engine, tiny_model, tiny_weights
from helpers import Span, make_batch, make_cache

torch = pytest.importorskip("torch")

from elinvar.train.answers import record_answers, seeded, write_features  # noqa: E402
from elinvar.train.eagle import Eagle  # noqa: E402
from elinvar.train.fit import Settings, fit, make_target, publish  # noqa: E402
from elinvar.train.head import later  # noqa: E402
from elinvar.train.mtp import MTP  # noqa: E402

TAPS = [0, 1, 1]
SETTINGS = Settings(epochs=3, rate=3e-3, depth=2, num_tokens=48)


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, 5 + i % 9).tolist() for i in range(count)]


def go_on(done: int, total: int) -> bool:
    return True


def answers(
    work: Path, count: int = 40, progress: Callable[[int, int], bool] = go_on
) -> list[Recorded]:
    engine, asked = tiny_engine(kind="f32", speculation="off"), prompts(count)
    params = seeded(SamplingParams(max_tokens=24), count)
    return record_answers(engine, asked, params, work, progress)


def begun(target: Any) -> Eagle:
    torch.manual_seed(0)
    return Eagle(target, TAPS)


def target_model() -> Decoder:
    model = tiny_model(provider(), kind="f32")
    assert isinstance(model, Decoder)
    return model


def prepared(work: Path) -> tuple[Any, list[Path], list[Recorded], Decoder]:
    found, model = answers(work), target_model()
    model.taps = TAPS
    shards = write_features(Replay(model, provider(), 64), found, work, go_on)
    return make_target(model, provider(), found, 48), shards, found, model


def test_answers_go_on_where_they_were_stopped(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = answers(tmp_path / "whole", 12)
    some = answers(tmp_path, 12, lambda done, total: done < 5)
    assert 5 <= len(some) < 12
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"prompt": 3, "id')  # the machine went down
    assert answers(tmp_path, 12) == whole


def test_a_step_that_fails_is_no_answer(tmp_path: Path) -> None:
    engine = tiny_engine(kind="f32", speculation="off")

    def fail(plan: StepPlan) -> Begun:
        raise RuntimeError("of this step")

    engine.runner.begin = fail  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="of this step"):
        record_answers(engine, prompts(3), seeded(SamplingParams(), 3), tmp_path, go_on)
    assert not (tmp_path / "answers.jsonl").read_text()


def test_features_are_the_states_of_answers(tmp_path: Path) -> None:
    _, shards, found, model = prepared(tmp_path)
    assert len(shards) == 2
    with np.load(shards[1]) as arrays:
        assert arrays["lengths"].tolist() == [len(one.token_ids) for one in found[32:]]
        ids = arrays["ids"][: arrays["lengths"][0]]
        assert ids.tolist() == list(found[32].token_ids)
        batch = make_batch([Span(ids.tolist(), 0, len(ids), [1, 0])], 1)
        states = model.hidden(batch, make_cache(model, provider(), 2, "f16"), all_tokens=True)
        assert np.array_equal(arrays["states"][: len(ids)], states.astype(np.float16))


def test_a_head_is_trained_published_and_read(tmp_path: Path) -> None:
    """It learns; what is read of its folder computes what was trained; and it drafts."""
    target, shards, found, model = prepared(tmp_path)
    losses: list[float] = []

    def told(done: int, total: int, loss: float, right: list[float]) -> bool:
        losses.append(loss)
        return True

    head = begun(target)
    assert fit(head, target, shards, tmp_path, SETTINGS, told)
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    head.to(torch.bfloat16).float()
    publish(head, target, tmp_path)
    ids = list(found[0].token_ids)
    batch = make_batch([Span(ids, 0, len(ids), [0, 1])], 1)
    model.taps = ()
    loaded = load_eagle(open_checkpoint(tmp_path), model, provider(), "f32")
    kv = make_cache(model, provider(), 2, "f32")
    hidden = model.hidden(batch, kv, all_tokens=True)
    later = make_batch([Span(ids, 1, len(ids), [0, 1])], 1)
    ours = loaded.draft_logits(loaded.draft(later, loaded.features(hidden)[:-1], kv))
    with torch.no_grad():
        taps = torch.tensor(hidden[None, :-1, model.config.dim :])
        embedded = target.embed[torch.tensor(ids[1:])][None]
        states = head.midlayer(embedded, head.fc(taps), [])
        theirs = head.lm_head(head.norm(states))[0].numpy()
    np.testing.assert_allclose(ours[:, target.tokens.numpy()], theirs, rtol=1e-3, atol=1e-3)
    worth = Replay(model, provider(), 64).measure(
        lambda rows, kv: HeadsDrafter("eagle", loaded, provider(), kv, rows), found[:4], 2, 50
    )
    assert worth.num_asked[0] > 20


def test_what_is_learned_for_later_drafts_is_what_they_see(tmp_path: Path) -> None:
    """The second and third pass over all tokens at once give what chains of drafts give one by one."""
    target, _, found, _ = prepared(tmp_path)
    head = begun(target)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, float(parameter.dim() < 2), 0.2)
    ids = torch.tensor(found[0].token_ids[:12])
    taps = torch.randn(11, 3 * target.config.dim)
    with torch.no_grad():
        embedded, x, past = target.embed[ids[1:]][None], head.fc(taps)[None], []
        passes = []
        for _ in range(3):
            x = head.midlayer(embedded, x, past)
            passes.append(x[0])
            x = later(x, 1)
        for root in range(9):
            seen = head.fc(taps[: root + 1])[None]
            for depth in range(3):
                chain = head.midlayer(embedded[:, : root + depth + 1], seen, [])
                found_D, expected_D = passes[depth][root + depth], chain[0, -1]
                torch.testing.assert_close(found_D, expected_D, rtol=1e-3, atol=1e-4)
                seen = torch.cat((seen, chain[:, -1:]), 1)


def test_training_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    target, shards, _, _ = prepared(tmp_path)
    (tmp_path / "other").mkdir()
    chosen = replace(SETTINGS, epochs=2)
    whole, again = begun(target), begun(target)
    assert fit(whole, target, shards, tmp_path / "other", chosen, lambda *told: True)
    assert not fit(begun(target), target, shards, tmp_path, chosen, lambda at, *told: at != 7)
    assert fit(again, target, shards, tmp_path, chosen, lambda *told: True)
    for ours, theirs in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_mtp_head_is_the_one_that_was_trained(tmp_path: Path) -> None:
    target, shards, found, model = prepared(tmp_path)
    head = MTP(target)
    assert fit(head, target, shards, tmp_path, replace(SETTINGS, epochs=1), lambda *told: True)
    head.to(torch.bfloat16).float()
    publish(head, target, tmp_path)
    checkpoint, config = open_checkpoint(tmp_path), replace(model.config, mtp_layers=1)
    assert is_mtp(checkpoint)
    rules = mtp_rules(config, llama.rules, NEXTN)
    weights = load_weights(checkpoint, rules, config, "f32")
    both = llama.build(config, tiny_weights("llama", "f32") | weights, provider())
    assert isinstance(both, MTPDecoder)
    ids = list(found[0].token_ids)
    kv = make_cache(both, provider(), 2, "f32")
    hidden = both.hidden(make_batch([Span(ids, 0, len(ids), [0, 1])], 1), kv, all_tokens=True)
    later_batch = make_batch([Span(ids, 1, len(ids), [0, 1])], 1)
    with torch.no_grad():
        embedded = target.embed[torch.tensor(ids[1:])][None]
        states, _ = head.onward(target, embedded, head.first(torch.tensor(hidden[None, :-1])), [])
    ours = both.draft(later_batch, hidden[:-1], kv)
    np.testing.assert_allclose(ours, states[0].numpy(), rtol=1e-3, atol=1e-3)
