"""The page at `/`, in a real browser: it chats, it stops, it shows, and it runs nobody's code."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

pytest.importorskip("fastapi", reason="fastapi is in the extras 'server' and 'dev'")
pytest.importorskip("selenium", reason="selenium is in the extra 'dev'")

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from quire.async_llm import AsyncLLM
from quire.sampling_params import SamplingParams
from quire.server.app import build_app
from quire.server.routes import page
from quire.server.service import Service
from quire.server.settings import ServerSettings

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

T = TypeVar("T")


class Hosted:
    """An application on a free port, in a thread."""

    def __init__(self, app: Any) -> None:
        config = uvicorn.Config(app, port=0, log_level="warning", ws="none", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        wait(lambda: self._server.started)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def close(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)


class Stub(Hosted):
    """A server with the real page, and answers that a test writes."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.events: list[dict[str, Any]] = []
        self.pause = 0.0
        self.sent = 0
        self.aborted = threading.Event()
        self.key: str | None = None
        self.metrics = ""
        app = FastAPI()
        app.include_router(page.router)

        @app.get("/v1/models")
        async def models(request: Request) -> Response:
            if not self.may(request):
                return self.refusal()
            return JSONResponse({"data": [{"id": "tiny"}, {"id": "other"}]})

        @app.get("/metrics")
        async def metrics(request: Request) -> Response:
            return Response(self.metrics) if self.may(request) else self.refusal()

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            if not self.may(request):
                return self.refusal()
            self.asked.append(json.loads(await request.body()))
            return StreamingResponse(self.stream(), media_type="text/event-stream")

        super().__init__(app)

    def may(self, request: Request) -> bool:
        return self.key is None or request.headers.get("authorization") == f"Bearer {self.key}"

    def refusal(self) -> Response:
        return JSONResponse({"error": {"message": "the key is not known here"}}, 401)

    async def stream(self) -> AsyncIterator[str]:
        try:
            self.sent = 0
            for event in self.events:
                yield f"data: {json.dumps(event)}\n\n"
                self.sent += 1
                await asyncio.sleep(self.pause)
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.aborted.set()
            raise


def wait(condition: Callable[[], T], seconds: float = 20) -> T:
    """Return what a condition gives as soon as that is true."""
    end = time.monotonic() + seconds
    while True:
        try:
            if value := condition():
                return value
        except StaleElementReferenceException:
            pass
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.02)


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


def said(*texts: str) -> list[dict[str, Any]]:
    usage = {"completion_tokens": len(texts), "prompt_tokens": 3}
    return [
        delta(role="assistant", content=""),
        *(delta(content=text) for text in texts),
        delta("stop"),
        {"choices": [], "usage": usage},
    ]


class Page:
    """The page in the browser, as a reader uses it."""

    def __init__(self, chrome: Chrome, url: str) -> None:
        self.chrome = chrome
        chrome.get(url)
        chrome.execute_script("sessionStorage.clear()")
        chrome.get(url)
        chrome.get_log("browser")  # of earlier tests

    def __getitem__(self, id_: str) -> WebElement:
        return self.chrome.find_element(By.ID, id_)

    def all(self, selector: str) -> list[WebElement]:
        return self.chrome.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        found = self.all(selector)
        return found[-1].text if found else ""

    def send(self, text: str) -> None:
        self["prompt"].send_keys(text, Keys.ENTER)

    def ready(self) -> None:
        wait(lambda: self["state"].text == "connected")

    def done(self) -> None:
        wait(lambda: not self.all(".busy") and self["send"].is_displayed())


@pytest.fixture
def stub(chromium: Chrome) -> Iterator[Stub]:
    server = Stub()
    yield server
    chromium.get("about:blank")
    server.close()


@pytest.fixture
def opened(chromium: Chrome, stub: Stub) -> Page:
    shown = Page(chromium, stub.url)
    shown.ready()
    return shown


