"""A Ray Serve application of two replicas on two nodes answers as one server does."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from ray_clusters import WHY, actor_pids, two_nodes, wait_until

from quire import LLM, SamplingParams
from quire.errors import ConfigError

ray = pytest.importorskip("ray", reason=WHY)
pytest.importorskip("ray.serve", reason=WHY)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),  # of Serve, about its own
]

TEXT = "The capital of Norway is"
MANY = " ".join(f"This is sentence number {i}." for i in range(30))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def serve() -> Iterator[Any]:
    from ray import serve

    with two_nodes(2):
        yield serve
        serve.shutdown()


@pytest.fixture(scope="module")
def url(serve: Any) -> Iterator[str]:
    from quire.server.ray_app import build

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    given = {
        "model": "quire/demo",
        "num_replicas": "2",  # as `serve run` has it
        "enable-prefix-caching": "true",
        "max_model_len": 1024,
        "num_gpu_blocks_override": 256,
        "dtype": "float32",
        "api_key": ["a-key"],
        "health_check_period_s": 1,
    }
    serve.run(build(given), name="quire", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.delete("quire")


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(
        base_url=url, headers={"Authorization": "Bearer a-key"}, timeout=60
    ) as client:
        yield client


def ask(client: httpx.Client, prompt: str, **fields: Any) -> dict[str, Any]:
    common = {"model": "quire/demo", "max_tokens": 12, "temperature": 0}
    answer = client.post("/v1/completions", json={**common, "prompt": prompt, **fields})
    assert answer.status_code == 200, answer.text
    said: dict[str, Any] = answer.json()
    return said


@pytest.fixture(scope="module")
def right() -> str:
    with LLM("quire/demo", dtype="float32", num_gpu_blocks_override=64) as llm:
        params = SamplingParams(temperature=0, max_tokens=12)
        return llm.generate([TEXT], params, use_tqdm=False)[0].outputs[0].text


def test_both_replicas_answer_as_one_process_does(client, right):
    assert len(actor_pids("ServeReplica:quire:Replica")) == 2
    assert ask(client, TEXT)["choices"][0]["text"] == right
    for path in ("/health", "/ready", "/version", "/v1/models", "/metrics"):
        assert client.get(path).status_code == 200, path
    chat = {"model": "quire/demo", "messages": [{"role": "user", "content": "Hello"}]}
    answer = client.post("/v1/chat/completions", json={**chat, "max_tokens": 4})
    assert answer.json()["choices"][0]["message"]["role"] == "assistant"


def test_a_stream_comes_event_by_event(client):
    fields = {"model": "quire/demo", "prompt": "1 2 3", "max_tokens": 12, "temperature": 0}
    fields["ignore_eos"] = True
    whole = ask(client, **fields)["choices"][0]["text"]
    pieces = []
    with client.stream("POST", "/v1/completions", json={**fields, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                pieces.append(json.loads(line[6:])["choices"][0]["text"])
    assert len(pieces) > 3
    assert "".join(pieces) == whole


def test_errors_are_the_servers_own(client, url):
    assert httpx.get(f"{url}/v1/models").status_code == 401
    assert client.post("/v1/completions", content=b"{").status_code in (400, 415)
    answer = client.post("/v1/completions", json={"model": "other", "prompt": "x"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


def test_equal_prefixes_go_to_the_replica_that_has_them(client):
    """All but the first of each find it cached, and both replicas have some."""
    for number in range(4):
        beginning = f"Story {number}. {MANY} "
        for turn in range(4):
            usage = ask(client, f"{beginning} Then {turn}.", max_tokens=2)["usage"]
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            assert (cached > 100) == (turn > 0)


def test_a_replica_that_dies_is_replaced(client, right):
    """And meanwhile the other one answers."""
    before = actor_pids("ServeReplica:quire:Replica")
    os.kill(before[0], signal.SIGKILL)
    wait_until(lambda: _text(client) == right, 60)
    wait_until(lambda: len(set(actor_pids("ServeReplica:quire:Replica")) - {before[0]}) == 2, 90)


def _text(client: httpx.Client) -> str | None:
    fields = {"model": "quire/demo", "prompt": TEXT, "max_tokens": 12, "temperature": 0}
    answer = client.post("/v1/completions", json=fields)
    return answer.json()["choices"][0]["text"] if answer.status_code == 200 else None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "quire/demo", "port": 1}, "port is about connections"),
        ({"model": "quire/demo", "data_parallel_size": 2}, "num_replicas"),
        ({"model": "quire/demo", "num_replicas": "many"}, "num_replicas must be a number"),
        ({"model": "quire/demo", "min_replicas": 1}, "need max_replicas"),
        ({"model": "quire/demo", "number": 1}, "has no argument 'number'"),
    ],
)
def test_wrong_arguments_are_named(given, message):
    from quire.server.ray_app import build

    with pytest.raises(ConfigError, match=message):
        build(given)


def test_a_client_that_goes_away_ends_its_request(client):
    """Through Ray Serve's proxy and the front: the replica has nothing to do any more."""
    fields = {"model": "quire/demo", "prompt": "1 2", "max_tokens": 900, "ignore_eos": True}
    with client.stream("POST", "/v1/completions", json={**fields, "stream": True}) as answer:
        next(answer.iter_lines())

    def is_aborted() -> bool:
        lines = client.get("/metrics").text.splitlines()  # of either replica
        return any("request_success_total" in x and "abort" in x and "} 1.0" in x for x in lines)

    wait_until(is_aborted, 5)


def test_a_replica_of_two_ranks_has_the_other_beside_it(serve, url, right):
    """In the placement group that Ray Serve makes for it, which ends with it."""
    from quire.server.ray_app import build

    given = {"model": "quire/demo", "tensor_parallel_size": 2, "max_model_len": 512}
    serve.run(build({**given, "dtype": "float32"}), name="spread", route_prefix="/spread")
    (pid,) = actor_pids("RayRank")
    with httpx.Client(base_url=f"{url}/spread", timeout=60) as client:
        assert ask(client, TEXT)["choices"][0]["text"] == right
    serve.delete("spread")
    wait_until(lambda: pid not in actor_pids("RayRank"), 30)
