"""The official client against a real server over a real (tiny) model."""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from elinvar.base.sampling import SamplingParams
from elinvar.engine.seeds import choice_seed
from serving import Serving, eventually, serving

HELLO: Any = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def tiny(tiny_gguf: Path) -> Iterator[Serving]:
    with serving(tiny_gguf, "tiny") as running:
        yield running


@pytest.fixture(scope="module")
def client(tiny: Serving) -> openai.OpenAI:
    return tiny.client()


def test_models(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [(m.id, m.object, m.owned_by) for m in models] == [("tiny", "model", "elinvar")]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as info:
        client.models.retrieve("org/other")
    assert info.value.code == "model_not_found"


def test_chat(client: openai.OpenAI, tiny: Serving) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        max_completion_tokens=12,
        seed=7,
        user="u",
        metadata={"a": "b"},
    )
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.system_fingerprint == tiny.core.fingerprint
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.logprobs is None
    assert choice.finish_reason == "length"
    usage = answer.usage
    assert usage is not None
    assert usage.prompt_tokens == len(tiny.core.encode_chat(HELLO))
    assert usage.completion_tokens == 12
    assert usage.total_tokens == usage.prompt_tokens + 12
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 0


def test_chat_stream_equals_whole(client: openai.OpenAI) -> None:
    common: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 20, "seed": 3}
    whole = client.chat.completions.create(**common)
    chunks = list(
        client.chat.completions.create(
            **common, stream=True, stream_options={"include_usage": True}
        )
    )
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    assert len({c.id for c in chunks}) == 1
    first, *middle, last, usage = chunks
    assert first.choices[0].delta.role == "assistant"
    assert first.choices[0].delta.content == ""
    assert all(c.choices[0].finish_reason is None for c in (first, *middle))
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    text = "".join(c.choices[0].delta.content or "" for c in (*middle, last))
    assert text == whole.choices[0].message.content
    assert usage.choices == []
    assert all(c.usage is None for c in chunks[:-1])
    assert usage.usage is not None and whole.usage is not None
    assert usage.usage.completion_tokens == whole.usage.completion_tokens == 20


def test_stream_ends_with_done(tiny: Serving) -> None:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 3, "stream": True}
    response = tiny.post("/v1/chat/completions", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("\n\ndata: [DONE]\n\n")
    assert "usage" not in response.text


def test_completion_prompts(client: openai.OpenAI, tiny: Serving) -> None:
    texts = ["def main():", "The sea"]
    ids = [tiny.core.tokenizer.encode(text) for text in texts]
    common: Any = {"model": "tiny", "seed": 5, "max_tokens": 6}

    def answers(prompt: Any) -> list[str]:
        result = client.completions.create(prompt=prompt, **common)
        assert [c.index for c in result.choices] == list(range(len(result.choices)))
        return [c.text for c in result.choices]

    alone = [answers(text)[0] for text in texts]
    assert answers(texts) == answers(ids) == alone
    assert answers(ids[0]) == alone[:1]


def test_completion_defaults(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt="x", seed=1, extra_body={"ignore_eos": True}
    )
    assert answer.object == "text_completion"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


def test_completion_stream(client: openai.OpenAI) -> None:
    common: Any = {"model": "tiny", "prompt": ["a b", "c d"], "seed": 9, "max_tokens": 9, "n": 2}
    whole = client.completions.create(**common)
    texts = ["", "", "", ""]
    reasons: list[Any] = [None] * 4
    for chunk in client.completions.create(**common, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [c.text for c in whole.choices]
    assert reasons == [c.finish_reason for c in whole.choices]


def test_n_and_seeds(client: openai.OpenAI) -> None:
    common: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 8}
    many = client.chat.completions.create(**common, n=3, seed=11)
    texts = [c.message.content for c in many.choices]
    assert len(set(texts)) == 3
    for k, choice in enumerate(many.choices):
        seed = choice_seed(11, k)
        assert choice.model_extra == {"seed": seed}
        alone = client.chat.completions.create(**common, seed=seed)
        assert alone.choices[0].message.content == texts[k]
    assert many.usage is not None
    assert many.usage.completion_tokens == 24


def test_n_streams_interleave(client: openai.OpenAI) -> None:
    order: list[int] = []
    for chunk in client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=12, n=2, seed=2, stream=True
    ):
        order += [c.index for c in chunk.choices if c.delta.content]
    assert set(order) == {0, 1}
    assert sorted(order) != order


