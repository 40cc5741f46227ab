"""A stand-in for the engine whose answers say exactly what it was asked."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import threading
import weakref
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

import quire.async_llm
import quire.llm
from quire.config import EngineConfig
from quire.errors import EngineClosedError, InvalidRequestError, RequestFailedError
from quire.integrations import engines
from quire.llm import LLM
from quire.outputs import CompletionOutput, Logprob, RequestOutput
from quire.request_maker import FoundAdapter
from quire.sampling_params import RequestOutputKind, SamplingParams


@dataclasses.dataclass
class Call:
    """One request as the engine got it."""

    prompt: str
    params: SamplingParams
    lora_request: Any
    batch: int
    aborted: bool = False


class FakeTokenizer:
    def encode_prompt(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + list(text.encode())


class FakeLLM(LLM):
    """Answers with what decides an answer; one character is one token.

    A prompt with ``BAD`` in it is refused, one with ``DIE`` fails while it runs. Without a seed,
    sampling also answers with a request counter.
    """

    made: ClassVar[list[weakref.ref[FakeLLM]]] = []
    calls: ClassVar[list[Call]] = []
    loading_seconds = 0.0
    _batches = itertools.count()

    def __init__(self, model: str, **kwargs: Any) -> None:
        if self.loading_seconds:
            threading.Event().wait(self.loading_seconds)
        self.config = EngineConfig.create(model, **kwargs)
        self.is_closed = False
        self.counter = itertools.count()
        FakeLLM.made.append(weakref.ref(self))

    @property
    def closed(self) -> bool:
        return self.is_closed

    @property
    def engine_loop(self) -> Any:
        if self.is_closed:
            raise EngineClosedError("closed; make a new one")
        return self

    def close(self) -> None:
        self.is_closed = True

    def get_tokenizer(self) -> Any:
        return FakeTokenizer()

    def _open_maker(self) -> Any:
        return self.engine_loop

    def find_adapters(self, lora_request: Any, num_prompts: int) -> list[Any]:
        if not isinstance(lora_request, FoundAdapter):
            adapter: Any = SimpleNamespace(digest=f"content of {lora_request}")
            lora_request = FoundAdapter(lora_request, adapter)
        return [lora_request] * num_prompts

    def _run(
        self,
        prompts: Any,
        params: Any = None,
        *,
        return_errors: bool = True,
        use_tqdm: Any = False,
        lora_request: Any = None,
        priority: Any = None,
    ) -> list[RequestOutput | BaseException]:
        assert self.engine_loop is self
        assert params.output_kind is RequestOutputKind.FINAL_ONLY
        batch = next(self._batches)
        if not return_errors and any("BAD" in prompt for prompt in prompts):
            raise InvalidRequestError("a prompt is BAD")
        return [self.answer(prompt, params, lora_request, batch) for prompt in prompts]

    def answer(
        self, prompt: str, params: SamplingParams, lora_request: Any, batch: int
    ) -> RequestOutput | BaseException:
        FakeLLM.calls.append(Call(prompt, params, lora_request, batch))
        if "BAD" in prompt:
            return InvalidRequestError("the prompt is BAD")
        if "DIE" in prompt:
            return RequestFailedError(prompt, "it died")
        outputs = [
            self.completion(i, self.text(prompt, params, lora_request, i), params)
            for i in range(params.n)
        ]
        return RequestOutput(
            request_id="0",
            prompt=prompt,
            prompt_token_ids=list(prompt.encode()),
            prompt_logprobs=(
                [None, *({ord(c): Logprob(-1.0, 1, c)} for c in prompt[1:])]
                if params.prompt_logprobs is not None
                else None
            ),
            outputs=outputs,
            finished=True,
            num_cached_tokens=2,
        )

    def text(self, prompt: str, params: SamplingParams, lora_request: Any, index: int) -> str:
        same = dataclasses.replace(params, output_kind=RequestOutputKind.FINAL_ONLY)
        drawn = params.temperature > 0 and params.seed is None
        number = next(self.counter) if drawn else None
        adapter = getattr(lora_request, "named", lora_request)
        return f"{self.config.model.model}|{prompt}|{same!r}|{adapter}|{index}|{number}"

    def completion(self, index: int, text: str, params: SamplingParams) -> CompletionOutput:
        tokens = [ord(c) for c in text]
        logprobs = None
        if params.logprobs is not None:
            logprobs = [
                {ord(c): Logprob(-0.5, 1, c), 7: Logprob(-1.5, 2, "�"), 8: Logprob(-2.5, 3, "�")}
                for c in text
            ]
        return CompletionOutput(
            index=index,
            text=text,
            token_ids=tokens,
            cumulative_logprob=-0.5 * len(text) if logprobs else None,
            logprobs=logprobs,
            finish_reason="length",
        )

    def deltas(self, prompt: str, params: SamplingParams, lora_request: Any) -> list[RequestOutput]:
        final = self.answer(prompt, params, lora_request, next(self._batches))
        if isinstance(final, BaseException):
            raise final
        parts = []
        width = 5
        for start in range(0, len(final.outputs[0].text), width):
            outputs = []
            for one in reversed(final.outputs):  # order is not promised within a step
                piece = slice(start, start + width)
                last = start + width >= len(one.text)
                if not one.text[piece]:
                    continue
                outputs.append(
                    dataclasses.replace(
                        one,
                        # Every second delta holds its text back, as in the middle of a character.
                        text=""
                        if start % 10 == 0 and not last
                        else one.text[
                            max(0, start - width) if start % 10 else start : start + width
                        ],
                        token_ids=one.token_ids[piece],
                        logprobs=one.logprobs[piece] if one.logprobs else None,
                        finish_reason=one.finish_reason if last else None,
                    )
                )
            parts.append(dataclasses.replace(final, outputs=outputs, finished=False))
        parts[-1].finished = True
        return parts

    def stream(
        self,
        prompt: Any,
        sampling_params: Any = None,
        *,
        lora_request: Any = None,
        priority: int = 0,
    ) -> Any:
        assert self.engine_loop is self
        return _stream(self.deltas(prompt, sampling_params, lora_request), FakeLLM.calls[-1])


def _stream(deltas: list[RequestOutput], call: Call) -> Iterator[RequestOutput]:
    try:
        yield from deltas
    except GeneratorExit:
        call.aborted = True
        raise


class FakeAsyncLLM:
    """The same answers; all requests of one turn of the event loop are one batch."""

    running = 0
    most_running = 0

    def __init__(self, llm: FakeLLM) -> None:
        self.llm = llm

    async def generate(
        self, prompt: str, sampling_params: Any = None, *, lora_request: Any = None
    ) -> AsyncGenerator[RequestOutput, None]:
        assert self.llm.engine_loop is self.llm
        FakeAsyncLLM.running += 1
        FakeAsyncLLM.most_running = max(FakeAsyncLLM.most_running, FakeAsyncLLM.running)
        call = None
        try:
            await asyncio.sleep(0.01)
            if sampling_params.output_kind is RequestOutputKind.DELTA:
                deltas = self.llm.deltas(prompt, sampling_params, lora_request)
                call = FakeLLM.calls[-1]
                for delta in deltas:
                    await asyncio.sleep(0)
                    yield delta
            else:
                output = self.llm.answer(prompt, sampling_params, lora_request, -1)
                if isinstance(output, BaseException):
                    raise output
                yield output
        except (GeneratorExit, asyncio.CancelledError):
            if call is not None:
                call.aborted = True
            raise
        finally:
            FakeAsyncLLM.running -= 1


class Fake:
    """What a test sees of the engines that were made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    @property
    def calls(self) -> list[Call]:
        return FakeLLM.calls

    @property
    def most_running(self) -> int:
        return FakeAsyncLLM.most_running

    def make(self, model: str, **kwargs: Any) -> FakeLLM:
        return FakeLLM(model, **kwargs)

    def num_running(self) -> int:
        return FakeAsyncLLM.running

    def num_made(self) -> int:
        return len(FakeLLM.made)

    def num_alive(self) -> int:
        # No collection of cycles: an engine goes when its last reference does.
        alive = [engine() for engine in FakeLLM.made]
        return sum(engine is not None and not engine.is_closed for engine in alive)

    def load_slowly(self, seconds: float) -> None:
        self._monkeypatch.setattr(FakeLLM, "loading_seconds", seconds)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """Put :class:`FakeLLM` in place of the engine."""
    FakeLLM.made = []
    FakeLLM.calls = []
    FakeAsyncLLM.running = FakeAsyncLLM.most_running = 0
    monkeypatch.setattr(quire.llm, "LLM", FakeLLM)
    monkeypatch.setattr(quire.async_llm.AsyncLLM, "from_llm", FakeAsyncLLM)
    yield Fake(monkeypatch)
    engines._ENGINES.clear()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Return a folder with the files that an engine is told by."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder
