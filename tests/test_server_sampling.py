"""All that clients may say of sampling, by the official client over a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from elinvar.engine.bad_words import encode_after
from elinvar.engine.seeds import choice_seed
from serving import Serving, serving

HELLO: Any = [{"role": "user", "content": "Hello there"}]
PROMPT = "def add(a, b):"


@pytest.fixture(scope="module")
def tiny(tiny_gguf: Path) -> Iterator[Serving]:
    with serving(tiny_gguf, "tiny") as running:
        yield running


@pytest.fixture(scope="module")
def client(tiny: Serving) -> openai.OpenAI:
    return tiny.client()


def complete(client: openai.OpenAI, extra: dict[str, Any] | None = None, **fields: Any) -> Any:
    given = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "seed": 4} | fields
    return client.completions.create(**given, extra_body=extra)


def test_each_field_does_what_it_says(client: openai.OpenAI, tiny: Serving) -> None:
    (token,) = encode_after(tiny.core.tokenizer, "Z")
    ends = next(iter(tiny.core.tokenizer.eos_ids))
    always = {str(token): 100}

    def chat(extra: dict[str, Any] | None = None, **fields: Any) -> str:
        given = {"model": "tiny", "messages": HELLO, "max_tokens": 6, "seed": 4} | fields
        return client.chat.completions.create(**given, extra_body=extra).choices[0].message.content

    assert chat(logit_bias=always) == "Z" * 6
    assert set(chat(logit_bias=always, frequency_penalty=2.0, max_tokens=100)) != {"Z"}
    assert "Z" not in chat({"bad_words": ["Z"]}, logit_bias=always)
    words = [
        chat(extra, temperature=0, max_tokens=40) for extra in (None, {"repetition_penalty": 2})
    ]
    assert words[0] != words[1]
    assert chat(logit_bias={str(ends): 100}) == ""
    longer = chat({"min_tokens": 4}, logit_bias={str(ends): 100, str(token): 50})
    assert longer == "ZZZZ"
    assert chat({"typical_p": 0.2}, temperature=2.0) != chat(temperature=2.0)
    either = always | {str(encode_after(tiny.core.tokenizer, "Y")[0]): 100}
    words = [chat(logit_bias=either, temperature=0, presence_penalty=p) for p in (0, 2)]
    assert [len(set(word)) for word in words] == [1, 2]
    kept = {"include_stop_str_in_output": True}
    assert [chat(e, logit_bias=always, stop="ZZ") for e in (None, kept)] == ["", "ZZ"]
    shown = chat({"skip_special_tokens": False, "ignore_eos": True}, logit_bias={str(ends): 100})
    assert shown == tiny.core.tokenizer.token_text(ends) * 6


def test_best_of(client: openai.OpenAI) -> None:
    every = complete(client, n=5, logprobs=0, temperature=1.5)
    means = {
        one.text: sum(one.logprobs.token_logprobs) / len(one.logprobs.token_logprobs)
        for one in every.choices
    }
    best = complete(client, n=2, best_of=5, temperature=1.5)
    wanted = sorted(means, key=lambda text: -means[text])[:2]
    assert [one.text for one in best.choices] == wanted
    assert [one.index for one in best.choices] == [0, 1]
    assert best.choices[0].logprobs is None
    assert best.usage.completion_tokens == every.usage.completion_tokens == 60
    two = complete(client, prompt=[PROMPT, "x ="], best_of=3, temperature=1.5)
    assert len(two.choices) == 2


def test_echo(client: openai.OpenAI, tiny: Serving) -> None:
    plain = complete(client, n=2)
    echoed = complete(client, n=2, echo=True)
    assert [one.text for one in echoed.choices] == [PROMPT + one.text for one in plain.choices]
    ids = tiny.core.tokenizer.encode(PROMPT)
    by_ids = complete(client, prompt=ids, echo=True)
    assert by_ids.choices[0].text == tiny.core.tokenizer.decode(ids) + plain.choices[0].text
    streamed = complete(client, echo=True, stream=True)
    assert "".join(c.choices[0].text for c in streamed) == echoed.choices[0].text


def test_echo_with_log_probs_is_the_log_probs_of_the_whole(
    client: openai.OpenAI, tiny: Serving
) -> None:
    said = complete(client, logprobs=2, echo=True).choices[0]
    told = said.logprobs
    assert told.token_logprobs[0] is told.top_logprobs[0] is None
    assert len(told.tokens) == len(tiny.core.tokenizer.encode(PROMPT)) + 12
    assert all(value < 0 for value in told.token_logprobs[1:])
    assert told.text_offset == sorted(told.text_offset)
    # The tokenizer writes a space before the first word, which the prompt has not.
    for token, at in zip(told.tokens[2:], told.text_offset[2:], strict=True):
        assert said.text.startswith(token, at)
    ids = tiny.core.tokenizer.encode(PROMPT)
    answer = complete(client, logprobs=2).choices[0].logprobs
    assert told.token_logprobs[len(ids) :] == answer.token_logprobs
    chunks = list(complete(client, logprobs=2, echo=True, stream=True))
    parts = [c.choices[0].logprobs.token_logprobs for c in chunks if c.choices[0].logprobs]
    assert list(chain.from_iterable(parts)) == told.token_logprobs
    # All of it as a prompt, of which nothing is continued: what harnesses of evaluation ask for.
    scored = complete(client, prompt=PROMPT, logprobs=1, echo=True, max_tokens=0)
    assert scored.choices[0].text == PROMPT
    assert scored.choices[0].logprobs.token_logprobs == told.token_logprobs[: len(ids)]
    assert scored.usage.completion_tokens == 0


def test_prompt_logprobs(client: openai.OpenAI, tiny: Serving) -> None:
    ids = tiny.core.tokenizer.encode(PROMPT)
    both = complete(client, {"prompt_logprobs": 3}, logprobs=1, echo=True, n=2)
    for choice in both.choices:
        none, *told = choice.prompt_logprobs
        assert none is None and len(told) == len(ids) - 1
        for token, value, entry in zip(
            ids[1:], choice.logprobs.token_logprobs[1:], told, strict=False
        ):
            assert entry[str(token)]["logprob"] == value
            ranks = sorted(e["rank"] for e in entry.values() if e["rank"])
            assert ranks == [1, 2, 3]
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=2, extra_body={"prompt_logprobs": 0}
    )
    count = len(tiny.core.encode_chat(HELLO))
    assert len(answer.prompt_logprobs) == count  # type: ignore[attr-defined]


def test_a_model_without_the_tokens_has_no_suffix(client: openai.OpenAI, tiny: Serving) -> None:
    assert tiny.core.tokenizer.control_id("<|fim_prefix|>") is None
    with pytest.raises(openai.BadRequestError, match="fill in the middle") as info:
        complete(client, suffix="x")
    assert info.value.param == "suffix"
    assert complete(client, suffix="").choices


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"typical_p": 0}, "typical_p"),
        ({"repetition_penalty": -1}, "repetition_penalty"),
        ({"presence_penalty": -2.5}, "presence_penalty"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 200}}, "logit_bias"),
        ({"logit_bias": {"5": 1, "05": 1}}, "logit_bias"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"bad_words": [""]}, "bad_words"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 13}, "min_tokens"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 1000}, "best_of"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"suffix": "x", "prompt": [1, 2]}, "suffix"),
        ({"skip_special_tokens": "no"}, "skip_special_tokens"),
    ],
)
def test_refusals_name_the_field(tiny: Serving, fields: dict[str, Any], param: str) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12} | fields
    answer = httpx.post(f"{tiny.url}/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_the_first_of_n_answers_is_the_only_one(client: openai.OpenAI) -> None:
    """Their seeds follow from the request's, whatever else is asked for."""
    several = complete(client, {"repetition_penalty": 1.4, "typical_p": 0.8}, n=3)
    for k, choice in enumerate(several.choices):
        extra = {"repetition_penalty": 1.4, "typical_p": 0.8}
        alone = complete(client, extra, seed=choice_seed(4, k))
        assert alone.choices[0].text == choice.text


def test_beam_search(client: openai.OpenAI, tiny: Serving) -> None:
    ids = tiny.core.tokenizer.encode(PROMPT)
    extra = {"use_beam_search": True, "length_penalty": 0.5}
    said = complete(client, extra, n=3, logprobs=2, max_tokens=7)
    again = complete(client, extra, n=2, best_of=3, max_tokens=7, seed=9)
    assert [one.text for one in again.choices] == [one.text for one in said.choices][:2]
    totals = [sum(one.logprobs.token_logprobs) for one in said.choices]
    assert totals == sorted(totals, reverse=True)
    # What a beam says of its tokens is what they have as a prompt.
    best = said.choices[0].text
    whole = complete(client, prompt=PROMPT + best, echo=True, logprobs=2, max_tokens=0).choices[0]
    if tiny.core.tokenizer.encode(PROMPT + best)[: len(ids)] == ids:
        beam = said.choices[0].logprobs
        assert whole.logprobs.token_logprobs[len(ids) :][: len(beam.tokens)] == beam.token_logprobs
    assert said.usage.completion_tokens == 21
    two = complete(client, {"use_beam_search": True}, prompt=[PROMPT, "x ="], n=2, max_tokens=3)
    assert len({one.index for one in two.choices}) == 4
    alone = complete(client, {"use_beam_search": True}, prompt="x =", n=2, max_tokens=3)
    assert [one.text for one in two.choices[2:]] == [one.text for one in alone.choices]
    chat = client.chat.completions.create(
        model="tiny", messages=HELLO, n=2, max_tokens=4, extra_body={"use_beam_search": True}
    )
    assert [bool(one.message.content) for one in chat.choices] == [True, True]
    assert tiny.idle()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        *(({name: 0.5}, name) for name in ("temperature", "top_p", "presence_penalty")),
        ({"stop": "x"}, "stop"),
        ({"stream": True}, "stream"),
        ({"echo": True}, "echo"),
        ({"attention_budget": 64}, "attention_budget"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"n": 11}, "n"),
        ({"guided_regex": "a+"}, "use_beam_search"),
        ({"n": 2, "best_of": 11}, "best_of"),
        ({"length_penalty": 1000}, "length_penalty"),
        ({"use_beam_search": False, "length_penalty": 1.0}, "length_penalty"),
    ],
)
def test_what_beams_do_not_take(tiny: Serving, fields: dict[str, Any], param: str) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, "use_beam_search": True} | fields
    answer = httpx.post(f"{tiny.url}/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    plain = {"temperature": 0, "top_p": 1, "top_k": 0, "stream": False, "seed": 3}
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1, "use_beam_search": True} | plain
    assert httpx.post(f"{tiny.url}/v1/completions", json=body).status_code == 200