def test_drawn_seed_repeats(client: openai.OpenAI) -> None:
    common: Any = {"model": "tiny", "prompt": "once", "max_tokens": 8}
    first = client.completions.create(**common).choices[0]
    second = client.completions.create(**common).choices[0]
    assert first.model_extra is not None and first.model_extra != second.model_extra
    again = client.completions.create(**common, seed=first.model_extra["seed"]).choices[0]
    assert again.text == first.text


def test_stop(client: openai.OpenAI) -> None:
    common: Any = {"model": "tiny", "prompt": "The quick", "max_tokens": 24, "temperature": 0}
    text = client.completions.create(**common).choices[0].text
    stop = text[10:13]
    for given in (stop, ["never", stop]):
        choice = client.completions.create(**common, stop=given).choices[0]
        assert choice.text == text[: text.index(stop)]
        assert choice.finish_reason == "stop"
    streamed = client.completions.create(**common, stop=stop, stream=True)
    assert "".join(c.choices[0].text for c in streamed) == text[: text.index(stop)]


def test_chat_logprobs(client: openai.OpenAI) -> None:
    common: Any = {
        "model": "tiny",
        "messages": HELLO,
        "max_tokens": 10,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 3,
    }
    choice = client.chat.completions.create(**common).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    entries = choice.logprobs.content
    assert len(entries) == 10
    raw = bytes(byte for entry in entries for byte in entry.bytes or [])
    assert raw.decode("utf-8", "replace") == choice.message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob <= 0
        # Greedy: what was sampled is the likeliest.
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == entry.logprob
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1
    streamed: list[Any] = []
    for chunk in client.chat.completions.create(**common, stream=True):
        logprobs = chunk.choices[0].logprobs
        streamed += (logprobs.content or []) if logprobs else []
    assert streamed == entries


def test_completion_logprobs(client: openai.OpenAI) -> None:
    common: Any = {"model": "tiny", "prompt": "Größe", "max_tokens": 10, "seed": 4, "logprobs": 2}
    choice = client.completions.create(**common).choices[0]
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None and logprobs.text_offset is not None
    assert logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
    assert [len(x) for x in (logprobs.tokens, logprobs.text_offset)] == [10, 10]
    assert all(len(top) == 2 for top in logprobs.top_logprobs)
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        if not token.startswith("bytes:"):
            assert choice.text[offset:].startswith(token)
    zero = client.completions.create(**(common | {"logprobs": 0})).choices[0]
    assert zero.logprobs is not None
    assert zero.logprobs.token_logprobs == logprobs.token_logprobs
    assert zero.logprobs.top_logprobs == [{}] * 10


def test_extensions(client: openai.OpenAI) -> None:
    common: Any = {"model": "tiny", "prompt": "x y z", "max_tokens": 8}
    greedy = client.completions.create(**common, temperature=0).choices[0].text
    for extra in ({"top_k": 1}, {"min_p": 1.0}):
        assert client.completions.create(**common, extra_body=extra).choices[0].text == greedy


def test_windows_and_budgets_are_fields_of_both_endpoints(client: openai.OpenAI) -> None:
    long = "some words " * 100
    common: Any = {"model": "tiny", "max_tokens": 5, "temperature": 0}
    found = set()
    for fields in (
        {},
        {"attention_window": 32},
        {"attention_window": 32, "attention_sinks": 40},
        {"attention_budget": 64},
    ):
        messages: Any = [{"role": "user", "content": long}]
        chat = client.chat.completions.create(
            messages=messages, **common, logprobs=True, extra_body=fields
        )
        plain = client.completions.create(prompt=long, **common, logprobs=0, extra_body=fields)
        found |= {str(chat.choices[0].logprobs), str(plain.choices[0].logprobs)}
    assert len(found) == 8
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="tiny", prompt="x", extra_body={"attention_window": -1})
    body: Any = error.value.body
    assert body["param"] == "attention_window"