def test_an_answer_grows_as_it_is_written(opened: Page, stub: Stub) -> None:
    """Text is there before the answer has ended, and the whole of it in the end."""
    stub.events, stub.pause = said(*[f"w{i} " for i in range(10)]), 0.1
    opened.send("hello")
    partial = wait(lambda: opened.text(".assistant .text"))
    assert "w9" not in partial
    assert opened["stop"].is_displayed()
    opened.done()
    assert opened.text(".assistant .text").split() == [f"w{i}" for i in range(10)]
    assert opened.text(".user .text") == "hello"
    assert opened.text(".assistant footer").startswith("10 tokens")


def test_a_conversation_is_sent_with_its_parameters(opened: Page, stub: Stub) -> None:
    """Only what was typed in is sent, as numbers, with what was said before; a new chat forgets."""
    stub.events = said("fine")
    opened.send("one")
    opened.done()
    assert stub.asked[0].keys() == {"messages", "model", "stream", "stream_options"}
    values = {"temperature": "0.5", "top_p": "0.9", "top_k": "7", "max_tokens": "33", "seed": "4"}
    for name, value in values.items():
        opened[name].send_keys(value)
    opened["system"].send_keys("Be kind.")
    opened["prompt"].send_keys("two", Keys.SHIFT + Keys.ENTER)
    opened.send("lines")
    opened.done()
    body = stub.asked[1]
    assert {name: body[name] for name in values} == {k: json.loads(v) for k, v in values.items()}
    assert body["model"] == "tiny"
    assert body["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "fine"},
        {"role": "user", "content": "two\nlines"},
    ]
    opened["clear"].click()
    assert not opened.all(".message")
    opened.send("three")
    opened.done()
    assert len(stub.asked[2]["messages"]) == 2


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stopping_ends_the_request(opened: Page, stub: Stub, way: str) -> None:
    """The server sees the reader go; what was said stays, and the chat goes on from it."""
    stub.events, stub.pause = said(*["word "] * 500), 0.02
    opened.send("talk")
    wait(lambda: opened.text(".assistant .text"))
    if way == "button":
        opened["stop"].click()
    else:
        opened["prompt"].send_keys(Keys.ESCAPE)
    opened.done()
    assert stub.aborted.wait(5)
    assert stub.sent < 400
    assert "stopped" in opened.text(".assistant footer")
    stub.events, stub.pause = said("ok"), 0
    opened.send("on")
    opened.done()
    roles = [message["role"] for message in stub.asked[1]["messages"]]
    assert roles == ["user", "assistant", "user"]


def test_what_a_model_says_is_text_and_nothing_else(opened: Page, stub: Stub) -> None:
    """No markup of an answer, of its reasoning, of a call or of an error becomes an element."""
    evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    call = {"index": 0, "id": "c", "function": {"name": evil, "arguments": evil}}
    stub.events = [
        delta(reasoning_content=evil),
        delta(content=evil),
        delta(tool_calls=[call]),
        {"error": {"message": evil}},
    ]
    opened.send(evil)
    opened.done()
    for selector in (".user .text", ".assistant .text", ".reasoning div", ".error", ".name"):
        assert opened.text(selector) == evil
    assert not opened.all("#log img, #log script")
    assert opened.chrome.title == "quire"


def test_reasoning_and_calls_are_shown_and_results_sent(opened: Page, stub: Stub) -> None:
    """Calls come in pieces; what is typed after them are their results, one by one."""
    stub.events = [
        delta(reasoning_content="let me "),
        delta(reasoning_content="see"),
        delta(tool_calls=[{"index": 0, "id": "a", "function": {"name": "add", "arguments": ""}}]),
        delta(tool_calls=[{"index": 0, "function": {"arguments": '{"x":'}}]),
        delta(tool_calls=[{"index": 0, "function": {"arguments": " 1}"}}]),
        delta(tool_calls=[{"index": 1, "id": "b", "function": {"name": "sub", "arguments": "{}"}}]),
        delta("tool_calls"),
    ]
    opened.all("aside summary")[0].click()
    opened["tools"].send_keys('[{"type": "function", "function": {"name": "add"}}]')
    opened.send("1 + 1?")
    opened.done()
    assert opened.text(".reasoning div") == "let me see"
    assert [each.text for each in opened.all(".call")] == ['add({"x": 1})', "sub({})"]
    assert stub.asked[0]["tools"] == [{"type": "function", "function": {"name": "add"}}]
    stub.events = said("2")
    for name, result in (("add", "2"), ("sub", "0")):
        assert opened["prompt"].get_attribute("placeholder") == f"Result of {name}"
        opened.send(result)
    opened.done()
    [_, body] = stub.asked
    roles = [message["role"] for message in body["messages"]]
    assert roles == ["user", "assistant", "tool", "tool"]
    assert [call["id"] for call in body["messages"][1]["tool_calls"]] == ["a", "b"]
    assert body["messages"][3] == {"role": "tool", "tool_call_id": "b", "content": "0"}


def test_errors_are_shown_and_lose_nothing(opened: Page, stub: Stub) -> None:
    """A message that got no answer is there to be sent again."""
    stub.events = [{"error": {"message": "the engine failed"}}]
    opened.send("hello")
    opened.done()
    assert opened.text("[role=alert]") == "the engine failed"
    assert opened["prompt"].get_attribute("value") == "hello"
    stub.events = [delta(content="half")]
    opened.send("")
    opened.done()
    assert "ended before" in opened.text("[role=alert]")
    opened["tools"].get_attribute("value")
    opened.chrome.execute_script("document.getElementById('tools').value = '{'")
    opened.send("x")
    opened.done()
    assert opened.text("[role=alert]").startswith("Tools:")


def test_a_wrong_key_is_an_error_and_the_right_one_is_kept(chromium: Chrome, stub: Stub) -> None:
    """Without the key there is neither chat nor figure; it stays for as long as the tab."""
    stub.key, stub.events = "secret", said("yes")
    opened = Page(chromium, stub.url)
    wait(lambda: opened["state"].text == "needs an API key")
    opened["key"].send_keys("wrong")
    opened.send("hello")
    opened.done()
    assert opened.text("[role=alert]") == "401: the key is not known here"
    opened["key"].clear()
    opened["key"].send_keys("secret", Keys.TAB)
    opened.ready()
    opened.send("")
    opened.done()
    assert opened.text(".assistant .text") == "yes"
    chromium.refresh()
    opened.ready()
    assert opened["key"].get_attribute("type") == "password"
    assert opened["key"].get_attribute("value") == "secret"
    assert chromium.execute_script("return localStorage.length") == 0


@pytest.mark.parametrize("prefix", ["quire:", "vllm:", "a_b_", ""])
def test_charts_follow_the_metrics(opened: Page, stub: Stub, prefix: str) -> None:
    """Of whatever prefix and labels; the sums are shown as numbers and drawn."""
    label = 'model_name="a} b",engine="0"'

    def metrics(tokens: int) -> str:
        return (
            f"# TYPE {prefix}num_requests_running gauge\n"
            f"{prefix}num_requests_running{{{label}}} 3.0\n"
            f'{prefix}num_requests_running{{engine="1"}} 2.0\n'
            f"{prefix}num_requests_waiting{{{label}}} 4.0\n"
            f"{prefix}num_requests_waiting_by_reason{{{label}}} 99.0\n"
            f"{prefix}kv_cache_usage_perc{{{label}}} 0.25\n"
            f"{prefix}generation_tokens_total{{{label}}} {tokens}\n"
        )

    def drawn() -> str:
        return str(
            opened.chrome.execute_script(
                "return [...document.querySelectorAll('canvas')].map((c) => c.toDataURL()).join()"
            )
        )

    before = drawn()
    stub.metrics = metrics(100)
    wait(lambda: opened["running"].text == "5")
    assert opened["waiting"].text == "4"
    assert opened["cache"].text == "25.0 %"
    stub.metrics = metrics(1100)
    wait(lambda: float(opened["rate"].text) > 200)
    assert drawn() != before


def test_the_page_is_whole_by_itself(opened: Page, stub: Stub) -> None:
    """Nothing comes from elsewhere, nothing breaks its own policy, every field has a label."""
    stub.events = said("fine")
    opened.send("hello")
    opened.done()
    names = opened.chrome.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert names
    assert all(name.startswith(stub.url) for name in names)
    ignored = ("/metrics",)  # 404 where a server has none
    problems = [
        entry["message"]
        for entry in opened.chrome.get_log("browser")
        if not any(each in entry["message"] for each in ignored)
    ]
    assert problems == []
    for field in opened.all("input, textarea, select"):
        assert opened.all(f"label[for={field.get_attribute('id')}]")
    for button in opened.all("button"):
        assert button.accessible_name or not button.is_displayed()


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    with AsyncLLM("quire/demo", max_model_len=2048) as llm:
        yield llm


