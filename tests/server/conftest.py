"""What the tests of the server share: the application in this process, and clients of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import httpx
import openai
import pytest
import pytest_asyncio
from fastapi import FastAPI

from quire import LLM
from quire.async_llm import AsyncLLM
from quire.server.app import build_app
from quire.server.service import Service
from quire.server.settings import ServerSettings


@pytest.fixture(scope="session")
def demo_llm() -> Iterator[LLM]:
    """The demo model in this process: the oracle for what is served."""
    with LLM("quire/demo", dtype="float32", num_gpu_blocks_override=1024) as llm:
        yield llm


@pytest.fixture(scope="session")
def demo_service(demo_llm: LLM) -> Service:
    """A service over the same engine, which also answers to the name ``demo``."""
    settings = ServerSettings(
        served_model_names=("quire/demo", "demo"),
        tool_call_parser="hermes",
        trust_request_chat_template=True,
    )
    return Service(AsyncLLM.from_llm(demo_llm), settings, demo_llm.get_tokenizer())


@pytest.fixture(scope="session")
def demo_app(demo_service: Service) -> FastAPI:
    """Its application."""
    return build_app(demo_service)


@pytest_asyncio.fixture
async def http(demo_app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of it that speaks plain HTTP."""
    transport = httpx.ASGITransport(demo_app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield client


@pytest_asyncio.fixture
async def client(demo_app: FastAPI) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's client of it."""
    transport = httpx.ASGITransport(demo_app)
    async with (
        httpx.AsyncClient(transport=transport) as http_client,
        openai.AsyncOpenAI(
            api_key="EMPTY", base_url="http://server/v1", http_client=http_client, max_retries=0
        ) as client,
    ):
        yield client
