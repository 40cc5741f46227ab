"""Keys and origins: who may ask a server for what."""

from __future__ import annotations

import hmac
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from quire.server.http_metrics import HttpMetrics  # noqa: E402
from quire.server.life import Life  # noqa: E402
from quire.server.middleware import auth, surround  # noqa: E402
from quire.server.settings import ServerSettings  # noqa: E402

OPEN = ["/health", "/ready", "/ping", "/version", "/", "/page/page.js"]
CLOSED = [
    "/v1/models",
    "/metrics",
    "/tokenize",
    "/openapi.json",
    "/v1",
    "/health/x",
    "/pages",
    "//",
]


async def inner(scope, receive, send) -> None:
    """Whatever is behind the layers: it says that it was reached."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"reached"})


def client_of(**settings) -> httpx.AsyncClient:
    settings.setdefault("served_model_names", ("m",))
    service = SimpleNamespace(
        settings=ServerSettings(**settings),
        life=Life(),
        metrics=SimpleNamespace(http=HttpMetrics()),
    )
    transport = httpx.ASGITransport(surround(inner, service))
    return httpx.AsyncClient(transport=transport, base_url="http://server")


KEYS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12)


@given(keys=st.lists(KEYS, min_size=1, max_size=4, unique=True), other=KEYS, index=st.integers(0))
async def test_exactly_the_keys_open(keys, other, index):
    """Every one of them does, and nothing else: no prefix, no longer key, no other case."""
    key = keys[index % len(keys)]
    tokens = {key, other, key[:-1], key + "x", key.swapcase(), ""}
    async with client_of(api_keys=tuple(keys)) as client:
        for token in tokens:
            headers = {"Authorization": f"Bearer {token}"}
            answer = await client.get("/v1/models", headers=headers)
            assert answer.status_code == (200 if token in keys else 401), token


async def test_a_refusal_has_the_shape_that_clients_of_openai_read():
    async with client_of(api_keys=("k",)) as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic k"}):
            answer = await client.post("/v1/chat/completions", headers=headers, json={"a": 1})
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            error = answer.json()["error"]
            assert error["type"] == "authentication_error"
            assert error["code"] == "invalid_api_key"
            assert "wrong" not in error["message"]


async def test_two_keys_at_once_are_none():
    """What a proxy and a client both send is not for us to choose from."""
    async with client_of(api_keys=("k",)) as client:
        headers = [("Authorization", "Bearer k"), ("Authorization", "Bearer x")]
        assert (await client.get("/v1/models", headers=headers)).status_code == 401


async def test_the_scheme_is_written_in_any_case():
    async with client_of(api_keys=("k",)) as client:
        for scheme in ("bearer", "BEARER"):
            headers = {"Authorization": f"{scheme} k"}
            assert (await client.get("/v1/models", headers=headers)).status_code == 200


async def test_all_but_probes_and_the_page_is_closed():
    """What is not known to be open is closed, paths of nothing included."""
    async with client_of(api_keys=("k",)) as client:
        for path in OPEN:
            assert (await client.get(path)).status_code == 200, path
        for path in CLOSED:
            assert (await client.get(f"http://server{path}")).status_code == 401, path


async def test_without_the_page_its_paths_are_closed():
    async with client_of(api_keys=("k",), page=False) as client:
        for path in ("/", "/page/page.js"):
            assert (await client.get(path)).status_code == 401


async def test_metrics_open_when_told_to():
    async with client_of(api_keys=("k",), open_metrics=True) as client:
        assert (await client.get("/metrics")).status_code == 200
        assert (await client.get("/metrics/x")).status_code == 401


async def test_without_keys_everything_is_open():
    async with client_of() as client:
        for path in OPEN + CLOSED:
            assert (await client.get(f"http://server{path}")).status_code == 200


async def test_every_key_is_compared_whatever_was_found(monkeypatch):
    """Time tells neither which key it was, nor how much of one was right, nor how long it is."""
    compared = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return hmac.compare_digest(a, b)

    monkeypatch.setattr(auth, "hmac", SimpleNamespace(compare_digest=compare))
    async with client_of(api_keys=("first", "second", "third" * 9)) as client:
        for token in ("first", "third" * 9, "nothing", ""):
            compared.clear()
            await client.get("/v1/models", headers={"Authorization": f"Bearer {token}"})
            assert compared == [(32, 32)] * 3


async def test_pages_of_other_origins_get_nothing_unless_named():
    """CORS is off by default: a browser keeps the answer from the page."""
    asks = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    async with client_of(api_keys=("k",)) as client:
        answer = await client.options("/v1/models", headers=asks)
        assert "access-control-allow-origin" not in answer.headers
    async with client_of(api_keys=("k",), allowed_origins=("https://page.example",)) as client:
        answer = await client.options("/v1/models", headers=asks)  # has no key, by the standard
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://page.example"
        asks["Origin"] = "https://other.example"
        answer = await client.options("/v1/models", headers=asks)
        assert "access-control-allow-origin" not in answer.headers
        answer = await client.get("/v1/models", headers={"Origin": "https://page.example"})
        assert answer.status_code == 401
        assert answer.headers["access-control-allow-origin"] == "https://page.example"


async def test_a_proxys_prefix_changes_nothing():
    """Neither opens it what is closed, nor closes it what is open."""

    def scoped(app):
        async def with_root(scope, receive, send):
            await app({**scope, "root_path": "/api"}, receive, send)

        return with_root

    service = SimpleNamespace(
        settings=ServerSettings(served_model_names=("m",), api_keys=("k",), root_path="/api"),
        life=Life(),
        metrics=SimpleNamespace(http=HttpMetrics()),
    )
    transport = httpx.ASGITransport(scoped(surround(inner, service)))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        for path, status in (
            ("/api/health", 200),
            ("/health", 200),
            ("/api/v1/models", 401),
            ("/v1/models", 401),
            ("/api", 200),
            ("/apihealth", 401),
        ):
            assert (await client.get(path)).status_code == status, path
