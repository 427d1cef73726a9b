"""The console: how its files are served, and what it does in a browser. Its pictures are kept in
.cache/screenshots."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import openai
import pytest

from browsers import chromium, faint, nameless, shoot, too_wide, until
from elinvar.base.config import EngineConfig
from elinvar.base.limits import TenantLimits
from elinvar.server.tenants import Tenants, hash_key
from serving import Serving, eventually, serving

NAME = "smollm2-135m"
WAIT_MS = 120_000
"""However slow the machine is."""
DESK, PHONE = {"width": 1360, "height": 860}, {"width": 390, "height": 844}
LONG = {"model": NAME, "prompt": "Once upon a time", "max_tokens": 4000}
HOSTILE = """# <img src=x onerror=alert(1)>
<script>alert(1)</script> [a](javascript:alert(1)) [b](data:text/html,x) ![c](https://there/x.png)
[d](https://there/ok) **bold *both*** `<b>` https://bare.example/x.
- one
  - two <iframe src=x>
1. three

| a | b |
|---|---|
| 1 | <u>2</u> |

```html
<b onclick=alert(1)>code</b>
```
"""


@pytest.fixture(scope="module")
def server(smollm2_gguf: Path) -> Iterator[Serving]:
    config = EngineConfig(kv_memory=256 * 2**20, num_threads=2)
    with serving(smollm2_gguf, NAME, config) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


Opener = Callable[..., Any]


@pytest.fixture
def opened(browser: Any) -> Iterator[Opener]:
    """opened(url, viewport, dark): a page of its own. It must not complain on its console."""
    contexts, complaints = [], []

    def complain(text: str) -> None:
        if not re.search("status of (401|429)", text):  # which tests ask for
            complaints.append(text)

    def open_page(url: str, viewport: dict[str, int] = DESK, dark: bool = False) -> Any:
        scheme = "dark" if dark else "light"
        context = browser.new_context(
            viewport=viewport, color_scheme=scheme, reduced_motion="reduce"
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("pageerror", lambda error: complain(str(error)))
        page.on("console", lambda one: one.type in ("error", "warning") and complain(one.text))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def send(page: Any, text: str, **settings: object) -> None:
    until(page, "document.querySelector('[name=model]')?.value")
    for name, value in settings.items():
        page.fill(f".settings [name={name}]", str(value))
    page.fill("[name=message]", text)
    page.press("[name=message]", "Enter")


def ended(page: Any, answers: int = 1) -> Any:
    """The last answer, once so many have ended."""
    until(page, f"document.querySelectorAll('.message.assistant footer').length === {answers}")
    return page.locator(".message.assistant").last


# ---- files


def test_files_are_served_under_a_strict_policy(tiny_gguf: Path) -> None:
    with serving(tiny_gguf, "tiny") as tiny:
        page = httpx.get(tiny.url + "/")
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert page.headers["x-content-type-options"] == "nosniff"
        tag = {"if-none-match": page.headers["etag"]}
        assert httpx.get(tiny.url + "/", headers=tag).status_code == 304
        for one in files("elinvar.server").joinpath("console").iterdir():
            found = httpx.get(f"{tiny.url}/console/{one.name}")
            assert (
                found.content == one.read_bytes() and found.headers["cache-control"] == "no-cache"
            )
        for name in ("nothing.js", "..%2fapp.py", "%2e%2e/app.py"):
            assert httpx.get(f"{tiny.url}/console/{name}").status_code == 404
    with serving(tiny_gguf, "tiny", console=False) as tiny:
        assert httpx.get(tiny.url + "/").status_code == 404
        assert httpx.get(tiny.url + "/console/app.js").status_code == 404


def test_nothing_comes_from_elsewhere_and_nothing_is_read_as_html() -> None:
    for one in files("elinvar.server").joinpath("console").iterdir():
        text = one.read_text("utf-8")
        addresses = set(re.findall(r"https?://[\w.]+", text)) - {"http://www.w3.org"}
        assert not addresses, one.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|eval\(|document\.write", text)
        if one.name.endswith(".html"):
            assert not re.search(r"<script(?![^>]*src=)|\son\w+=|style=", text)


# ---- chat


def test_send_stream_stop(server: Serving, opened: Opener) -> None:
    page = opened(server.url)
    # A seed whose answer is 4,000 tokens long; some end after 25, before anyone stops them.
    send(page, "Tell me a very long story.", max_tokens=4000, seed=1)
    text = page.locator(".message.assistant .text")
    until(page, "document.querySelector('.message.assistant .text')?.innerText.length > 40")
    before = text.inner_text()
    until(
        page,
        "(n) => document.querySelector('.message.assistant .text').innerText.length > n",
        len(before),
    )
    shoot(page, "chat-streaming")
    page.keyboard.press("Escape")
    assert "stopped by you" in ended(page).inner_text()
    assert eventually(server.idle)
    # It is kept: the page may be opened anew.
    shown = text.inner_text()
    page.reload()
    assert page.locator(".message.assistant .text").inner_text() == shown
    assert page.locator(".conversations .open").inner_text() == "Tell me a very long story."


def test_tokens_and_the_same_again(server: Serving, opened: Opener) -> None:
    page = opened(server.url)
    send(page, "Name three colours.", max_tokens=24, seed=11, temperature=0.7)
    answer = ended(page)
    assert "seed 11" in answer.inner_text() and "perplexity" in answer.inner_text()
    answer.get_by_label("Tokens").click()
    tokens = answer.locator(".token-text .token")
    assert 1 < tokens.count() <= 24
    tokens.nth(1).hover()
    card = page.locator(".token-card")
    assert card.locator("li").count() >= 5 and "%" in card.inner_text()
    assert card.locator(".mine").count() == 1
    shoot(page, "tokens")
    tokens.nth(0).focus()
    first = card.inner_text()
    page.keyboard.press("ArrowRight")
    assert card.inner_text() != first and card.is_visible()
    answer.get_by_text("Same again").click()
    page.wait_for_selector(".same:has-text('equal')")
    assert f"all {tokens.count()} tokens and their log-probs are equal" in answer.inner_text()


def test_edit_regenerate_and_a_new_conversation(server: Serving, opened: Opener) -> None:
    page = opened(server.url)
    send(page, "Hello", max_tokens=8, seed=3)
    first = ended(page).locator(".text").inner_text()
    page.locator(".message.assistant").get_by_label("Regenerate").click()
    page.wait_for_selector(".writing", state="detached")
    assert ended(page).locator(".text").inner_text() == first  # the same seed
    page.locator(".message.user").hover()
    page.locator(".message.user").get_by_label("Edit").click()
    page.fill(".editor textarea", "What is a spring?")
    page.get_by_text("Send again").click()
    page.wait_for_selector(".message.user:has-text('What is a spring?')")
    page.wait_for_selector(".writing", state="detached")
    assert ended(page).locator(".text").inner_text() != first
    page.get_by_role("button", name="New conversation").first.click()
    assert page.locator(".message").count() == 0 and page.locator(".welcome").is_visible()
    page.locator(".conversations .open", has_text="spring").click()
    assert page.locator(".message").count() == 2


def test_settings_say_what_is_wrong(server: Serving, opened: Opener) -> None:
    page = opened(server.url)
    note = page.locator(".composer-note")
    page.fill("[name=temperature]", "3")
    assert "Temperature: From 0 to 2." in note.inner_text() and page.locator(".go").is_disabled()
    page.fill("[name=temperature]", "")
    page.get_by_text("Tools", exact=True).click()
    for text, told in (
        ("[{", "Not JSON"),
        ("{}", "Tools are a list"),
        ('[{"name": "a b"}]', "function.name must be"),
        ('[{"name": "a", "parameters": {"type": "text"}}]', "there is no type"),
    ):
        page.fill("[name=tools]", text)
        assert told in note.inner_text(), told
        assert page.locator("[name=tools]").get_attribute("aria-invalid") == "true"
    page.get_by_text("Insert an example").first.click()
    assert note.inner_text() == "" and "1 tool." in page.locator(".settings").inner_text()
    page.fill("[name=tools]", "")
    page.get_by_text("Answer format").click()
    page.select_option("[name=format]", "json_schema")
    assert "Give a schema" in note.inner_text()
    page.get_by_text("Insert an example").last.click()
    assert note.inner_text() == "" and page.locator(".go").is_enabled()
    shoot(page, "settings")


def test_an_error_of_the_server_is_told(server: Serving, opened: Opener) -> None:
    page = opened(server.url)
    page.route("**/v1/chat/completions", lambda route: route.fulfill(
        status=429, json={"error": {"message": "Too much at once.", "code": "rate_limit_exceeded"}}
    ))  # fmt: skip
    send(page, "Hello")
    page.wait_for_selector(".problem:has-text('Too much at once.')")
    assert page.locator(".message.user").count() == 1


def test_the_request_as_a_program_runs(server: Serving, opened: Opener) -> None:
    page = opened(server.url)
    send(page, "It's \"quoted\" \\ 'so'", max_tokens=12, seed=5, top_k=40, stop="\\n\\n")
    text = ended(page).locator(".text").inner_text().strip()
    page.get_by_label("Copy as a program").click()
    curl, python = page.locator("dialog pre").all_inner_texts()
    done = subprocess.run(
        [sys.executable, "-c", python], capture_output=True, text=True, check=True
    )
    assert " ".join(done.stdout.split()) == " ".join(text.split())
    assert curl.startswith(f"curl {server.url}/v1/chat/completions") and '"stream": true' in curl


def chunk(finish: str | None = None, **delta: Any) -> str:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return f"data: {json.dumps({'id': 'chatcmpl-1', 'choices': [choice]})}\n\n"


def test_thoughts_and_calls_of_tools(server: Serving, opened: Opener) -> None:
    """As a model with tools would answer; then its result goes back."""
    call = {"index": 0, "id": "call_1", "type": "function"}
    parts = [
        chunk(role="assistant", content=""),
        chunk(reasoning_content="I should "),
        chunk(reasoning_content="look."),
        chunk(tool_calls=[{**call, "function": {"name": "get_weather", "arguments": ""}}]),
        chunk(tool_calls=[{"index": 0, "function": {"arguments": '{"city": '}}]),
        chunk(tool_calls=[{"index": 0, "function": {"arguments": '"Paris"}'}}]),
        chunk("tool_calls"),
    ]
    sunny = [chunk(content="It is <b>sunny</b>."), chunk("stop")]
    asked: list[Any] = []

    def answer(route: Any) -> None:
        asked.append(json.loads(route.request.post_data))
        body = "".join(parts if len(asked) == 1 else sunny) + "data: [DONE]\n\n"
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    page = opened(server.url)
    page.route("**/v1/chat/completions", answer)
    page.get_by_text("Tools", exact=True).click()
    page.get_by_text("Insert an example").first.click()
    send(page, "How is the weather?")
    first = ended(page)
    assert "calls tools" in first.inner_text() and "get_weather" in first.inner_text()
    assert first.locator(".call pre").inner_text() == '{\n  "city": "Paris"\n}'
    thoughts = first.locator(".thoughts .text")
    assert not thoughts.is_visible()
    first.get_by_text("Thoughts").click()
    assert thoughts.inner_text() == "I should look."
    page.get_by_label("Result of get_weather").fill("sunny")
    shoot(page, "tools")
    page.get_by_text("Go on with these results").click()
    assert "It is <b>sunny</b>." in ended(page, 2).inner_text()
    assert [tool["function"]["name"] for tool in asked[0]["tools"]] == ["get_weather"]
    user, calling, result = asked[1]["messages"]
    assert user == {"role": "user", "content": "How is the weather?"}
    assert calling["tool_calls"][0]["function"]["arguments"] == '{"city": "Paris"}'
    assert result == {"role": "tool", "content": "sunny", "tool_call_id": "call_1"}


def test_a_schema_and_a_tool_as_the_server_takes_them(server: Serving, opened: Opener) -> None:
    page = opened(server.url)
    page.get_by_text("Answer format").click()
    page.select_option("[name=format]", "json_schema")
    schema: dict[str, Any] = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}}
    schema |= {"required": ["colour"], "additionalProperties": False}
    page.fill("[name=schema]", json.dumps(schema))
    send(page, "A colour?", max_tokens=60, temperature=0)
    answer = ended(page)
    assert json.loads(answer.locator(".text").inner_text())["colour"] in ("red", "blue")
    page.select_option("[name=format]", "text")
    page.get_by_text("Tools", exact=True).click()
    page.get_by_text("Insert an example").first.click()
    page.select_option("[name=tool_choice]", "required")
    page.get_by_role("button", name="New conversation").first.click()
    send(page, "How is the weather in Paris?", max_tokens=120)
    call = ended(page).locator(".call")
    assert "get_weather" in call.inner_text() and '"city"' in call.inner_text()
    page.select_option("[name=tool_choice]", "none")
    page.get_by_label("Result of get_weather").fill("sunny")
    page.get_by_text("Go on with these results").click()
    assert ended(page, 2).locator(".text").inner_text()


def test_markdown_makes_no_program_of_text(server: Serving, opened: Opener) -> None:
    page = opened(server.url)
    found = page.evaluate(
        """async (text) => {
          const { markdown } = await import("/console/markdown.js");
          const box = document.createElement("div");
          box.append(...markdown(text));
          document.querySelector("main").append(box);
          return { tags: [...new Set([...box.querySelectorAll("*")].map((node) => node.localName))].sort(),
                   links: [...box.querySelectorAll("a")].map((a) => a.getAttribute("href")),
                   code: box.querySelector("pre").textContent, text: box.textContent };
        }""",
        HOSTILE,
    )
    assert not {"script", "img", "iframe", "u", "b"} & set(found["tags"])
    assert {"h3", "strong", "em", "code", "ul", "ol", "table"} <= set(found["tags"])
    there = ["https://there/x.png", "https://there/ok", "https://bare.example/x"]
    assert found["links"] == there
    assert found["code"] == "<b onclick=alert(1)>code</b>"
    assert "<script>alert(1)</script>" in found["text"] and "javascript:alert(1)" in found["text"]


# ---- the dashboard and the models


def test_the_dashboard_moves_and_cancels(server: Serving, opened: Opener) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
    ends: list[Exception] = []

    def write() -> None:
        body = {"ignore_eos": True, "session_id": "tale"}
        try:
            for _ in client.completions.create(**LONG, stream=True, extra_body=body):
                pass
        except Exception as error:
            ends.append(error)

    thread = Thread(target=write)
    thread.start()
    page = opened(f"{server.url}/#live")
    row = page.locator(".requests tbody tr:not(.empty)")
    row.wait_for()
    assert "tale" in row.inner_text()
    count = row.locator("[data-name=Output]")
    before = int(count.inner_text().replace(",", ""))
    until(
        page,
        """(n) => Number(document.querySelector("[data-name=Output]").textContent.replace(",", "")) > n""",
        before,
    )
    until(page, "Number(document.querySelector('.tile b').textContent) > 0")
    assert "held" in page.locator(".blocks").get_attribute("aria-label")
    assert "output" in page.locator("canvas").first.get_attribute("aria-label")
    shoot(page, "live")
    page.get_by_role("button", name="Cancel cmpl-").click()
    page.wait_for_selector(".requests .empty")
    thread.join(60)
    assert isinstance(ends[0], openai.APIError) and ends[0].code == "request_cancelled"
    page.goto(f"{server.url}/#models")
    page.wait_for_selector(".model:has-text('ready')")
    page.wait_for_selector("tr:has-text('tale')")
    shoot(page, "models")
    page.get_by_label("Forget tale").click()
    page.wait_for_selector("text=There are none.")


def test_it_finds_a_server_that_comes_back(server: Serving, opened: Opener) -> None:
    page = opened("about:blank")
    page.route("**/live?**", lambda route: route.fulfill(status=200, body=""))
    page.goto(f"{server.url}/#live")
    page.wait_for_selector(".problem:has-text('asking again')")
    page.unroute("**/live?**")
    page.wait_for_selector(".sub:has-text('is ready')")
    page.wait_for_selector(".problem", state="hidden")


def test_keys_alone_are_enough(server: Serving, opened: Opener) -> None:
    page = opened(server.url)
    until(page, "document.activeElement?.name === 'message'")
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    assert page.locator("dialog").is_visible() and "new conversation" in page.inner_text("dialog")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")
    for key, heading in (("2", "Live"), ("3", "Models")):
        page.keyboard.press(key)
        page.wait_for_selector(f"h1:has-text('{heading}')")
    page.keyboard.press("1")
    page.wait_for_selector(".welcome")
    page.keyboard.press("Escape")
    page.keyboard.press("d")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.keyboard.press("d")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_a_key_is_asked_for_and_kept_for_the_tab(smollm2_gguf: Path, opened: Opener) -> None:
    limits = {"alice": TenantLimits()}
    config = EngineConfig(kv_memory=64 * 2**20, num_threads=2, tenants=limits)
    known = Tenants(limits, ((bytes.fromhex(hash_key("secret")), "alice"),))
    with serving(smollm2_gguf, NAME, config, tenants=known) as guarded:
        page = opened(guarded.url)
        page.wait_for_selector("dialog:has-text('API key')")
        page.fill("dialog input", "secret")
        page.keyboard.press("Enter")
        send(page, "Hello", max_tokens=4)
        ended(page)
        assert page.evaluate("sessionStorage.getItem('elinvar.key')") == "secret"
        assert page.evaluate("Object.values(localStorage).join().includes('secret')") is False


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
def test_it_reads_well(
    server: Serving, opened: Opener, viewport: dict[str, int], dark: bool
) -> None:
    """Names for screen readers, contrast, no sideways scrolling; the pictures are to be looked at."""
    name = f"{'phone' if viewport is PHONE else 'desk'}-{'dark' if dark else 'light'}"
    page = opened(server.url, viewport, dark)

    def check(what: str) -> None:
        shoot(page, f"{name}-{what}")
        assert nameless(page) == [] and faint(page) == [] and not too_wide(page), what

    until(page, "document.querySelector('[name=model]')?.value")
    check("welcome")
    for field, value in (("max_tokens", "60"), ("temperature", "0.3"), ("seed", "4")):
        page.locator(f"[name={field}]").evaluate(
            "(node, value) => { node.value = value; node.dispatchEvent(new Event('input')); }",
            value,
        )
    page.fill("[name=message]", "Write a list of two fruits.")
    page.locator(".go").click()
    ended(page)
    page.mouse.move(0, 0)
    check("chat")
    page.get_by_label("Tokens", exact=True).click()
    page.locator(".token-text .token").nth(1).focus()
    check("tokens")
    if viewport is PHONE:
        page.locator("#show-settings").click()
        page.wait_for_selector(".with-settings")
        check("settings")
        page.keyboard.press("Escape")
        page.wait_for_selector(".with-settings", state="detached")
    for view in ("live", "models"):
        page.goto(f"{server.url}/#{view}")
        page.wait_for_selector(".tile b:not(:text('–'))" if view == "live" else ".model")
        check(view)
