"""``/metrics``: the names that dashboards for vLLM ask for, with values that are right."""

from __future__ import annotations

import logging
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

httpx = pytest.importorskip("httpx")
prometheus_client = pytest.importorskip("prometheus_client")
pytest.importorskip("fastapi")

from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

from quire import AsyncLLM, SamplingParams  # noqa: E402
from quire.outputs import CompletionOutput, RequestMetrics, RequestOutput  # noqa: E402
from quire.sampling_params import RequestOutputKind  # noqa: E402
from quire.server.app import build_app  # noqa: E402
from quire.server.histogram import Histogram  # noqa: E402
from quire.server.record import RequestRecord  # noqa: E402
from quire.server.service import Service  # noqa: E402
from quire.server.settings import ServerSettings  # noqa: E402

# Of vLLM's V1 engine, by the types that its own /metrics gives them.
CORE = {
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "kv_cache_usage_perc": "gauge",
    "gpu_cache_usage_perc": "gauge",
    "cache_config_info": "gauge",
    "prefix_cache_queries": "counter",
    "prefix_cache_hits": "counter",
    "num_preemptions": "counter",
    "prompt_tokens": "counter",
    "generation_tokens": "counter",
    "request_success": "counter",
    "iteration_tokens_total": "histogram",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "time_per_output_token_seconds": "histogram",
    "request_time_per_output_token_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
    "request_inference_time_seconds": "histogram",
    "request_prefill_time_seconds": "histogram",
    "request_decode_time_seconds": "histogram",
    "request_prompt_tokens": "histogram",
    "request_generation_tokens": "histogram",
    "request_max_num_generation_tokens": "histogram",
    "request_params_max_tokens": "histogram",
    "request_params_n": "histogram",
}


@pytest.fixture(scope="module")
def llm():
    with AsyncLLM("quire/demo", max_num_seqs=16, num_gpu_blocks_override=256) as llm:
        yield llm


async def served(llm, **settings):
    settings = ServerSettings(served_model_names=("demo", "other"), **settings)
    service = Service(llm, settings, await llm.get_tokenizer())
    transport = httpx.ASGITransport(build_app(service))
    return service, httpx.AsyncClient(transport=transport, base_url="http://server")


async def read(client) -> dict:
    """Return the value of each sample of /metrics, by name, or name and odd labels."""
    text = (await client.get("/metrics")).text
    values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            values[sample.name, *sorted(labels.items())] = sample.value
    return values


def value(values: dict, name: str, **labels: str) -> float:
    return values[f"quire:{name}", *sorted(labels.items())]


@pytest.mark.parametrize("prefix", ["quire:", "vllm:", ""])
async def test_names_types_and_labels_are_those_of_vllm(llm, prefix):
    """A dashboard for vLLM finds its metrics under the prefix it asks for."""
    _, client = await served(llm, metrics_prefix=prefix)
    async with client:
        text = (await client.get("/metrics")).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for name, kind in CORE.items():
        family = families[prefix + name]
        assert family.type == kind, name
        assert family.documentation
        for sample in family.samples:
            assert sample.labels["engine"] == "0"
            if name != "cache_config_info":
                assert sample.labels["model_name"] == "demo"
    for name in ("http_requests", "process_resident_memory_bytes", "python_gc_collections"):
        assert name in families or name + "_total" in families


