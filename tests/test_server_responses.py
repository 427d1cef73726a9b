"""/v1/responses through the official client: answers, streams, conversations, what is stored."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest
from openai.types import batch_create_params
from openai.types.responses import Response, input_token_count_params, response_create_params

from elinvar.base.config import EngineConfig
from elinvar.server.batches import BatchRequest
from elinvar.server.responses_schema import InputTokensRequest, ResponseRequest
from elinvar.server.store import Store
from serving import Serving, eventually, serving

ASK: dict[str, Any] = {"model": "tiny", "input": "Hello", "max_output_tokens": 8}
FIXED: dict[str, Any] = {"seed": 7, "ignore_eos": True}
LONG: dict[str, Any] = ASK | {"max_output_tokens": 1500, "extra_body": FIXED}


@pytest.fixture(scope="module")
def tiny(tiny_gguf: Path) -> Iterator[Serving]:
    with serving(tiny_gguf, "tiny") as running:
        yield running
        assert eventually(running.idle)


@pytest.fixture(scope="module")
def client(tiny: Serving) -> openai.OpenAI:
    return tiny.client()


def refused(client: openai.OpenAI, **fields: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as info:
        client.responses.create(**(ASK | fields))
    return info.value


def chat_text(client: openai.OpenAI, messages: list[dict[str, Any]], **fields: Any) -> str:
    body = {"model": "tiny", "max_tokens": 8, "extra_body": FIXED} | fields
    answer = client.chat.completions.create(messages=messages, **body)
    return answer.choices[0].message.content or ""


def test_an_answer_is_the_chats(client: openai.OpenAI) -> None:
    """The same prompt, the same tokens, in other words."""
    answer = client.responses.create(**ASK, instructions="Be brief.", extra_body=FIXED)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert answer.output_text == chat_text(client, messages)
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    (item,) = answer.output
    assert item.type == "message" and item.status == "incomplete"
    assert answer.usage is not None and answer.usage.output_tokens == 8
    assert answer.usage.total_tokens == answer.usage.input_tokens + 8
    assert answer.model_extra == {"seed": 7, "store": True}
    assert answer.instructions == "Be brief." and answer.temperature == 1.0


def test_a_stream_makes_the_same_response(client: openai.OpenAI) -> None:
    whole = client.responses.create(**ASK, extra_body=FIXED)
    events = list(client.responses.create(**ASK, extra_body=FIXED, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    last = events[-1]
    assert last.type == "response.incomplete"
    assert "".join(deltas) == last.response.output_text == whole.output_text
    assert len(deltas) > 1
    ids = {getattr(event, "item_id", None) for event in events} - {None}
    assert ids == {last.response.output[0].id}
    with client.responses.stream(**ASK, extra_body=FIXED) as stream:
        final = [event for event in stream][-1]
    assert final.type == "response.incomplete" and final.response.output_text == whole.output_text


def test_log_probs(client: openai.OpenAI) -> None:
    include: Any = ["message.output_text.logprobs"]
    options = {"extra_body": FIXED, "include": include, "top_logprobs": 2}
    whole = client.responses.create(**ASK, **options)
    events = list(client.responses.create(**ASK, **options, stream=True))
    part = whole.output[0].content[0]  # type: ignore[union-attr, index]
    assert part.type == "output_text" and part.logprobs is not None
    assert len(part.logprobs) == 8 and len(part.logprobs[0].top_logprobs) == 2
    streamed: list[Any] = []
    for event in events:
        if event.type == "response.output_text.delta":
            streamed += event.logprobs
    assert [one.logprob for one in part.logprobs][: len(streamed)] == [
        one.logprob for one in streamed
    ]
    done = next(event for event in events if event.type == "response.output_text.done")
    assert len(done.logprobs) == 8


def test_a_conversation_goes_on(client: openai.OpenAI) -> None:
    first = client.responses.create(**ASK, instructions="Rhyme.", extra_body=FIXED)
    second = client.responses.create(
        **(ASK | {"input": "More"}), previous_response_id=first.id, extra_body=FIXED
    )
    assert second.previous_response_id == first.id
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "More"},
    ]
    assert second.output_text == chat_text(client, messages)
    by_hand = client.responses.create(
        **(ASK | {"input": [{"role": "user", "content": "Hello"}, *first.output, messages[2]]}),
        extra_body=FIXED,
    )
    assert by_hand.output_text == second.output_text
    reference = {"type": "item_reference", "id": first.output[0].id}
    referred = client.responses.create(
        **(ASK | {"input": [messages[0], reference, messages[2]]}), extra_body=FIXED
    )
    assert referred.output_text == second.output_text
    third = client.responses.create(
        **(ASK | {"input": "End"}), previous_response_id=second.id, extra_body=FIXED
    )
    items = client.responses.input_items.list(third.id, order="asc", limit=2)
    texts = [item.content[0].text for item in items]  # type: ignore[union-attr]
    assert texts == ["Hello", first.output_text, "More", second.output_text, "End"]
    newest = client.responses.input_items.list(third.id).data[0]
    assert newest.content[0].text == "End"  # type: ignore[union-attr]


def test_calls_are_kept(client: openai.OpenAI) -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'}
    result = {"type": "function_call_output", "call_id": "c1", "output": "42"}
    first = client.responses.create(**(ASK | {"input": [{"role": "user", "content": "Q"}, call]}))
    second = client.responses.create(**(ASK | {"input": [result]}), previous_response_id=first.id)
    kinds = [item.type for item in client.responses.input_items.list(second.id, order="asc")]
    assert kinds == ["message", "function_call", "message", "function_call_output"]
    error = refused(client, input=[result])
    assert error.status_code == 400 and "'c1'" in str(error)


def test_what_is_stored(client: openai.OpenAI, tiny: Serving) -> None:
    made = client.responses.create(**ASK, metadata={"a": "b"}, user="me", extra_body=FIXED)
    assert client.responses.retrieve(made.id) == made
    client.responses.delete(made.id)
    for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            call(made.id)
    error = refused(client, previous_response_id=made.id)
    assert error.status_code == 400 and error.param == "previous_response_id"
    private = client.responses.create(**ASK, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(private.id)
    streamed = list(client.responses.create(**ASK, stream=True))[-1]
    assert client.responses.retrieve(streamed.response.id) == streamed.response  # type: ignore[union-attr]


class Picked(pydantic.BaseModel):
    colour: Literal["red", "green"]
    sure: bool


def test_formats(client: openai.OpenAI) -> None:
    """parse() as it is used, whole and in a stream, and after another answer."""
    ask = ASK | {"max_output_tokens": 60, "extra_body": {"seed": 7}}
    whole = client.responses.parse(**ask, text_format=Picked)
    assert whole.output_parsed is not None and whole.output_parsed.colour in ("red", "green")
    assert whole.status == "completed" and whole.text is not None and whole.text.format is not None
    assert whole.text.format.type == "json_schema" and whole.text.format.name == "Picked"
    with client.responses.stream(**ask, text_format=Picked) as stream:
        assert stream.get_final_response().output_parsed == whole.output_parsed
    choices: Any = {"guided_choice": ["yes", "no"]}
    after = client.responses.create(
        **ASK, previous_response_id=whole.id, extra_body=choices | {"seed": 7}
    )
    assert after.output_text in ("yes", "no")


def test_input_tokens(client: openai.OpenAI) -> None:
    counted = client.responses.input_tokens.count(model="tiny", input="Hello", instructions="Hm")
    made = client.responses.create(**ASK, instructions="Hm")
    assert made.usage is not None and counted.input_tokens == made.usage.input_tokens


def test_the_background(client: openai.OpenAI) -> None:
    whole = client.responses.create(**ASK, extra_body=FIXED)
    queued = client.responses.create(**ASK, extra_body=FIXED, background=True)
    assert queued.status == "queued" and queued.background
    assert eventually(lambda: client.responses.retrieve(queued.id).status == "incomplete")
    assert client.responses.retrieve(queued.id).output_text == whole.output_text
    with client.responses.retrieve(queued.id, stream=True) as late:
        all_events = list(late)
    numbers = [event.sequence_number for event in all_events]
    assert numbers == list(range(len(numbers)))
    kinds = [event.type for event in all_events]
    assert kinds[:3] == ["response.created", "response.queued", "response.in_progress"]
    with client.responses.retrieve(queued.id, stream=True, starting_after=4) as later:
        assert list(later) == all_events[5:]
    with client.responses.create(**ASK, extra_body=FIXED, background=True, stream=True) as live:
        followed = list(live)
    assert [event.type for event in followed] == kinds
    assert followed[-1].response.output_text == whole.output_text  # type: ignore[union-attr]
    with pytest.raises(openai.BadRequestError):
        client.responses.retrieve(whole.id, stream=True)


def test_followers_of_a_run(client: openai.OpenAI) -> None:
    """One leaves, one comes in the middle; the run goes on."""
    stream = client.responses.create(**LONG, background=True, stream=True)
    events = iter(stream)
    first = next(events)
    assert first.type == "response.created"
    name = first.response.id
    seen = [next(events) for _ in range(20)]
    stream.close()
    assert client.responses.retrieve(name).status == "in_progress"
    with client.responses.retrieve(name, stream=True, starting_after=9) as other:
        again = [event for _, event in zip(range(11), other, strict=False)]
    assert again == seen[9:]
    cancelled = client.responses.cancel(name)
    assert cancelled.status == "cancelled" and cancelled.output_text
    assert client.responses.cancel(name) == cancelled == client.responses.retrieve(name)
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(client.responses.create(**ASK).id)


def test_deleting_what_runs(client: openai.OpenAI, tiny: Serving) -> None:
    name = client.responses.create(**LONG, background=True).id
    client.responses.delete(name)
    assert eventually(tiny.idle)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(name)


def test_the_beginning_of_a_long_conversation_goes(client: openai.OpenAI, tiny: Serving) -> None:
    context = tiny.core.max_context
    turns: list[Any] = [{"role": "system", "content": "Stay."}]
    for _ in range(20):
        turns += [
            {"role": "user", "content": "x " * (context // 16)},
            {"role": "assistant", "content": "y"},
        ]
    turns.append({"role": "user", "content": "Last"})
    assert refused(client, input=turns).code == "context_length_exceeded"
    cut = client.responses.create(**(ASK | {"input": turns}), truncation="auto")
    assert cut.usage is not None and context // 2 < cut.usage.input_tokens <= context - 8
    error = refused(client, input="x " * context * 2, truncation="auto")
    assert error.status_code == 400 and error.param == "input"


def test_each_tenant_sees_its_own(tiny_gguf: Path) -> None:
    from elinvar.base.limits import TenantLimits
    from elinvar.server.tenants import Tenants, hash_key

    limits = {"a": TenantLimits(), "b": TenantLimits()}
    keys = tuple((bytes.fromhex(hash_key(f"sk-{name}")), name) for name in limits)
    with serving(tiny_gguf, "tiny", tenants=Tenants(limits, keys)) as running:
        mine, other = (
            openai.OpenAI(base_url=f"{running.url}/v1", api_key=f"sk-{name}", max_retries=0)
            for name in limits
        )
        made = mine.responses.create(**ASK)
        runs = mine.responses.create(**LONG, background=True)
        for name in (made.id, runs.id):
            for call in (
                other.responses.retrieve,
                other.responses.delete,
                other.responses.cancel,
                other.responses.input_items.list,
            ):
                with pytest.raises(openai.NotFoundError):
                    call(name)
        with pytest.raises(openai.BadRequestError):
            other.responses.create(**ASK, previous_response_id=made.id)
        with pytest.raises(openai.NotFoundError):
            item: Any = {"type": "item_reference", "id": made.output[0].id}
            other.responses.create(**(ASK | {"input": [item]}))
        mine.responses.cancel(runs.id)


def test_restarts(tiny_gguf: Path, tmp_path: Path) -> None:
    """What was stored is there, and what ran in the background is run to the same end."""
    with serving(tiny_gguf, "tiny", state_dir=tmp_path / "state") as running:
        client = running.client()
        made = client.responses.create(**ASK)
        late = client.responses.create(
            **(LONG | {"max_output_tokens": 300}), background=True, previous_response_id=made.id
        )
        with client.responses.retrieve(late.id, stream=True) as stream:
            seen = [event for _, event in zip(range(12), stream, strict=False)]
    with serving(tiny_gguf, "tiny", state_dir=tmp_path / "state") as running:
        client = running.client()
        assert client.responses.retrieve(made.id) == made
        with client.responses.retrieve(late.id, stream=True) as stream:
            again = list(stream)
        assert again[4:12] == seen[4:]
        ended = client.responses.retrieve(late.id)
        assert ended.status == "incomplete" and ended.created_at == late.created_at
        follow = client.responses.create(**ASK, previous_response_id=ended.id)
        assert isinstance(follow, Response)


def test_a_server_without_its_model_ends_it(tiny_gguf: Path, tmp_path: Path) -> None:
    """Else it would seem to wait for something."""
    with serving(tiny_gguf, "tiny", state_dir=tmp_path) as running:
        name = running.client().responses.create(**LONG, background=True).id
    with serving(tiny_gguf, "another", state_dir=tmp_path) as running:
        responses = running.client().responses
        assert eventually(lambda: responses.retrieve(name).status == "failed")
        error = responses.retrieve(name).error
        assert error is not None and "tiny" in error.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {}, "strict": True, "async": True}]}, "tools[0].async"),
        ({"tools": [{"type": "function", "name": "f f", "parameters": {}, "strict": False}]}, "tools[0].name"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": 3}]}, "input[0].content"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "["}]}, "input[0].arguments"),
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "abc"}]}, "input[0].encrypted_content"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"background": True, "store": False}, "store"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "x"}}}}, "text.format.schema"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"temperature": -1}, "temperature"),
        ({"top_logprobs": 50}, "top_logprobs"),
        ({"metadata": {"k": "v" * 600}}, "metadata"),
        ({"service_tier": "ultrafast"}, "service_tier"),
        ({"stream_options": {"include_obfuscation": True}, "stream": True}, "stream_options.include_obfuscation"),
        ({"temprature": 1}, "temprature"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(tiny: Serving, fields: dict[str, Any], param: str) -> None:
    answer = tiny.post("/v1/responses", ASK | fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text


def test_a_full_disk_is_told(tiny: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what ran in the background waits until there is room."""
    client = tiny.client()
    later = client.responses.create(**(LONG | {"max_output_tokens": 100}), background=True)
    full = True
    really = Store._run

    def run(self: Store, task: Any) -> Any:
        if full:
            raise self.as_told(OSError(errno.ENOSPC, "full"))
        return really(self, task)

    monkeypatch.setattr(Store, "_run", run)
    answer = tiny.post("/v1/responses", ASK)
    assert answer.status_code == 507 and "disk is full" in answer.json()["error"]["message"]
    events = tiny.post("/v1/responses", ASK | {"stream": True}).text.strip().split("\n\n")
    assert json.loads(events[-1].split("data: ")[1])["response"]["error"]["code"] == "server_error"
    assert tiny.post("/v1/responses", ASK | {"store": False}).status_code == 200
    assert eventually(tiny.idle)
    assert client.responses.retrieve(later.id).status in ("queued", "in_progress")
    full = False
    assert eventually(lambda: client.responses.retrieve(later.id).status == "incomplete")