def _slowly(token_ids: Any, logits: Any) -> Any:
    time.sleep(0.005)
    return logits


class Talkative(Service):
    """Where it is told so, an answer goes on until somebody stops it."""

    endless = False

    def generate(self, prompt: Any, params: SamplingParams, **options: Any) -> Any:
        params.ignore_eos = self.endless
        if self.endless:
            params.logits_processors = [_slowly]  # a browser takes its time, too
        return super().generate(prompt, params, **options)


@pytest.fixture
def service(llm: AsyncLLM) -> Talkative:
    settings = ServerSettings(served_model_names=("quire/demo",))
    return Talkative(llm, settings, asyncio.run(llm.get_tokenizer()))


@pytest.fixture
def real(chromium: Chrome, service: Talkative) -> Iterator[Page]:
    """The page of a server with an engine."""
    server = Hosted(build_app(service))
    shown = Page(chromium, server.url)
    shown.ready()
    yield shown
    chromium.get("about:blank")
    server.close()


def test_the_demo_answers_in_the_page(real: Page) -> None:
    """What the engine writes arrives, with the server's own count of tokens."""
    real["temperature"].send_keys("0")
    real["max_tokens"].send_keys("12")
    real.send("What is the capital of France?")
    real.done()
    assert not real.all(".error"), real.text(".error")
    assert "Paris" in real.text(".assistant .text")
    assert "token" in real.text(".assistant footer")
    real["temperature"].clear()
    real["temperature"].send_keys("-1")
    real.send("And now?")
    real.done()
    assert "temperature" in real.text(".error")


def metrics_of(llm: AsyncLLM) -> dict[str, float]:
    return asyncio.run(llm.get_metrics())


def test_stopping_in_the_page_ends_the_request_in_the_engine(
    real: Page, service: Talkative
) -> None:
    """Its blocks are free at once, and the tokens that were still allowed are never made."""
    llm, service.endless = service.llm, True
    before = metrics_of(llm)["num_generation_tokens"]
    real.send("Tell me everything.")
    wait(lambda: real.text(".assistant .text"))
    real["stop"].click()
    real.done()
    wait(lambda: metrics_of(llm)["num_unfinished_requests"] == 0, seconds=3)
    assert metrics_of(llm)["kv_cache_usage"] == 0
    assert metrics_of(llm)["num_generation_tokens"] - before < 1900
    assert "stopped" in real.text(".assistant footer")


def test_the_charts_show_the_engine(real: Page, service: Talkative) -> None:
    """While it writes there is a request, and there are tokens per second."""
    service.endless = True
    wait(lambda: real["running"].text == "0")
    for _ in range(20):
        real.send("Tell me everything.")
        wait(lambda: real["running"].text == "1" or not real.all(".busy"))
        if real["running"].text == "1":
            break
        real["clear"].click()  # it was done between two looks
    wait(lambda: float(real["rate"].text) > 0)
    if real["stop"].is_displayed():
        real["stop"].click()
    real.done()
    wait(lambda: real["running"].text == "0")


def test_a_server_can_do_without_the_page() -> None:
    """Nothing of it is there then."""
    stand_in: Any = SimpleNamespace(settings=ServerSettings(served_model_names=("m",), page=False))
    paths = {getattr(route, "path", "") for route in build_app(stand_in).routes}
    assert not {"/", "/page/{name}"} & paths


def test_the_files_forbid_what_is_not_theirs() -> None:
    """The policy allows no inline code, and the files have none."""
    folder = Path(page.__file__).parents[1] / "page"
    html = (folder / "index.html").read_text(encoding="utf-8")
    assert "style=" not in html
    assert not re.search(r"\son\w+=", html)
    script = (folder / "page.js").read_text(encoding="utf-8")
    for name in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert name not in script
    assert sum(each.stat().st_size for each in folder.iterdir()) < 40_000