async def test_what_is_counted_is_what_was_answered(llm):
    """Tokens, ends and times over completions of all kinds agree with what clients were told."""
    _, client = await served(llm)
    bodies = [
        {"prompt": "The capital of France is", "max_tokens": 5},
        {"prompt": "One two", "max_tokens": 4, "ignore_eos": True, "n": 3, "temperature": 1},
        {"prompt": ["Hello", "Red green"], "max_tokens": 3, "ignore_eos": True},
        {"prompt": "Hello you", "max_tokens": 6, "ignore_eos": True, "stream": True,
         "stream_options": {"include_usage": True}},
    ]  # fmt: skip
    async with client:
        before = await read(client)
        prompt = generated = 0
        for body in bodies:
            answer = await client.post("/v1/completions", json={"model": "demo", **body})
            assert answer.status_code == 200, answer.text
            if body.get("stream"):
                prompt, generated = prompt + 2, generated + 6
            else:
                usage = answer.json()["usage"]
                prompt += usage["prompt_tokens"]
                generated += usage["completion_tokens"]
        wrong = await client.post("/v1/completions", json={"prompt": "x", "max_tokens": -1})
        assert wrong.status_code == 400
        after = await read(client)

    def change(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    requests = 5
    ends = {
        reason: change("request_success_total", finished_reason=reason)
        for reason in ("stop", "length", "abort", "error")
    }
    assert sum(ends.values()) == requests
    assert ends["abort"] == ends["error"] == 0
    assert change("generation_tokens_total") == change("request_generation_tokens_sum") == generated
    assert change("request_prompt_tokens_sum") == prompt
    assert change("request_params_n_sum") == 7
    assert change("request_params_max_tokens_sum") == 5 + 4 + 3 + 3 + 6
    for name in CORE:
        if CORE[name] == "histogram" and name.startswith(("request_", "e2e_", "time_to_first")):
            assert change(f"{name}_count") == requests, name
    # Each token but the first of its completion came after another one.
    assert change("inter_token_latency_seconds_count") == generated - 7
    parts = ("queue", "prefill", "decode")
    whole = sum(change(f"request_{part}_time_seconds_sum") for part in parts)
    assert whole == pytest.approx(change("e2e_request_latency_seconds_sum"), abs=1e-6)
    counted = after["http_requests_total", *sorted(
        {"handler": "/v1/completions", "method": "POST", "status": "4xx"}.items()
    )]  # fmt: skip
    assert counted == 1


async def test_a_request_that_is_given_up_is_an_abort(llm):
    service, client = await served(llm)
    params = SamplingParams(max_tokens=500, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    stream = service.generate({"prompt_token_ids": [5, 6]}, params)
    await anext(stream)
    await stream.aclose()
    async with client:
        values = await read(client)
    assert value(values, "request_success_total", finished_reason="abort") == 1
    assert value(values, "time_to_first_token_seconds_count") == 1
    assert value(values, "e2e_request_latency_seconds_count") == 0


async def test_buckets_are_cumulative_and_end_with_the_count(llm):
    service, client = await served(llm)
    params = SamplingParams(max_tokens=20, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    async for _ in service.generate({"prompt_token_ids": [5, 6]}, params):
        pass
    async with client:
        text = (await client.get("/metrics")).text
    for family in text_string_to_metric_families(text):
        if family.type == "histogram":
            found = [s.value for s in family.samples if s.name.endswith("_bucket")]
            counts = [s.value for s in family.samples if s.name.endswith("_count")]
            if len(counts) == 1:
                assert found == sorted(found), family.name
                assert found[-1] == counts[0], family.name


async def test_labels_take_few_values_whatever_clients_send(llm):
    """A path or a method of somebody's own makes no series of its own."""
    _, client = await served(llm)
    async with client:
        for path in ("/a", "/b", "/v1/models/x", "/v1/models/y", "/page/../c"):
            await client.get(path)
        await client.request("BREW", "/v1/models")
        values = await read(client)
    handlers = {dict(key[1:])["handler"] for key in values if key[0] == "http_requests_total"}
    assert handlers <= {"none", "/v1/models/{name:path}", "/v1/models", "/metrics"}
    methods = {dict(key[1:])["method"] for key in values if key[0] == "http_requests_total"}
    assert methods == {"GET", "other"}


async def test_openmetrics_is_spoken_to_who_asks_for_it(llm):
    _, client = await served(llm)
    async with client:
        answer = await client.get(
            "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}
        )
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.rstrip().endswith("# EOF")


@given(values=st.lists(st.floats(0, 100, allow_nan=False)), times=st.integers(1, 3))
def test_a_histogram_counts_as_prometheus_does(values, times):
    bounds = [0.5, 1, 2, 5, 50]
    ours = Histogram(bounds)
    theirs = prometheus_client.Histogram("h", "h", buckets=bounds, registry=None)
    for each in values:
        ours.observe(each, times)
        for _ in range(times):
            theirs.observe(each)
    [family] = theirs.collect()
    expected = [s.value for s in family.samples if s.name == "h_bucket"]
    assert [count for _, count in ours.buckets()] == expected
    assert ours.sum == pytest.approx(sum(values) * times)


async def test_an_output_costs_microseconds(llm):
    """Counting must be nothing beside a token's way over HTTP."""
    service, client = await served(llm)
    await client.aclose()
    params = SamplingParams(output_kind=RequestOutputKind.DELTA)
    watch = service.metrics.watch(params, RequestRecord("id"))
    times = RequestMetrics(0.0, 0.0, 0.0)
    output = RequestOutput(
        "r", None, [1, 2], outputs=[CompletionOutput(0, "a", [7])], metrics=times
    )
    best = 1.0
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(1000):
            watch.show(output)
        best = min(best, (time.perf_counter() - started) / 1000)
    assert best < 20e-6


async def test_the_access_log_has_a_line_per_request_and_no_prompt(llm, caplog):
    """Method, path, status, seconds, tokens and the id; a path cannot begin a line of its own."""
    caplog.set_level(logging.INFO, "quire.access")
    _, client = await served(llm, access_log=True)
    async with client:
        await client.post(
            "/v1/completions",
            json={
                "model": "demo",
                "prompt": "A secret of mine",
                "max_tokens": 3,
                "ignore_eos": True,
            },
            headers={"X-Request-Id": "mine-1"},
        )
        await client.get("/a%0Ab%1b[31m?token=hidden")
    first, second = (r.getMessage() for r in caplog.records if r.name == "quire.access")
    assert first.startswith("POST /v1/completions 200 ")
    assert first.endswith("+3 tokens mine-1")
    assert second.startswith("GET /a\\nb\\x1b[31m 404 ")
    assert "secret" not in caplog.text
    assert "hidden" not in caplog.text


async def test_prompts_are_logged_where_that_is_asked_for(llm, caplog):
    caplog.set_level(logging.INFO, "quire")
    _, client = await served(llm, log_prompts=True)
    async with client:
        await client.post("/v1/completions", json={"prompt": "A tale of mine", "max_tokens": 1})
    assert "A tale of mine" in caplog.text


async def test_every_answer_has_an_id_and_takes_that_of_the_client(llm):
    """One that would spoil a header or the log is replaced."""
    _, client = await served(llm)
    async with client:
        ids = {(await client.get("/version")).headers["x-request-id"] for _ in range(3)}
        assert len(ids) == 3
        for asked, kept in (("abc-1", True), ("x" * 129, False), ("a b", False)):
            answer = await client.get("/nothing", headers={"X-Request-Id": asked})
            assert (answer.headers["x-request-id"] == asked) is kept