def test_cached_tokens(client: openai.OpenAI) -> None:
    prompt = "~ a long shared beginning " * 40
    counts = []
    for _ in range(2):
        usage = client.completions.create(model="tiny", prompt=prompt, max_tokens=2).usage
        assert usage is not None and usage.prompt_tokens_details is not None
        counts.append(usage.prompt_tokens_details.cached_tokens)
    assert counts[0] is not None and counts[0] < 8, "a token or two begin many prompts"
    assert usage is not None and counts[1] == usage.prompt_tokens - 1


def test_chat_goes_on_until_the_context_ends(client: openai.OpenAI, tiny: Serving) -> None:
    words = "word " * (tiny.core.max_context - 60)
    ids = tiny.core.tokenizer.encode(words)[: tiny.core.max_context - 20]
    content = tiny.core.tokenizer.decode(ids[1:])
    messages: Any = [{"role": "user", "content": content}]
    answer = client.chat.completions.create(
        model="tiny", messages=messages, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens == tiny.core.max_context
    assert answer.choices[0].finish_reason == "length"


def test_async_client(tiny: Serving) -> None:
    async def run() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{tiny.url}/v1", api_key="unused") as client:
            common: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 8, "seed": 1}
            whole = await client.chat.completions.create(**common)
            text = ""
            async for chunk in await client.chat.completions.create(**common, stream=True):
                text += chunk.choices[0].delta.content or ""
            return text, whole.choices[0].message.content or ""

    text, whole = asyncio.run(run())
    assert text == whole != ""


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 3}, "top_p"),
        ({"n": 0}, "n"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"messages": []}, "messages"),
        ({"extra_body": {"tmperature": 1}}, "tmperature"),
    ],
)
def test_bad_requests(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as info:
        client.chat.completions.create(**({"model": "tiny", "messages": HELLO} | fields))
    assert (info.value.param, info.value.type) == (param, "invalid_request_error")


def test_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as info:
        client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert (info.value.code, info.value.param) == ("model_not_found", "model")


def test_too_long(client: openai.OpenAI, tiny: Serving) -> None:
    context = str(tiny.core.max_context)
    long: Any = [{"role": "user", "content": "word " * 4000}]
    with pytest.raises(openai.BadRequestError, match=context) as info:
        client.chat.completions.create(model="tiny", messages=long)
    assert (info.value.code, info.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError, match=context) as info:
        client.completions.create(model="tiny", prompt="hi", max_tokens=100_000)
    assert (info.value.code, info.value.param) == ("context_length_exceeded", "prompt")


def test_no_chat_template(client: openai.OpenAI, tiny: Serving) -> None:
    tokenizer = tiny.core.tokenizer
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            client.chat.completions.create(model="tiny", messages=HELLO)
    finally:
        tokenizer.chat_template = template


def test_template_that_refuses(client: openai.OpenAI, tiny: Serving) -> None:
    tokenizer = tiny.core.tokenizer
    template = tokenizer.chat_template
    tokenizer.use_chat_template("{{ raise_exception('roles must alternate') }}")
    try:
        with pytest.raises(openai.BadRequestError, match="roles must alternate") as info:
            client.chat.completions.create(model="tiny", messages=HELLO)
        assert info.value.param == "messages"
    finally:
        tokenizer.chat_template = template


def test_what_the_template_reads_can_be_given(client: openai.OpenAI, tiny: Serving) -> None:
    tokenizer = tiny.core.tokenizer
    template = tokenizer.chat_template
    tokenizer.use_chat_template(
        "{{ messages[0].content }}{{ ' and think' * (enable_thinking | default(1)) }}"
        "{{ reasoning_effort }}"
    )
    create = functools.partial(
        client.chat.completions.create, model="tiny", messages=HELLO, max_tokens=1
    )

    def prompt_tokens(**fields: Any) -> int:
        usage = create(**fields).usage
        assert usage is not None
        return usage.prompt_tokens

    try:
        usual = prompt_tokens()
        off: Any = {"chat_template_kwargs": {"enable_thinking": False}}
        assert prompt_tokens(extra_body=off) < usual
        assert prompt_tokens(reasoning_effort="high") > usual
        assert prompt_tokens(reasoning_effort="none") < prompt_tokens(reasoning_effort="high")
        off["chat_template_kwargs"] = {"enable_thinkin": False}
        with pytest.raises(openai.BadRequestError, match="takes no 'enable_thinkin'") as info:
            create(extra_body=off)
        assert info.value.param == "chat_template_kwargs"
    finally:
        tokenizer.chat_template = template
    with pytest.raises(openai.BadRequestError, match="takes no reasoning_effort") as info:
        create(reasoning_effort="high")
    assert info.value.param == "reasoning_effort"


async def _stream_all(url: str, bodies: list[dict[str, Any]]) -> list[str]:
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="unused", timeout=120, max_retries=0
    ) as client:

        async def one(body: Any) -> str:
            stream = await client.completions.create(**body, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        return await asyncio.gather(*(one(body) for body in bodies))


def _twins(running: Serving, name: str, max_tokens: int) -> None:
    """200 streams at once; then each of them alone."""
    bodies: list[dict[str, Any]] = [
        {
            "model": name,
            "prompt": f"Question {i}: what is {i} times {i % 7}?",
            "seed": i,
            "max_tokens": max_tokens,
            "temperature": (i % 3) / 2,
        }
        for i in range(200)
    ]
    together = asyncio.run(_stream_all(running.url, bodies))
    client = running.client()
    for body, text in zip(bodies, together, strict=True):
        assert client.completions.create(**body).choices[0].text == text
    assert len(set(together)) > 40
    assert eventually(running.idle)


def test_200_streams_equal_their_sequential_twins(tiny: Serving) -> None:
    _twins(tiny, "tiny", 16)


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Iterator[Serving]:
    with serving(smollm2_gguf, "smollm2") as running:
        yield running


def test_200_streams_of_smollm2_equal_their_sequential_twins(smollm2: Serving) -> None:
    _twins(smollm2, "smollm2", 16)


def test_smollm2_answers(smollm2: Serving) -> None:
    answer = smollm2.client().completions.create(
        model="smollm2", prompt="The capital of France is", max_tokens=1, temperature=0
    )
    assert answer.choices[0].text == " Paris"


def test_end_token(smollm2: Serving) -> None:
    """It counts, but has neither text nor log-probs."""
    answer = smollm2.client().chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "Hi"}],
        n=8,
        seed=1,
        max_tokens=40,
        logprobs=True,
    )
    num_tokens = 0
    for choice in answer.choices:
        assert choice.logprobs is not None and choice.logprobs.content is not None
        raw = [byte for entry in choice.logprobs.content for byte in entry.bytes or []]
        assert bytes(raw).decode() == choice.message.content
        num_tokens += len(choice.logprobs.content) + (choice.finish_reason == "stop")
    assert {"stop"} <= {choice.finish_reason for choice in answer.choices}
    assert answer.usage is not None
    assert answer.usage.completion_tokens == num_tokens


def test_params_are_openai_defaults(tiny: Serving) -> None:
    """A request without parameters samples as SamplingParams() does."""
    client = tiny.client()
    seen = client.completions.create(model="tiny", prompt="abc", seed=6, max_tokens=9)
    ids = tiny.core.tokenizer.encode("abc")
    params = SamplingParams(max_tokens=9, temperature=1.0, top_p=1.0, seed=6)
    with_params = client.completions.create(
        model="tiny",
        prompt=ids,
        max_tokens=9,
        seed=6,
        temperature=params.temperature,
        top_p=params.top_p,
    )
    assert seen.choices[0].text == with_params.choices[0].text