def test_every_parameter_of_the_official_client_is_known() -> None:
    """Each is either used or refused by name; none is 'unrecognized'."""
    for theirs, ours in (
        (response_create_params.ResponseCreateParamsBase, ResponseRequest),
        (input_token_count_params.InputTokenCountParams, InputTokensRequest),
        (batch_create_params.BatchCreateParams, BatchRequest),
    ):
        assert set(theirs.__annotations__) <= set(ours.__struct_fields__)


def test_unknown_queries(tiny: Serving) -> None:
    url = f"{tiny.url}/v1/responses/resp_none"
    for query in ("?stream=true&starting_after=x", "?include=nothing"):
        assert httpx.get(url + query).status_code == 400
    assert httpx.get(f"{url}/input_items?limit=0").status_code == 400


WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"enum": [1, 2]}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    "strict": True,
}


def test_tools(smollm2_gguf: Path) -> None:
    """Called by a real model, in a stream as well; what they said is stored and gone on with."""
    ask: dict[str, Any] = {"model": "small", "temperature": 0, "max_output_tokens": 60}
    with serving(smollm2_gguf, "small", EngineConfig(kv_memory=2**27)) as running:
        client = running.client()
        asked: dict[str, Any] = {"input": "How is the weather in Paris?", "tools": [WEATHER]}
        whole = client.responses.create(**ask, **asked, tool_choice="required")
        (call,) = whole.output
        assert call.type == "function_call" and call.name == "weather"
        assert json.loads(call.arguments).keys() == {"city", "days"}
        assert whole.status == "completed" and whole.tools[0].type == "function"
        named: Any = {"type": "function", "name": "weather"}
        with client.responses.stream(**ask, **asked, tool_choice=named) as stream:
            events = list(stream)
        deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
        (done,) = [e for e in events if e.type == "response.function_call_arguments.done"]
        assert "".join(deltas) == done.arguments == call.arguments
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny"}
        after = client.responses.create(
            **ask,
            input=[result],
            tools=[WEATHER],
            tool_choice="none",
            previous_response_id=whole.id,
        )
        assert after.output_text and after.usage is not None
        by_hand: Any = [{"role": "user", "content": asked["input"]}, call, result]
        same = client.responses.create(**ask, input=by_hand, tools=[WEATHER], tool_choice="none")
        assert same.output_text == after.output_text
