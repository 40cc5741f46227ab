"""An engine whose steps are trivial and can be held, under the real loop, processor and doors."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import pytest

import quire.llm
from quire.engine.processor import ModelLimits, Processor
from quire.errors import EngineClosedError, InvalidRequestError, RequestFailedError
from quire.lora.store import AdapterStore
from quire.outputs import CompletionOutput, RequestOutput
from quire.sampling_params import RequestOutputKind

WAIT = 20.0
"""Seconds after which a test that waits for another thread has failed."""


@pytest.fixture
def engine_threads() -> Callable[[], list[threading.Thread]]:
    """The engines' threads that began in this test: what other files left may still have its own.

    A test names it before the fixtures that make engines.
    """
    before = set(threading.enumerate())
    return lambda: [
        thread
        for thread in threading.enumerate()
        if thread.name == "quire-engine" and thread not in before
    ]


class CharTokenizer:
    """One token per character: its code point."""

    bos_token = bos_token_id = None
    chat_template = "{{ messages }}"

    def encode(self, text, add_special_tokens=True):
        return [ord(c) for c in text]

    encode_prompt = encode

    def decode(self, ids, skip_special_tokens=False):
        return "".join(map(chr, ids))

    def apply_chat_template(self, messages, *, add_generation_prompt=True, **kwargs):
        if any(message["role"] == "bad" for message in messages):
            raise InvalidRequestError("the template refuses the role 'bad'")
        text = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        return self.encode(text + "<assistant>" * add_generation_prompt)


class EchoEngine:
    """Says the prompt again, one token per step, and round again until max_tokens.

    A prompt that has a "!" where the next token would be taken from fails there. `hold` stops
    the steps until `go_on`.
    """

    def __init__(self, config):
        self.config = config
        self.tokenizer = CharTokenizer()
        self.limits = ModelLimits(
            vocab_size=1000, max_model_len=600, max_cache_tokens=10_000, eos_token_ids=()
        )
        self.processor = Processor(self.tokenizer, self.limits, seed=config.seed)
        self.adapters = AdapterStore(config.lora)
        self.requests = {}
        self.said = {}
        self.sent = {}
        self.aborted = []
        self.batch_sizes = []
        self.closed = False
        self.begun = self.steps = 0
        self.delay = 0.0
        self.gate = threading.Event()
        self.gate.set()

    def start_thread(self):
        self.thread = threading.current_thread()

    @property
    def has_work(self):
        return bool(self.requests)

    def add_request(self, request):
        if self.closed:
            raise EngineClosedError("closed")
        assert request.request_id not in self.requests
        self.requests[request.request_id] = request
        self.said[request.request_id] = []

    def step(self):
        if not self.requests:
            return []
        self.begun += 1
        self.gate.wait(WAIT)
        time.sleep(self.delay)
        self.steps += 1
        self.batch_sizes.append(len(self.requests))
        outputs = []
        for request in list(self.requests.values()):
            said = self.said[request.request_id]
            token = request.prompt_token_ids[len(said) % len(request.prompt_token_ids)]
            if token == ord("!"):
                del self.requests[request.request_id]
                failure = RequestFailedError(request.request_id, "no '!' please")
                failure.__cause__ = ValueError("no '!' please")
                outputs.append(failure)
                continue
            said.append(token)
            reason = "length" if len(said) >= request.params.max_tokens else None
            output = self.output(request, reason)
            if reason is not None:
                del self.requests[request.request_id]
            if output is not None:
                outputs.append(output)
        return outputs

    def output(self, request, reason):
        kind, said = request.params.output_kind, self.said[request.request_id]
        if kind is RequestOutputKind.FINAL_ONLY and reason is None:
            return None
        first = self.sent.get(request.request_id, 0) if kind is RequestOutputKind.DELTA else 0
        self.sent[request.request_id] = len(said)
        ids = said[first:]
        completion = CompletionOutput(
            0, self.tokenizer.decode(ids), list(ids), finish_reason=reason
        )
        return RequestOutput(
            request.request_id,
            request.prompt,
            request.prompt_token_ids,
            outputs=[completion],
            finished=reason is not None,
        )

    def abort(self, request_ids):
        outputs = []
        for request_id in request_ids:
            if (request := self.requests.pop(request_id, None)) is not None:
                self.aborted.append(request_id)
                outputs.append(self.output(request, "abort"))
        return outputs

    def restart(self, error):
        failed = [RequestFailedError(request_id, str(error)) for request_id in self.requests]
        self.requests.clear()
        return failed

    def metrics(self):
        return {"num_steps": float(self.steps)}

    def reset_prefix_cache(self):
        return not self.requests

    def close(self):
        self.closed = True
        self.requests.clear()
        return []

    # -- for the tests --

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let no step end inside."""
        self.gate.clear()
        try:
            yield
        finally:
            self.gate.set()


@pytest.fixture
def make_llm(monkeypatch):
    """Make an LLM over an EchoEngine; `llm.llm_engine` is the latter."""
    from quire.engine.loop import EngineLoop

    monkeypatch.setattr(quire.llm, "make_loop", lambda config: EngineLoop(EchoEngine(config)))
    made = []

    def make(**kwargs):
        llm = quire.llm.LLM("echo", **kwargs)
        made.append(llm.close)
        return llm

    yield make
    for close in made:
        close()


@pytest.fixture
def llm(make_llm):
    return make_llm()


@pytest.fixture
def engine(llm):
    return llm.llm_engine
